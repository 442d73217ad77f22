import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { loadCheckpoint, type Checkpoint } from '../../src/model/checkpoint.js';
import type { ModelSpec } from '../../src/model/spec.js';
import { native as loadNative } from '../../src/native/loader.js';
import type { DecodeItem, Engine, EngineOptions, KvArena, KvLayout, Weights } from '../../src/native/types.js';
import { TINY_V2, TINY_V3, writeCheckpoint, type GeneratedCheckpoint } from '../support/checkpoint.js';
import { ReferenceModel, type ReferenceAttention } from '../support/reference_model.js';

const native = loadNative();
const root = mkdtempSync(join(tmpdir(), 'tpla-engine-'));
test.after(() => rmSync(root, { recursive: true, force: true }));

const PAGE = 16;
const PAGES = 64;

interface Loaded {
  checkpoint: Checkpoint;
  spec: ModelSpec;
  weights: Weights;
}

let made = 0;
function load(options: GeneratedCheckpoint = {}): Loaded {
  const dir = join(root, `model-${made++}`);
  writeCheckpoint(dir, options);
  const checkpoint = loadCheckpoint(dir);
  return { checkpoint, spec: checkpoint.spec, weights: new native.Weights(checkpoint.files, checkpoint.tensors) };
}

function arenaFor(spec: ModelSpec, fields: Partial<KvLayout> = {}): KvArena {
  return new native.KvArena(
    { form: 'mla', ranks: 1, layers: spec.layers, latent: spec.kvLoraRank, rope: spec.qkRopeHeadDim, shared: 0, dtype: 'f32', pageTokens: PAGE, ...fields },
    PAGES,
  );
}

function reference({ spec, weights, checkpoint }: Loaded): ReferenceModel {
  const fp8 = new Set(checkpoint.tensors.filter((tensor) => tensor.dtype === 'F8_E4M3').map((tensor) => tensor.name));
  return new ReferenceModel(spec, weights, fp8);
}

function prompt(length: number, vocab: number, seed = 1): Int32Array {
  let state = seed;
  return Int32Array.from({ length }, () => (state = (state * 1103515245 + 12345) % 2147483648) % vocab);
}

/** Pages in an order that no layout would choose by itself. */
function scattered(count: number, offset = 0): Int32Array {
  return Int32Array.from({ length: count }, (_, i) => (i * 7 + 3 + offset) % PAGES);
}

/** Largest difference relative to the largest magnitude of the expected row. */
function distance(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let worst = 0;
  let top = 0;
  for (let i = 0; i < expected.length; i++) {
    worst = Math.max(worst, Math.abs(actual[i]! - expected[i]!));
    top = Math.max(top, Math.abs(expected[i]!));
    if (Number.isNaN(actual[i]!)) return NaN;
  }
  return worst / top;
}

async function codeOf(run: () => unknown): Promise<string | undefined> {
  try {
    await run();
  } catch (error) {
    return (error as { code?: string }).code;
  }
  return undefined;
}

async function prefillAll(engine: Engine, tokens: Int32Array, pages: Int32Array, chunk = tokens.length): Promise<Float32Array[]> {
  const rows: Float32Array[] = [];
  for (let at = 0; at < tokens.length; at += chunk) {
    const part = tokens.slice(at, at + chunk);
    const [logits] = await engine.prefill([{ tokens: part, position: at, pages, logits: 'all' }]);
    const vocab = logits!.length / part.length;
    for (let i = 0; i < part.length; i++) rows.push(logits!.slice(i * vocab, (i + 1) * vocab));
  }
  return rows;
}

/** Page tables of one sequence in every form, disjoint between sequences of up to `stride` pages. */
function tables(layout: KvLayout, tokens: number, sequence: number, stride: number): { pages: Int32Array[]; rank?: number } {
  const pages = Math.ceil(tokens / layout.pageTokens);
  const at = sequence * stride * 7;
  if (layout.form === 'dcp') return { pages: Array.from({ length: layout.ranks }, (_, rank) => scattered(Math.ceil(pages / layout.ranks), rank + at)) };
  if (layout.form === 'dp') return { pages: [scattered(pages, at)], rank: sequence % layout.ranks };
  return { pages: [scattered(pages, at)] };
}

/** Feeds tokens one at a time through decode; rows of logits per sequence. */
async function decodeAll(engine: Engine, layout: KvLayout, sequences: Int32Array[], vocab: number): Promise<Float32Array[][]> {
  const longest = Math.max(...sequences.map((tokens) => tokens.length));
  const held = sequences.map((tokens, i) => tables(layout, tokens.length, i, Math.ceil(longest / layout.pageTokens)));
  const rows: Float32Array[][] = sequences.map(() => []);
  for (let position = 0; position < longest; position++) {
    const active = sequences.map((_, i) => i).filter((i) => position < sequences[i]!.length);
    const items: DecodeItem[] = active.map((i) => ({ token: sequences[i]![position]!, position, ...held[i]! }));
    const logits = await engine.decode(items);
    active.forEach((i, row) => rows[i]!.push(logits.slice(row * vocab, (row + 1) * vocab)));
  }
  return rows;
}

function withEngine<T>(loaded: Loaded, arena: KvArena, options: Partial<EngineOptions>, body: (engine: Engine) => Promise<T>): Promise<T> {
  const engine = new native.Engine({ spec: loaded.spec, weights: loaded.weights, arena, threads: 2, ...options });
  return body(engine).finally(() => engine.close());
}

const SMALL_GROUPS = { ...TINY_V2, n_group: 4, topk_group: 2, topk_method: 'group_limited_greedy', routed_scaling_factor: 1.7, q_lora_rank: 24 };
const CHECKPOINTS: [string, GeneratedCheckpoint, number][] = [
  ['V3: q_lora, YaRN, noaux_tc, fp32', { config: TINY_V3, dtype: 'F32' }, 2e-5],
  ['V3, bf16', { config: TINY_V3, dtype: 'BF16' }, 2e-5],
  ['V3, fp16', { config: TINY_V3, dtype: 'F16' }, 2e-5],
  ['V3, fp8 blocks', { config: { ...TINY_V3, hidden_size: 192, intermediate_size: 160, moe_intermediate_size: 144 }, dtype: 'F8_E4M3' }, 2e-5],
  ['V2-Lite: no q_lora, greedy softmax gate', { config: TINY_V2, dtype: 'BF16' }, 2e-5],
  ['V2: group-limited gate', { config: SMALL_GROUPS, dtype: 'BF16' }, 2e-5],
  ['tied embeddings, half-split rope, odd sizes', { config: { ...TINY_V3, tie_word_embeddings: true, rope_interleave: false, v_head_dim: 12, qk_nope_head_dim: 20, kv_lora_rank: 40, hidden_size: 72, vocab_size: 333 }, dtype: 'BF16' }, 2e-5],
];

for (const [name, options, tolerance] of CHECKPOINTS) {
  test(`prefill equals the float64 reference: ${name}`, async () => {
    const loaded = load(options);
    const tokens = prompt(37, loaded.spec.vocabSize);
    const model = reference(loaded);
    const expected = [...tokens].map((token) => model.step(token));
    await withEngine(loaded, arenaFor(loaded.spec), {}, async (engine) => {
      const rows = await prefillAll(engine, tokens, scattered(3));
      rows.forEach((row, i) => assert.ok(distance(row, expected[i]!) < tolerance, `row ${i}: ${distance(row, expected[i]!)}`));
    });
  });
}

test('every instruction set gives the same logits, in prefill and in decode', async () => {
  const loaded = load({ config: { ...TINY_V3, hidden_size: 200, kv_lora_rank: 72 }, dtype: 'BF16' });
  const tokens = prompt(70, loaded.spec.vocabSize);
  const model = reference(loaded);
  const expected = [...tokens].map((token) => model.step(token));
  let tried = 0;
  for (const isa of ['portable', 'blas', 'avx2', 'avx512', 'avx512_bf16', 'amx']) {
    const arena = arenaFor(loaded.spec);
    let engine: Engine;
    try {
      engine = new native.Engine({ spec: loaded.spec, weights: loaded.weights, arena, threads: 2, isa });
    } catch (error) {
      assert.is((error as { code: string }).code, 'CONFIG_INVALID');
      continue;
    }
    tried++;
    const rows = await prefillAll(engine, tokens.slice(0, 50), scattered(5));
    rows.forEach((row, i) => assert.ok(distance(row, expected[i]!) < 2e-5, `${isa} row ${i}: ${distance(row, expected[i]!)}`));
    for (let position = 50; position < 70; position++) {
      const logits = await engine.decode([{ token: tokens[position]!, position, pages: [scattered(5)] }]);
      assert.ok(distance(logits, expected[position]!) < 2e-5, `${isa} decode ${position}: ${distance(logits, expected[position]!)}`);
    }
    engine.close();
  }
  assert.ok(tried >= 1);
  assert.is(await codeOf(() => new native.Engine({ spec: loaded.spec, weights: loaded.weights, arena: arenaFor(loaded.spec), threads: 1, isa: 'sse9' })), 'CONFIG_INVALID');
});

test('bf16 activations stay close, on every kind of bf16 hardware', async () => {
  // Dense: a rounding difference must not choose another expert.
  const loaded = load({ config: { ...TINY_V3, n_routed_experts: null, hidden_size: 200 }, dtype: 'F32' });
  const tokens = prompt(70, 320);
  const model = reference(loaded);
  const expected = [...tokens].map((token) => model.step(token));
  const cases: [string, 'bf16' | 'bf16x2', number, number][] = [
    ['avx2', 'bf16', 0, 2e-5],
    ['avx512_bf16', 'bf16', 1e-4, 3e-2],
    ['amx', 'bf16', 1e-4, 3e-2],
    ['amx', 'bf16x2', 0, 1e-4],
  ];
  for (const [isa, activations, least, most] of cases) {
    const options: EngineOptions = { spec: loaded.spec, weights: loaded.weights, arena: arenaFor(loaded.spec), threads: 2, isa, activations };
    if ((await codeOf(() => new native.Engine(options).close())) === 'CONFIG_INVALID') continue;
    const rows = await withEngine(loaded, options.arena, options, (engine) => prefillAll(engine, tokens, scattered(5)));
    const worst = Math.max(...rows.map((row, i) => distance(row, expected[i]!)));
    assert.ok(worst >= least && worst < most, `${isa} ${activations}: ${worst}`);
  }
  assert.is(await codeOf(() => new native.Engine({ spec: loaded.spec, weights: loaded.weights, arena: arenaFor(loaded.spec), threads: 1, activations: 'fp8' as 'bf16' })), 'REQUEST_INVALID');
});

test('chunks, batches and threads change nothing', async () => {
  const loaded = load();
  const lengths = [1, 5, 64, 100, 17];
  const prompts = lengths.map((length, i) => prompt(length, loaded.spec.vocabSize, i + 1));
  const pagesOf = (i: number): Int32Array => Int32Array.from({ length: 8 }, (_, j) => i * 8 + ((j * 5) % 8));
  const whole = await withEngine(loaded, arenaFor(loaded.spec), { threads: 1 }, async (engine) => {
    const results: Float32Array[][] = [];
    for (let i = 0; i < prompts.length; i++) results.push(await prefillAll(engine, prompts[i]!, pagesOf(i)));
    return results;
  });
  for (const threads of [1, 3]) {
    const batched = await withEngine(loaded, arenaFor(loaded.spec), { threads }, (engine) =>
      engine.prefill(prompts.map((tokens, i) => ({ tokens, position: 0, pages: pagesOf(i), logits: 'all' as const }))));
    batched.forEach((logits, i) => assert.ok(distance(logits, Float32Array.from(whole[i]!.flatMap((row) => [...row]))) < 1e-5));
    const chunked = await withEngine(loaded, arenaFor(loaded.spec), { threads }, (engine) => prefillAll(engine, prompts[3]!, pagesOf(3), 23));
    chunked.forEach((row, i) => assert.ok(distance(row, whole[3]![i]!) < 1e-5));
  }
});

test("logits: 'none' and 'last' compute what 'all' does", async () => {
  const loaded = load();
  const [a, b, c] = [prompt(20, 320, 1), prompt(30, 320, 2), prompt(9, 320, 3)];
  await withEngine(loaded, arenaFor(loaded.spec), {}, async (engine) => {
    const pages = [scattered(2), scattered(2, 14), scattered(2, 28)];
    const all = await engine.prefill([a, b, c].map((tokens, i) => ({ tokens, position: 0, pages: pages[i]!, logits: 'all' as const })));
    const some = await engine.prefill([
      { tokens: a, position: 0, pages: pages[0]!, logits: 'none' },
      { tokens: b, position: 0, pages: pages[1]!, logits: 'last' },
      { tokens: c, position: 0, pages: pages[2]!, logits: 'all' },
    ]);
    assert.is(some[0]!.length, 0);
    assert.ok(distance(some[1]!, all[1]!.slice(-320)) < 1e-5);
    assert.ok(distance(some[2]!, all[2]!) < 1e-5);
    assert.equal((await engine.prefill([{ tokens: a, position: 0, pages: pages[0]!, logits: 'none' }])).map((row) => row.length), [0]);
  });
});

const FORMS: Partial<KvLayout>[] = [
  { form: 'mla', ranks: 1 },
  { form: 'mla', ranks: 3 },
  { form: 'tpla', ranks: 1 },
  { form: 'dcp', ranks: 1 },
  { form: 'dcp', ranks: 2 },
  { form: 'dcp', ranks: 3 },
  { form: 'dp', ranks: 2 },
];

for (const [name, config] of [['V3', TINY_V3], ['V2', TINY_V2]] as const) {
  test(`exact decode forms equal the reference: ${name}`, async () => {
    const loaded = load({ config });
    const sequences = [prompt(75, 320, 1), prompt(40, 320, 2), prompt(3, 320, 3)];
    const expected = sequences.map((tokens) => {
      const model = reference(loaded);
      return [...tokens].map((token) => model.step(token));
    });
    for (const fields of FORMS) {
      const arena = arenaFor(loaded.spec, fields);
      const rows = await withEngine(loaded, arena, { threads: 3 }, (engine) => decodeAll(engine, arena.layout, sequences, 320));
      rows.forEach((sequence, s) =>
        sequence.forEach((row, i) => assert.ok(distance(row, expected[s]![i]!) < 2e-5, `${fields.form} ${fields.ranks} row ${i}: ${distance(row, expected[s]![i]!)}`)));
    }
  });
}

test('batches of decode larger than the streaming kernels take give the same rows', async () => {
  const loaded = load();
  const sequences = Array.from({ length: 21 }, (_, i) => prompt(6 + (i % 3), 320, i + 1));
  for (const fields of [{ form: 'mla', ranks: 1 }, { form: 'dcp', ranks: 2 }, { form: 'tpla', ranks: 2 }] as Partial<KvLayout>[]) {
    const arena = arenaFor(loaded.spec, fields);
    await withEngine(loaded, arena, {}, async (engine) => {
      const together = await decodeAll(engine, arena.layout, sequences, 320);
      for (const i of [0, 20]) {
        const [alone] = await decodeAll(engine, arena.layout, [sequences[i]!], 320);
        alone!.forEach((row, t) => assert.ok(distance(row, together[i]![t]!) < 1e-5));
      }
    });
  }
});

test('tpla with slices equals its own definition, shared subspace included', async () => {
  const loaded = load();
  const tokens = prompt(40, 320, 5);
  for (const [ranks, shared] of [[2, 0], [2, 8], [4, 16], [2, [0, 32, 8]]] as const) {
    const attention: ReferenceAttention = { form: 'tpla', ranks, shared };
    const model = reference(loaded);
    const expected = [...tokens].map((token) => model.step(token, attention));
    const arena = arenaFor(loaded.spec, { form: 'tpla', ranks, shared });
    const [rows] = await withEngine(loaded, arena, {}, (engine) => decodeAll(engine, arena.layout, [tokens], 320));
    rows!.forEach((row, i) => assert.ok(distance(row, expected[i]!) < 2e-5, `g=${ranks} s=${shared} row ${i}: ${distance(row, expected[i]!)}`));
  }
});

const REPARAMETERISED: [string, object][] = [
  ['transform', { groups: 2, shared: 0, transform: true }],
  ['matrices per rank, shared subspace', { groups: 2, shared: 8, rank_weights: true }],
  ['transform and matrices per rank', { groups: 4, shared: 16, transform: true, rank_weights: true }],
  ['matrices per rank, a width for every layer, one of them whole', { groups: 2, shared: [8, 32, 0], transform: true, rank_weights: true }],
  ['sliced norm', { groups: 2, shared: 8, norm: 'sliced', norm_scale: [[0.9, 1.1], [1.05, 0.97], [1.2, 0.8]] }],
];

for (const [name, section] of REPARAMETERISED) {
  test(`reparameterised checkpoints: prefill is exact MLA, decode is the ranks' approximation: ${name}`, async () => {
    const loaded = load({ config: { ...TINY_V3, tpla: { fingerprint: name, ...section } } });
    const { groups: ranks, shared } = loaded.spec.tpla!;
    const tokens = prompt(48, 320, 3);
    const exact = reference(loaded);
    const expected = [...tokens].map((token) => exact.step(token));
    await withEngine(loaded, arenaFor(loaded.spec), {}, async (engine) => {
      const rows = await prefillAll(engine, tokens, scattered(3));
      rows.forEach((row, i) => assert.ok(distance(row, expected[i]!) < 2e-5, `prefill row ${i}: ${distance(row, expected[i]!)}`));
      const logits = await engine.decode([{ token: tokens[47]!, position: 47, pages: [scattered(3)] }]);
      assert.ok(distance(logits, expected[47]!) < 2e-5, 'one rank decodes exactly');
    });
    const sliced = reference(loaded);
    const approximate = [...tokens].map((token) => sliced.step(token, { form: 'tpla', ranks, shared }));
    assert.ok(distance(approximate[47]!, expected[47]!) > 1e-3, 'slicing must make a difference');
    const arena = arenaFor(loaded.spec, { form: 'tpla', ranks, shared });
    const [rows] = await withEngine(loaded, arena, {}, (engine) => decodeAll(engine, arena.layout, [tokens], 320));
    rows!.forEach((row, i) => assert.ok(distance(row, approximate[i]!) < 2e-5, `decode row ${i}: ${distance(row, approximate[i]!)}`));
  });
}

test('an arena of other widths than the checkpoint\'s matrices is refused, and which layer it is', () => {
  const loaded = load({ config: { ...TINY_V3, tpla: { fingerprint: 'x', groups: 2, shared: [8, 32, 0], transform: true, rank_weights: true } } });
  for (const [shared, layer] of [[8, 1], [[8, 32, 16], 2], [[0, 32, 8], 0]] as const) {
    const arena = arenaFor(loaded.spec, { form: 'tpla', ranks: 2, shared });
    assert.throws(() => new native.Engine({ spec: loaded.spec, weights: loaded.weights, arena, threads: 1 }), new RegExp(`a shared width in layer ${layer} of`));
    arena.close();
  }
});

test('tpla with the softmax gathered equals mla: the slicing itself is right', async () => {
  const loaded = load();
  const sequences = [prompt(50, 320, 1), prompt(20, 320, 2)];
  const expected = sequences.map((tokens) => {
    const model = reference(loaded);
    return [...tokens].map((token) => model.step(token));
  });
  for (const [ranks, shared] of [[2, 0], [2, 8], [4, 0], [2, [16, 0, 32]]] as const) {
    const arena = arenaFor(loaded.spec, { form: 'tpla', ranks, shared });
    const rows = await withEngine(loaded, arena, { exactSoftmax: true }, (engine) => decodeAll(engine, arena.layout, sequences, 320));
    rows.forEach((sequence, s) => sequence.forEach((row, i) => assert.ok(distance(row, expected[s]![i]!) < 2e-5, `g=${ranks} s=${shared} row ${i}`)));
  }
});

test('decode continues what prefill wrote', async () => {
  // Dense: a rounding difference must not choose another expert.
  const loaded = load({ config: { ...TINY_V3, n_routed_experts: null } });
  const tokens = prompt(60, 320, 9);
  const model = reference(loaded);
  const expected = [...tokens].map((token) => model.step(token));
  for (const [dtype, tolerance] of [['f32', 2e-5], ['bf16', 2e-2], ['fp8', 2e-1]] as const) {
    const arena = arenaFor(loaded.spec, { dtype });
    await withEngine(loaded, arena, {}, async (engine) => {
      await engine.prefill([{ tokens: tokens.slice(0, 45), position: 0, pages: scattered(4), logits: 'none' }]);
      for (let position = 45; position < 60; position++) {
        const logits = await engine.decode([{ token: tokens[position]!, position, pages: [scattered(4)] }]);
        assert.ok(distance(logits, expected[position]!) < tolerance, `${dtype} ${position}: ${distance(logits, expected[position]!)}`);
      }
    });
  }
});

test('onLayer fires in order, before the result; the KV of that layer is there', async () => {
  const loaded = load();
  const arena = arenaFor(loaded.spec);
  const events: string[] = [];
  await withEngine(loaded, arena, {}, async (engine) => {
    await engine.prefill([{ tokens: prompt(20, 320), position: 0, pages: Int32Array.of(4, 9), logits: 'last' }], (layer) => {
      events.push(`layer ${layer} ${arena.page(0, layer, 9).some((byte) => byte !== 0)}`);
    });
    events.push('done');
  });
  assert.equal(events, ['layer 0 true', 'layer 1 true', 'layer 2 true', 'done']);
});

test('calls queue in order and never block the event loop', async () => {
  const loaded = load();
  const arena = arenaFor(loaded.spec);
  await withEngine(loaded, arena, {}, async (engine) => {
    const order: number[] = [];
    const calls = Array.from({ length: 8 }, (_, i) => engine.prefill([{ tokens: prompt(30, 320, i), position: 0, pages: Int32Array.of(2 * i, 2 * i + 1), logits: 'last' }]).then(() => order.push(i)));
    assert.is(order.length, 0);
    await Promise.all(calls);
    assert.equal(order, [0, 1, 2, 3, 4, 5, 6, 7]);
  });
});

test('a cancelled prefill stops with CANCELLED and later calls work', async () => {
  const loaded = load();
  const arena = arenaFor(loaded.spec);
  await withEngine(loaded, arena, {}, async (engine) => {
    const flag = new Int32Array(new SharedArrayBuffer(4));
    Atomics.store(flag, 0, 1);
    assert.is(await codeOf(() => engine.prefill([{ tokens: prompt(30, 320), position: 0, pages: scattered(2), logits: 'last' }], undefined, flag)), 'CANCELLED');
    Atomics.store(flag, 0, 0);
    const [row] = await engine.prefill([{ tokens: prompt(30, 320), position: 0, pages: scattered(2), logits: 'last' }], undefined, flag);
    assert.is(row!.length, 320);
  });
});

test('close() fails what is queued and refuses what comes later', async () => {
  const loaded = load();
  const arena = arenaFor(loaded.spec);
  const engine = new native.Engine({ spec: loaded.spec, weights: loaded.weights, arena, threads: 1 });
  const calls = Array.from({ length: 20 }, () => codeOf(() => engine.prefill([{ tokens: prompt(64, 320), position: 0, pages: scattered(4), logits: 'all' }])));
  engine.close();
  const codes = await Promise.all(calls);
  assert.ok(codes.includes('CANCELLED'));
  assert.ok(codes.every((code) => code === undefined || code === 'CANCELLED'));
  assert.is(await codeOf(() => engine.decode([])), 'REQUEST_INVALID');
});

test('what would touch memory out of bounds is refused', async () => {
  const loaded = load();
  const arena = arenaFor(loaded.spec);
  const pages = scattered(2);
  const tokens = prompt(20, 320);
  await withEngine(loaded, arena, {}, async (engine) => {
    const refused = async (item: object): Promise<void> => assert.is(await codeOf(() => engine.prefill([{ tokens, position: 0, pages, logits: 'last', ...item }])), 'REQUEST_INVALID', JSON.stringify(item));
    await refused({ pages: scattered(1) });
    await refused({ pages: Int32Array.of(0, PAGES) });
    await refused({ pages: Int32Array.of(0, -1) });
    await refused({ position: 16 });
    await refused({ position: -1 });
    await refused({ position: 0.5 });
    await refused({ tokens: Int32Array.of(320) });
    await refused({ tokens: Int32Array.of(-1) });
    await refused({ tokens: new Int32Array(0) });
    await refused({ tokens: [1, 2] });
    await refused({ logits: 'some' });
    assert.is(await codeOf(() => engine.prefill([])), 'REQUEST_INVALID');
    assert.is(await codeOf(() => engine.prefill(undefined as never)), 'REQUEST_INVALID');
    assert.is(await codeOf(() => engine.prefill([{ tokens, position: 4090, pages: new Int32Array(300), logits: 'last' }])), 'CONTEXT_LENGTH_EXCEEDED');
    const decode = async (item: object): Promise<void> => assert.is(await codeOf(() => engine.decode([{ token: 1, position: 3, pages: [pages], ...item }])), 'REQUEST_INVALID', JSON.stringify(item));
    await decode({ token: 320 });
    await decode({ position: 40 });
    await decode({ pages: [] });
    await decode({ pages: [Int32Array.of(PAGES)] });
    await decode({ pages: pages });
    await decode({ position: 2 ** 31 });
  });
  const dcp = arenaFor(loaded.spec, { form: 'dcp', ranks: 2 });
  await withEngine(loaded, dcp, {}, async (engine) => {
    assert.is(await codeOf(() => engine.prefill([{ tokens, position: 0, pages, logits: 'last' }])), 'REQUEST_INVALID');
    assert.is(await codeOf(() => engine.decode([{ token: 1, position: 16, pages: [Int32Array.of(1)] }])), 'REQUEST_INVALID');
    assert.is(await codeOf(() => engine.decode([{ token: 1, position: 16, pages: [Int32Array.of(1), new Int32Array(0)] }])), 'REQUEST_INVALID');
  });
  const dp = arenaFor(loaded.spec, { form: 'dp', ranks: 2 });
  await withEngine(loaded, dp, {}, async (engine) => {
    assert.is(await codeOf(() => engine.decode([{ token: 1, position: 0, pages: [Int32Array.of(1)], rank: 2 }])), 'REQUEST_INVALID');
  });
});

test('an arena or checkpoint that does not fit the model is refused', async () => {
  const loaded = load();
  const { spec, weights } = loaded;
  const make = (fields: Partial<EngineOptions>): Promise<string | undefined> => codeOf(() => new native.Engine({ spec, weights, arena: arenaFor(spec), threads: 1, ...fields }));
  assert.is(await make({ arena: arenaFor(spec, { layers: 2 }) }), 'REQUEST_INVALID');
  assert.is(await make({ arena: arenaFor(spec, { latent: 64 }) }), 'REQUEST_INVALID');
  assert.is(await make({ arena: {} as KvArena }), 'REQUEST_INVALID');
  assert.is(await make({ weights: arenaFor(spec) as never }), 'REQUEST_INVALID');
  assert.is(await make({ exactSoftmax: true }), 'REQUEST_INVALID');
  assert.is(await make({ spec: { ...spec, heads: 0 } }), 'REQUEST_INVALID');
  assert.is(await make({ spec: { ...spec, moe: { ...spec.moe!, topK: 9 } } }), 'REQUEST_INVALID');
  assert.is(await make({ spec: { ...spec, hiddenSize: 128 } }), 'CHECKPOINT_INVALID');
  assert.is(await make({ spec: { ...spec, layers: 4 }, arena: arenaFor(spec, { layers: 4 }) }), 'CHECKPOINT_INVALID');
});

test.run();
