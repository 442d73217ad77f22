import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { PRESETS, presetShapes, type PresetName } from '../../../src/bench/attention/presets.js';
import { costOfShape } from '../../../src/bench/attention/cost.js';
import { selectShapes } from '../../../src/bench/attention/select.js';
import { fieldsOfShape, shapeFromFields, workOfShape, type AttentionShape, type DecodeShape } from '../../../src/bench/attention/shape.js';

const isDecode = (shape: AttentionShape): shape is DecodeShape => shape.kind === 'decode';

const refusal = (fields: Record<string, unknown>): string => {
  try {
    shapeFromFields(fields, 'here');
  } catch (error) {
    return (error as Error).message;
  }
  return assert.unreachable(`${JSON.stringify(fields)} was taken`) as never;
};

test('absent fields have the defaults of DeepSeek-V3, empty ones count as absent', () => {
  assert.equal(shapeFromFields({ kv_len: '100', heads: '', gpu: undefined }, 'here'), {
    kind: 'decode', heads: 128, qLens: [1], kvLens: [100], causal: true, path: 'auto', latent: 512, rope: 64, page: 64, kvDType: 'bf16', latentScale: false,
  });
  const prefill = shapeFromFields({ kind: 'prefill', kv_lens: '5;9' }, 'here');
  assert.equal(prefill, { kind: 'prefill', heads: 128, qLens: [5, 9], kvLens: [5, 9], causal: true, path: 'auto', keyDim: 192, valueDim: 128 });
});

test('a shape written as fields reads back as itself, every preset included', () => {
  const shapes = [
    ...(Object.keys(PRESETS) as PresetName[]).flatMap(presetShapes),
    shapeFromFields({ kv_lens: [3, 0, 7], q_lens: '1;0;4', latent: 320, page: 16, causal: 'false', latent_scale: 1, kv_dtype: 'fp8', path: 'sm80' }, 'here'),
    shapeFromFields({ kind: 'prefill', batch: 2, kv_len: 64, q_tokens: 16, causal: false }, 'here'),
    shapeFromFields({ kv_len: 64, softcap: '1.5', window: 7, alibi: true, block_mask: '32:0.3' }, 'here'),
    shapeFromFields({ kind: 'chunk', kv_lens: '500;60', q_lens: '7;60', kv_dtype: 'fp8', form: 'unabsorbed', page: 16 }, 'here'),
    shapeFromFields({ kind: 'gqa', kv_lens: '5;6', kv_layout: 'hnd', head_dim: 64, window: 2 }, 'here'),
  ];
  for (const shape of shapes) assert.equal(shapeFromFields(fieldsOfShape(shape), 'again'), shape);
});

test('a chunk is the last 512 tokens behind what is cached, or all there are', () => {
  assert.equal(shapeFromFields({ kind: 'chunk', kv_lens: '4000;9' }, 'here'), {
    kind: 'chunk', heads: 128, qLens: [512, 9], kvLens: [4000, 9], causal: true, path: 'auto', page: 64, kvDType: 'bf16', form: 'auto',
  });
});

test('KV heads or a head dim mean ordinary keys and values', () => {
  assert.equal(shapeFromFields({ kv_len: 9, kv_heads: 2 }, 'here'), {
    kind: 'gqa', heads: 32, kvHeads: 2, qLens: [1], kvLens: [9], causal: true, path: 'auto', headDim: 128, page: 64, layout: 'nhd',
  });
});

test('variants that are off leave no trace', () => {
  assert.not('variants' in shapeFromFields({ kv_len: 9, softcap: 0, window: 0, alibi: false }, 'here'));
  assert.equal(fieldsOfShape(shapeFromFields({ kv_len: 9, window: 4 }, 'here')).window, 4);
  assert.not('softcap' in fieldsOfShape(shapeFromFields({ kv_len: 9, window: 4 }, 'here')));
});

test('presets hold the published workloads', () => {
  assert.is(presetShapes('flashmla').length, 31);
  const fp8 = presetShapes('fp8').filter(isDecode);
  for (const dtype of ['bf16', 'fp8']) assert.is(fp8.filter(({ kvDType }) => kvDType === dtype).length, fp8.length / 2);
  assert.equal(presetShapes('thundermla').filter(isDecode).map(({ kvLens, qLens }) => [kvLens.length, qLens[0]]), [[4, 4], [1, 1], [64, 4], [64, 2], [132, 4]]);
  assert.equal([...new Set(presetShapes('tpla').map((shape) => shape.kind === 'decode' && shape.latent))], [256, 320, 288, 128]);
  for (const shape of presetShapes('prefill')) assert.is(shape.kind, 'prefill');
  const chunks = presetShapes('chunk');
  for (const shape of chunks) assert.ok(shape.kind === 'chunk' && shape.form === 'auto' && shape.kvLens.every((len, i) => len >= (shape.qLens[i] as number)));
  assert.equal([...new Set(chunks.map((shape) => shape.kind === 'chunk' && shape.kvDType))], ['bf16', 'fp8']);
  assert.equal(presetShapes('pod').map((shape) => shape.kind === 'pod' && [shape.prefill.kvLens[0], shape.decode.kvLens.length]).slice(0, 3), [[2048, 128], [8192, 128], [8192, 128]]);
});

test('what cannot be meant is refused, saying where and what is taken', () => {
  assert.is(refusal({ heads: 1 }), 'here: give kv_len, or kv_lens for sequences of different lengths');
  assert.is(refusal({ kv_len: 1, latnet: 256 }), 'here: a decode shape has no field latnet; did you mean latent?');
  assert.match(refusal({ kind: 'prefill', kv_len: 1, latent: 256 }), /a prefill shape has no field latent; it has kind, key_dim/);
  assert.is(refusal({ kv_len: 1, heads: '12.5' }), 'here: heads is "12.5"; it takes an integer of at least 1');
  assert.is(refusal({ kv_lens: '5;x' }), 'here: kv_lens is "x"; it takes an integer of at least 0');
  assert.is(refusal({ kv_lens: '5;6', batch: 3 }), 'here: batch is 3, but kv_lens has 2 lengths');
  assert.is(refusal({ kv_lens: '5;6', q_lens: '1' }), 'here: q_lens has 1 lengths for 2 sequences');
  assert.is(refusal({ kv_len: 5, kv_dtype: 'int4' }), 'here: kv_dtype is "int4"; it takes bf16, fp8, f32');
  assert.is(refusal({ kv_len: 5, softcap: -1 }), 'here: softcap is -1; it takes a number of at least 0');
  for (const block_mask of ['64', '64:1.5', '0:0.5', 'x:1']) assert.match(refusal({ kv_len: 5, block_mask }), /block_mask is .* such as 128:0\.25/);
  assert.match(refusal({ kind: 'prefill', kv_len: 5, window: 3 }), /a prefill shape has no field window/);
  assert.match(refusal({ kv_heads: 2, kv_len: 5, latent: 256 }), /a gqa shape has no field latent; it has kind, head_dim/);
  assert.match(refusal({ kind: 'chunk', kv_len: 5, window: 3 }), /a chunk shape has no field window/);
  assert.is(refusal({ kind: 'chunk', kv_len: 5, form: 'both' }), 'here: form is "both"; it takes auto, absorbed, unabsorbed');
  assert.match(refusal({ kv_len: 5, form: 'absorbed' }), /a decode shape has no field form/);
  assert.is(refusal({ kv_len: 5, causal: 'maybe' }), 'here: causal is "maybe"; it takes true or false');
});

test('a chunk is the same work in either form', () => {
  const work = (fields: Record<string, unknown>) => workOfShape(shapeFromFields({ kind: 'chunk', kv_len: 900, q_tokens: 40, ...fields }, 'here'));
  assert.is(work({ form: 'absorbed' }), work({ form: 'unabsorbed', path: 'sm80', page: 16 }));
  assert.is.not(work({ kv_dtype: 'fp8' }), work({}));
  assert.is.not(work({ causal: false }), work({}));
});

test('equal work is equal whatever the page, the kernel, or how the lengths were written', () => {
  const work = (fields: Record<string, unknown>) => workOfShape(shapeFromFields(fields, 'here'));
  assert.is(work({ batch: 2, kv_len: 7, page: 16, path: 'sm80', causal: false }), work({ kv_lens: '7;7', q_lens: '1;1' }));
  assert.is.not(work({ kv_len: 7, q_tokens: 2, causal: false }), work({ kv_len: 7, q_tokens: 2 }));
  assert.is.not(work({ kv_len: 7, kv_dtype: 'fp8' }), work({ kv_len: 7 }));
  assert.is.not(work({ kv_len: 7, window: 3 }), work({ kv_len: 7 }));
  assert.is(work({ kv_len: 7, kv_heads: 8, kv_layout: 'hnd' }), work({ kv_len: 7, kind: 'gqa', page: 16 }));
});

test('a pod shape is a prefill and a decode shape, each with fields of its own', () => {
  const fields = { kind: 'pod', heads: 16, batch: 2, kv_len: 100, latent: 256, prefill_heads: 4, prefill_kv_lens: '70;9', prefill_q_tokens: 9, path: 'sm90', decode_sms: 40 };
  const shape = shapeFromFields(fields, 'here');
  assert.equal(shape, {
    kind: 'pod',
    prefill: shapeFromFields({ kind: 'prefill', heads: 4, kv_lens: [70, 9], q_tokens: 9, path: 'sm90' }, 'here'),
    decode: shapeFromFields({ heads: 16, batch: 2, kv_len: 100, latent: 256, path: 'sm90' }, 'here'),
    decodeSms: 40,
  });
  assert.equal(shapeFromFields(fieldsOfShape(shape), 'again'), shape);
  const [prefill, decode] = [{ kind: 'prefill', heads: 4, kv_lens: [70, 9], q_tokens: 9 }, { heads: 16, batch: 2, kv_len: 100, latent: 256 }].map((one) => costOfShape(shapeFromFields(one, 'here')));
  assert.equal(costOfShape(shape), { bytes: prefill!.bytes + decode!.bytes, flops: prefill!.flops + decode!.flops });
  assert.is(refusal({ kind: 'pod', kv_len: 5 }), 'here, prefill: give kv_len, or kv_lens for sequences of different lengths');
  assert.match(refusal({ kind: 'pod', kv_len: 5, prefill_kv_len: 5, prefill_heds: 1 }), /a pod shape has no field prefill_heds; did you mean prefill_heads\?/);
});

test('flags with lists stand for every combination, after presets', () => {
  const shapes = selectShapes(['thundermla'], [], { heads: '8,16', 'kv-len': '64', 'q-tokens': '1,2', causal: false }, 'sm80');
  assert.is(shapes.length, 5 + 4);
  assert.equal(shapes.slice(5).filter(isDecode).map(({ heads, qLens, causal, path }) => [heads, qLens[0], causal, path]), [[8, 1, false, 'sm80'], [8, 2, false, 'sm80'], [16, 1, false, 'sm80'], [16, 2, false, 'sm80']]);
  assert.throws(() => selectShapes([], [], {}, 'auto'), /name what to run: --preset flashmla/);
});

test.run();
