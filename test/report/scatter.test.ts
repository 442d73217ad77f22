import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { scatter } from '../../src/report/scatter.js';

const test = suite('report/scatter');
const marks = [
  { x: 640, y: 0.1, label: 'pca', series: 'pca' },
  { x: 704, y: 0.01, label: 'a < b', series: 'ours' },
  { x: 768, y: 0.001, label: 'c', series: 'ours' },
];

test('marks, joined series, labelled axes, escaped text', () => {
  const svg = scatter(marks, { title: 'T & U', xLabel: 'bytes', yLabel: 'KL', lines: ['ours'] });
  assert.is(svg.match(/<title>/g)?.length, 3);
  assert.match(svg, 'T &amp; U');
  assert.match(svg, 'a &lt; b: 0.0100 at 704');
  assert.is(svg.match(/<polyline/g)?.length, 1);
  for (const tick of ['1e-1', '1e-3', '>700<']) assert.match(svg, tick);
});

test('further down is smaller; equal decades are equally far apart', () => {
  const svg = scatter(marks, { title: '', xLabel: '', yLabel: '' });
  const ys = [...svg.matchAll(/<circle cx="[\d.]+" cy="([\d.]+)" r="4.5" fill="[^"]+"><title>/g)].map((match) => Number(match[1]));
  assert.ok(ys[0]! < ys[1]! && ys[1]! < ys[2]!);
  assert.ok(Math.abs(ys[1]! - ys[0]! - (ys[2]! - ys[1]!)) < 0.2);
});

test.run();
