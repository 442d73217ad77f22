import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { Coverage } from '../../src/transfer/coverage.js';
import { xorshift } from '../native/kv_reference.js';

test('complete when every cell came once', () => {
  const coverage = new Coverage(2, [16, 64]);
  assert.is(coverage.firstGap(), 'layer 0 lacks tokens [16, 64)');
  assert.ok(coverage.add([0, 2], [32, 48]));
  assert.is(coverage.firstGap(), 'layer 0 lacks tokens [16, 32)');
  assert.ok(coverage.add([0, 1], [16, 32]));
  assert.ok(coverage.add([0, 1], [48, 64]));
  assert.is(coverage.firstGap(), 'layer 1 lacks tokens [16, 32)');
  assert.ok(coverage.add([1, 2], [16, 32]));
  assert.is(coverage.firstGap(), 'layer 1 lacks tokens [48, 64)');
  assert.not.ok(coverage.complete);
  assert.ok(coverage.add([1, 2], [48, 64]));
  assert.ok(coverage.complete);
});

test('what overlaps or leaves the hand-off changes nothing', () => {
  const coverage = new Coverage(4, [0, 100]);
  assert.ok(coverage.add([1, 3], [10, 20]));
  const refused: [[number, number], [number, number]][] = [
    [[2, 4], [19, 30]], [[0, 4], [0, 100]], [[1, 2], [12, 15]], [[0, 5], [30, 40]], [[-1, 1], [30, 40]], [[0, 1], [90, 101]], [[3, 3], [0, 1]], [[0, 1], [5, 5]],
  ];
  for (const [layers, tokens] of refused) assert.not.ok(coverage.add(layers, tokens), `${layers} ${tokens}`);
  assert.ok(coverage.add([2, 3], [20, 30]), 'a neighbour is no overlap');
  assert.ok(coverage.add([3, 4], [19, 30]));
});

test('random rectangles agree with a grid', () => {
  const random = xorshift(3);
  for (let round = 0; round < 200; round++) {
    const layers = 1 + random() % 4;
    const tokens = 1 + random() % 12;
    const coverage = new Coverage(layers, [0, tokens]);
    const grid = Array.from({ length: layers }, () => new Array<boolean>(tokens).fill(false));
    for (let step = 0; step < 60; step++) {
      const l0 = random() % layers;
      const l1 = l0 + 1 + random() % (layers - l0);
      const t0 = random() % tokens;
      const t1 = t0 + 1 + random() % (tokens - t0);
      const isFree = grid.slice(l0, l1).every((row) => row.slice(t0, t1).every((cell) => !cell));
      assert.is(coverage.add([l0, l1], [t0, t1]), isFree);
      if (isFree) for (let l = l0; l < l1; l++) grid[l]!.fill(true, t0, t1);
      assert.is(coverage.complete, grid.every((row) => row.every(Boolean)));
    }
  }
});

test.run();
