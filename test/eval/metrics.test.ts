import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Score } from '../../src/eval/metrics.js';

const test = suite('eval/metrics');

test('bits per byte, divergence and agreement by hand', () => {
  const score = new Score();
  const logits = (...p: number[]) => Float32Array.from(p, (x) => Math.log(x) + 3);
  score.add(logits(0.5, 0.25, 0.25), logits(0.5, 0.3, 0.2), 0, 2);
  score.add(logits(0.1, 0.8, 0.1), logits(0.7, 0.2, 0.1), 1, 1);
  const { bits_per_byte, kl_vs_mla, top1_agreement, tokens } = score.summary();
  const kl = (p: number[], q: number[]) => p.reduce((sum, x, i) => sum + x * Math.log(x / q[i]!), 0);
  assert.ok(Math.abs(bits_per_byte - (1 - Math.log2(0.8)) / 3) < 1e-6);
  assert.ok(Math.abs(kl_vs_mla - (kl([0.5, 0.3, 0.2], [0.5, 0.25, 0.25]) + kl([0.7, 0.2, 0.1], [0.1, 0.8, 0.1])) / 2) < 1e-6);
  assert.is(top1_agreement, 0.5);
  assert.is(tokens, 2);
});

test('equal logits: no divergence, at any offset', () => {
  const score = new Score();
  score.add(Float32Array.of(1, 2, 3), Float32Array.of(11, 12, 13), 0, 1);
  assert.ok(Math.abs(score.summary().kl_vs_mla) < 1e-6);
});

test.run();
