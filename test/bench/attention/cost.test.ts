import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { costOfShape, kvTokenBytes } from '../../../src/bench/attention/cost.js';
import { shapeFromFields } from '../../../src/bench/attention/shape.js';
import { visibleBlocks } from '../../../src/bench/attention/variants.js';

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

test('GQA reads the keys and values of every KV head once', () => {
  const { flops, bytes } = cost({ kind: 'gqa', heads: 32, kv_heads: 8, head_dim: 128, batch: 3, kv_len: 1000 });
  assert.is(bytes, (3 * 1000 * 8 + 3 * 32) * 128 * 2 * 2);
  assert.is(flops, 2 * 3 * 1000 * 32 * 128 * 2);
});

test('a chunk takes the operations of the form that needs fewer, and its weights move once', () => {
  const of = (q_tokens: number) => cost({ kind: 'chunk', heads: 2, kv_len: 8000, q_tokens, causal: false });
  const weights = 2 * 256 * 512;
  assert.is(of(10).flops, 2 * (10 * 8000 * 2 * (576 + 512) + 10 * weights), 'absorbed');
  assert.is(of(1000).flops, 2 * (1000 * 8000 * 2 * (192 + 128) + 8000 * weights), 'un-absorbed');
  assert.is(of(10).bytes, 8000 * 1152 + 10 * 2 * (192 + 128) * 2 + weights * 2);
  assert.is(cost({ kind: 'chunk', heads: 2, kv_len: 8000, q_tokens: 10, kv_dtype: 'fp8' }).bytes, of(10).bytes - 8000 * (1152 - 656));
});

test('tokens and pairs that a window or a block mask hides do not count', () => {
  for (const [fields, block] of [[{ window: 5 }, null], [{ block_mask: '16:0.5' }, 16], [{ block_mask: '16:0.4', window: 40 }, 16], [{ window: 5, causal: false }, null]] as const) {
    const [queries, keys] = [3, 100];
    const shape = shapeFromFields({ kind: 'gqa', heads: 2, kv_heads: 1, head_dim: 64, kv_len: keys, q_tokens: queries, ...fields }, 'here');
    if (shape.kind !== 'gqa' || shape.variants === undefined) throw assert.unreachable('no variants');
    const { blockMask, window } = shape.variants;
    const listed = blockMask === null ? undefined : visibleBlocks(blockMask, shape.kvLens)[0];
    const seen = new Set<number>();
    let pairs = 0;
    for (let position = keys - queries; position < keys; position++) {
      for (let t = 0; t < keys; t++) {
        const inWindow = window === 0 || t > position - window;
        const inBlocks = listed === undefined || listed.includes(Math.floor(t / (block ?? 1)));
        if (!inWindow || !inBlocks) continue;
        seen.add(t);
        if (t <= position || !shape.causal) pairs++;
      }
    }
    assert.is(costOfShape(shape).flops, pairs * 2 * 2 * 64 * 2);
    assert.is(costOfShape(shape).bytes, (seen.size + queries * 2) * 64 * 2 * 2);
  }
});

test('a block mask shows the last block and the asked share of the others, always the same ones', () => {
  const mask = { block: 16, share: 0.25 };
  const lists = visibleBlocks(mask, [640, 0, 5, 641]);
  assert.equal(lists.map((list) => [list.length, list.at(-1)]), [[10, 39], [0, undefined], [1, 0], [10, 40]]);
  for (const list of lists) assert.equal(list, [...new Set(list)].sort((a, b) => a - b));
  assert.equal(visibleBlocks(mask, [640, 0, 5, 641]), lists);
  assert.equal(visibleBlocks({ block: 16, share: 1 }, [40]), [[0, 1, 2]]);
});

test.run();
