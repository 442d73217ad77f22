import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { costOfShape, kvTokenBytes } from '../../../src/bench/attention/cost.js';
import { shapeFromFields } from '../../../src/bench/attention/shape.js';

const cost = (fields: Record<string, unknown>) => costOfShape(shapeFromFields(fields, 'here'));

test('a cached token is 1,152 bytes in bf16 and 656 in fp8, half of the latent 640 and 388', () => {
  assert.is(kvTokenBytes('bf16', 512, 64), 1152);
  assert.is(kvTokenBytes('fp8', 512, 64), 656);
  assert.is(kvTokenBytes('bf16', 256, 64), 640);
  assert.is(kvTokenBytes('fp8', 256, 64), 256 + 8 + 128);
  assert.is(kvTokenBytes('f32', 512, 64), 2304);
});

test("FlashMLA's 128 × 8K with 128 heads: 292 GFLOP and 1.24 GB", () => {
  const { flops, bytes } = cost({ batch: 128, kv_len: 8192 });
  assert.is(flops, 2 * 128 * 8192 * 128 * (576 + 512));
  assert.is(bytes, 128 * 8192 * 1152 + 128 * 128 * (576 + 512) * 2);
});

test('every pair of a query and a key it sees counts once', () => {
  // Counted one by one; queries beyond the keys see nothing.
  for (const [queries, keys] of [[1, 1], [4, 4], [4, 9], [5, 3], [3, 0], [0, 7]] as const) {
    let pairs = 0;
    for (let i = 0; i < queries; i++) pairs += Math.max(0, keys - queries + i + 1);
    const perPair = 2 * 2 * (192 + 128);
    assert.is(cost({ kind: 'prefill', heads: 2, q_tokens: queries, kv_len: keys }).flops, pairs * perPair, `${queries} queries, ${keys} keys`);
    assert.is(cost({ kind: 'prefill', heads: 2, q_tokens: queries, kv_len: keys, causal: false }).flops, queries * keys * perPair);
  }
});

test.run();
