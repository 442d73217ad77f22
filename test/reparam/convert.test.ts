// time limit: 400 s
/** Conversions of small random checkpoints: prefill stays what it was, decode loads, interruptions and bad input end cleanly. */
import { spawn } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import { Runner } from '../../src/eval/runner.js';
import { loadCheckpoint } from '../../src/model/checkpoint.js';
import type { JsonObject } from '../../src/model/config.js';
import { readSafetensors } from '../../src/model/safetensors.js';
import { convert, type ConversionOptions } from '../../src/reparam/convert.js';
import type { Device } from '../../src/reparam/device.js';
import { METHODS, type Method } from '../../src/reparam/method.js';
import { SILENT } from '../../src/report/progress.js';
import { TINY_V2, TINY_V3, writeCheckpoint } from '../support/checkpoint.js';
import { writeTokenizer } from '../support/tokenizer.js';

const test = suite('reparam/convert');
const root = mkdtempSync(join(tmpdir(), 'tpla-convert-'));
const source = join(root, 'source');
const text = join(root, 'text.txt');
test.before(() => {
  writeCheckpoint(source, { dtype: 'F32', shards: 3, extra: [{ name: 'model.layers.3.eh_proj.weight', dtype: 'I64', shape: [2], data: Uint8Array.from({ length: 16 }, (_, i) => i) }] });
  writeTokenizer(source);
  writeFileSync(text, Array.from({ length: 400 }, (_, i) => `Line ${i} of the inner text: ${(i * 7919) % 1000} there.`).join('\n'));
});
test.after(() => rmSync(root, { recursive: true }));

let outs = 0;
function options(method: Partial<Method> & { name?: string }, change: Partial<ConversionOptions> = {}): ConversionOptions {
  const { name = 'pca', ...parts } = method;
  return {
    model: source, out: join(root, `out-${outs++}`), methodName: name, method: { ...METHODS[name]!, ...parts }, widths: null, groups: 2,
    calibration: { file: text, context: 96, tokens: 1536, queries: 24, seed: 1 }, output: 'auto', seed: 1, device: 'cpu', threads: 2, ...change,
  };
}

const TOKENS = Int32Array.from({ length: 70 }, (_, i) => (i * 37) % 250);

async function logits(dir: string, form: 'mla' | 'tpla', phase: 'prefill' | 'decode', ranks = 2): Promise<Float32Array> {
  const checkpoint = loadCheckpoint(dir);
  const runner = new Runner(checkpoint, { form, ranks: form === 'tpla' ? ranks : 1, dtype: 'f32', context: 128, batch: 1, threads: 2 });
  try {
    if (phase === 'prefill') return (await runner.prefill([TOKENS], 'all'))[0]!.slice(-checkpoint.spec.vocabSize);
    await runner.prefill([TOKENS.subarray(0, 69)], 'none');
    await runner.handOver([69]);
    return await runner.step([{ slot: 0, token: TOKENS[69]!, position: 69 }]);
  } finally {
    runner.close();
  }
}

function difference(a: Float32Array, b: Float32Array): number {
  const scale = Math.max(...b.map(Math.abs));
  return Math.max(...a.map((x, i) => Math.abs(x - b[i]!))) / scale;
}

for (const [what, method] of [
  ['identity', { name: 'identity' }], ['hadamard', { name: 'hadamard' }], ['pca with fitted scales', { scale: 'fitted' }],
  ['aware, regressed, ridge, refined, shared', { name: 'default', shared: 8, refine: 10 }], ['oblique', { basis: 'aware-oblique', queries: 'regressed', values: 'ridge' }],
] as [string, Partial<Method>][]) {
  test(`${what}: prefill is the model that went in, decode is near it`, async () => {
    const plan = options(method);
    await convert(plan, SILENT);
    const exact = await logits(source, 'mla', 'prefill');
    assert.ok(difference(await logits(plan.out, 'mla', 'prefill'), exact) < 2e-4, 'prefill');
    assert.ok(difference(await logits(plan.out, 'mla', 'decode'), exact) < 2e-4, 'decode, mla');
    const approximate = difference(await logits(plan.out, 'tpla', 'decode'), exact);
    assert.ok(approximate > 1e-6 && approximate < 2, `decode, tpla: ${approximate}`);
  });
}

test('four groups, without q_lora, bf16', async () => {
  const v2 = join(root, 'v2');
  writeCheckpoint(v2, { config: TINY_V2 });
  writeTokenizer(v2);
  const plan = options({ name: 'default', shared: 8, refine: 4 }, { model: v2, groups: 4 });
  const result = await convert(plan, SILENT);
  assert.is(result.kv_values_per_token_per_rank, 8 + 6 + 8);
  assert.ok(difference(await logits(plan.out, 'mla', 'prefill'), await logits(v2, 'mla', 'prefill')) < 0.05);
  assert.ok(Number.isFinite(difference(await logits(plan.out, 'tpla', 'decode', 4), await logits(v2, 'mla', 'prefill'))));
});

test('no experts, no query compression, embeddings tied, odd widths', async () => {
  const dense = join(root, 'dense');
  writeCheckpoint(dense, { config: { ...TINY_V2, first_k_dense_replace: TINY_V2.num_hidden_layers!, tie_word_embeddings: true, num_attention_heads: 3, num_key_value_heads: 3, qk_nope_head_dim: 12, v_head_dim: 20 }, dtype: 'F32' });
  writeTokenizer(dense);
  const plan = options({ name: 'default', refine: 6 }, { model: dense });
  const result = await convert(plan, SILENT);
  assert.ok(difference(await logits(plan.out, 'mla', 'prefill'), await logits(dense, 'mla', 'prefill')) < 2e-4);
  assert.ok(Number.isFinite(difference(await logits(plan.out, 'tpla', 'decode'), await logits(dense, 'mla', 'prefill'))));
  assert.is(result.device, 'cpu');
  assert.match(result.layers[0]!.fitted_on, /2 threads$/);
  for (const stage of ['capture', 'statistics', 'regress', 'descend', 'shards'] as const) assert.type(result.stage_seconds[stage], 'number', stage);
});

test('descent that makes held-out text worse is not kept', async () => {
  const plan = options({ name: 'default', refine: 400 });
  const closed = await convert(options({ name: 'default', refine: 0 }), SILENT);
  const refined = await convert(plan, SILENT);
  refined.layers.forEach(({ output_error, descended }, i) => {
    assert.ok(output_error! <= closed.layers[i]!.output_error! * (1 + 1e-6), `layer ${i}`);
    assert.is(descended, output_error! < closed.layers[i]!.output_error! * (1 - 1e-6));
  });
});

test('fp8 blocks come in; bf16 goes out, or fp8 again', async () => {
  const config: JsonObject = { ...TINY_V3, kv_lora_rank: 128, hidden_size: 256, qk_nope_head_dim: 32, v_head_dim: 32 };
  const fp8 = join(root, 'fp8');
  writeCheckpoint(fp8, { config, dtype: 'F8_E4M3' });
  const exact = await logits(fp8, 'mla', 'prefill');
  const dtypes = (dir: string) => loadCheckpoint(dir).tensors.filter(({ name }) => /layers\.1\.self_attn\.(kv_b|o)_proj\.weight$/.test(name)).map(({ dtype }) => dtype);
  const plain = options({ name: 'hadamard' }, { model: fp8, calibration: null });
  await convert(plain, SILENT);
  assert.equal(dtypes(plain.out), ['BF16', 'F8_E4M3']);
  assert.ok(difference(await logits(plain.out, 'mla', 'prefill'), exact) < 0.05);
  const again = options({ name: 'hadamard' }, { model: fp8, calibration: null, output: 'fp8' });
  await convert(again, SILENT);
  assert.equal(dtypes(again.out), ['F8_E4M3', 'F8_E4M3']);
  assert.ok(difference(await logits(again.out, 'mla', 'prefill'), exact) < 0.3);
});

test('the basis that measures best per layer', async () => {
  const plan = options({ name: 'default', basis: 'best', refine: 0 });
  const result = await convert(plan, SILENT);
  for (const basis of ['aware', 'aware-oblique', 'pca'] as const) {
    const single = await convert(options({ name: 'default', basis, refine: 0 }), SILENT);
    result.layers.forEach((layer, i) => assert.ok(layer.output_error! <= single.layers[i]!.output_error! + 1e-9, `${basis}, layer ${i}`));
  }
});

test('a width for every layer, one of them whole: that layer stays as published, prefill is exact, decode reads such rows', async () => {
  const plan = options({ name: 'default', refine: 6 }, { widths: { byLayer: [8, 32, 0] } });
  const result = await convert(plan, SILENT);
  assert.equal(result.shared, [8, 32, 0]);
  assert.is(result.kv_bytes_per_token_per_rank, (20 + 32 + 16 + 3 * 8) * 2);
  const { spec, tensors, identity } = loadCheckpoint(plan.out);
  assert.equal(spec.tpla!.shared, [8, 32, 0]);
  const widthOf = (layer: number) => tensors.find(({ name }) => name === `model.layers.${layer}.self_attn.tpla.rank1.w_uk`)?.shape[2];
  assert.equal([0, 1, 2].map(widthOf), [20, undefined, 16]);
  const exact = await logits(source, 'mla', 'prefill');
  assert.ok(difference(await logits(plan.out, 'mla', 'prefill'), exact) < 2e-4, 'prefill');
  const approximate = difference(await logits(plan.out, 'tpla', 'decode'), exact);
  assert.ok(approximate > 1e-6 && approximate < 2, `decode, tpla: ${approximate}`);
  const other = options({ name: 'default', refine: 6 }, { widths: { byLayer: [8, 32, 8] } });
  assert.is.not((await convert(other, SILENT)).fingerprint, identity.reparam);
  assert.match((await refusal(options({ name: 'default' }, { widths: { byLayer: [32, 32, 32] } }))).message, 'leaves nothing');
});

test('a budget chooses widths by what decode loses, and keeps one width where that is better', async () => {
  const candidates = [0, 8, 16, 32];
  const bytesPerToken = 3 * (20 + 8) * 2;
  const plan = options({ name: 'default', refine: 0 }, { widths: { budget: { bytesPerToken, candidates } } });
  const result = await convert(plan, SILENT);
  const choice = result.width_choice!;
  assert.ok(result.kv_bytes_per_token_per_rank <= bytesPerToken);
  assert.is(choice.uniform, 8);
  assert.is(choice.losses.length, 3);
  for (const ofLayer of choice.losses) assert.ok(ofLayer.every((loss, i) => (candidates[i] === 32 ? loss === 0 : loss > 0)), ofLayer.join());
  assert.equal(typeof result.shared === 'number' ? new Array<number>(3).fill(result.shared) : result.shared, choice.shared);
  if (choice.kl.chosen > choice.kl.uniform) assert.is(result.shared, 8);
  const manifest = JSON.parse(readFileSync(join(plan.out, 'tpla.json'), 'utf8')) as { width_choice: object; method: { shared: unknown }; layers: { shared: number }[] };
  assert.equal(manifest.width_choice, choice);
  assert.equal(manifest.layers.map(({ shared }) => shared), choice.shared);
  assert.ok(Number.isFinite(difference(await logits(plan.out, 'tpla', 'decode'), await logits(source, 'mla', 'prefill'))));
});

test('what is not touched is copied byte for byte; the manifest tells how it was made', async () => {
  const plan = options({ name: 'default', refine: 4 });
  const { fingerprint } = await convert(plan, SILENT);
  const tensorsOf = (dir: string) => new Map(readdirSync(dir).filter((file) => file.endsWith('.safetensors')).flatMap((file) => {
    const path = join(dir, file);
    const bytes = readFileSync(path);
    return readSafetensors(path).tensors.map(({ name, begin, end }) => [name, bytes.subarray(begin, end)] as const);
  }));
  const [before, after] = [tensorsOf(source), tensorsOf(plan.out)];
  const changed = [...before.keys()].filter((name) => !after.get(name)?.equals(before.get(name)!));
  assert.ok(changed.every((name) => /self_attn\.(kv_b_proj|kv_a_layernorm)\.weight$/.test(name)), changed.join());
  assert.is(changed.length, 2 * 3);
  assert.ok(after.has('model.layers.3.eh_proj.weight'));
  const manifest = JSON.parse(readFileSync(join(plan.out, 'tpla.json'), 'utf8')) as { fingerprint: string; calibration: { sha256: string }; layers: { variance_shares: { slices: number[] } }[] };
  assert.is(manifest.fingerprint, fingerprint);
  assert.is(loadCheckpoint(plan.out).identity.reparam, fingerprint);
  assert.match(manifest.calibration.sha256, /^[0-9a-f]{64}$/);
  assert.ok(Math.abs(manifest.layers[0]!.variance_shares.slices.reduce((a, b) => a + b) - 1) < 1e-6);
  assert.not(existsSync(join(plan.out, '.tpla-reparam')));
  assert.ok(existsSync(join(plan.out, 'tokenizer.json')));
});

test('the sliced norm: one scale per layer and rank', async () => {
  const plan = options({ norm: 'sliced', scale: 'reciprocal' });
  await convert(plan, SILENT);
  const { tpla } = loadCheckpoint(plan.out).spec;
  assert.is(tpla?.norm, 'sliced');
  assert.is(tpla?.normScale.length, 3);
  assert.ok(Number.isFinite(difference(await logits(plan.out, 'tpla', 'decode'), await logits(source, 'mla', 'prefill'))));
});

// ---------------------------------------------------------------- interruptions

const CLI = fileURLToPath(new URL('../../src/reparam/convert.ts', import.meta.url));

for (const [what, widths, stride] of [['one width', null, 3], ['widths under a budget', { budget: { bytesPerToken: 168, candidates: [0, 8, 32] } }, 5]] as const) {
  test(`kill -9 at any moment leaves nothing that loads, and the same command finishes the work: ${what}`, async () => {
    const change = { widths: widths as ConversionOptions['widths'] };
    const plan = options({ name: 'default', refine: 20 }, change);
    const script = join(root, 'run.mjs');
    writeFileSync(script, `import { convert } from ${JSON.stringify(CLI)};\nawait convert({ ...${JSON.stringify(plan)}, device: process.argv[2] }, { start() {}, finish() {}, advance() { console.log('step'); } });\nconsole.log('done');\n`);
    let kills = 0;
    for (let steps = 2; ; steps += stride) {
      const done = await runUntil(script, steps, kills % 2 === 0 ? 'cpu' : 'auto');
      if (done) break;
      kills++;
      if (existsSync(join(plan.out, 'config.json'))) {
        // It had written all when the signal came: what is left of its work goes with the next attempt, which changes nothing else.
        assert.match((await failureOf(plan)).message, 'already holds a checkpoint');
        break;
      }
      assert.throws(() => loadCheckpoint(plan.out), (error: TplaError) => error.code === 'CHECKPOINT_INVALID');
    }
    assert.ok(kills >= 3, `${kills} kills`);
    const straight = options({ name: 'default', refine: 20 }, change);
    await convert(straight, SILENT);
    assert.is(loadCheckpoint(plan.out).identity.reparam, loadCheckpoint(straight.out).identity.reparam);
    assert.not(readdirSync(plan.out).some((name) => name.includes('partial') || name.startsWith('.')));
  });
}

async function failureOf(plan: ConversionOptions): Promise<TplaError> {
  try {
    await convert(plan, SILENT);
  } catch (error) {
    assert.instance(error, TplaError, String(error));
    return error as TplaError;
  }
  throw new Error('the conversion went through');
}

test('a conversion that was killed with nothing but its own traces left to remove', async () => {
  const plan = options({});
  await convert(plan, SILENT);
  const complete = readdirSync(plan.out).sort();
  mkdirSync(join(plan.out, '.tpla-reparam'));
  writeFileSync(join(plan.out, '.tpla-reparam', 'plan.json'), '{}');
  assert.match((await failureOf(plan)).message, 'already holds a checkpoint');
  assert.equal(readdirSync(plan.out).sort(), complete);
  assert.ok(loadCheckpoint(plan.out));
});

/** Runs a conversion and kills it after so many steps of progress; true when it ended by itself. */
function runUntil(script: string, steps: number, device: Device): Promise<boolean> {
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, ['--import', 'tsx', script, device], { cwd: fileURLToPath(new URL('../..', import.meta.url)), stdio: ['ignore', 'pipe', 'pipe'] });
    let seen = 0;
    let errors = '';
    child.stdout.on('data', (data: Buffer) => {
      seen += data.toString().split('step').length - 1;
      if (seen >= steps) child.kill('SIGKILL');
    });
    child.stderr.on('data', (data: Buffer) => (errors += data.toString()));
    child.on('close', (code, signal) => (signal === 'SIGKILL' ? resolve(false) : code === 0 ? resolve(true) : reject(new Error(`the conversion ended with ${code ?? signal}: ${errors}`))));
  });
}

// ---------------------------------------------------------------- refusals

async function refusal(plan: ConversionOptions): Promise<TplaError> {
  const before = existsSync(plan.out) ? readdirSync(plan.out).sort() : null;
  const error = await failureOf(plan);
  assert.equal(existsSync(plan.out) ? readdirSync(plan.out).sort() : null, before, 'the refusal left files');
  return error;
}

test('what cannot be done is refused before anything is written', async () => {
  assert.match((await refusal(options({}, { groups: 5 }))).message, "the latent's 32 less the shared 0 is not divisible by 5 groups");
  assert.match((await refusal(options({ shared: 32 }))).message, 'leaves nothing');
  assert.match((await refusal(options({}, { widths: { byLayer: [0, 8] } }))).message, '--shared has 2 widths, the model 3 layers');
  assert.match((await refusal(options({}, { widths: { byLayer: [0, 8, 33] } }))).message, 'a shared width of 33 is not possible');
  assert.match((await refusal(options({}, { widths: { budget: { bytesPerToken: 143, candidates: [0, 8] } } }))).message, 'without a shared subspace it is 144');
  assert.match((await refusal(options({ norm: 'sliced' }, { widths: { byLayer: [0, 32, 0] } }))).message, 'a sliced norm takes no shared subspace');
  assert.match((await refusal(options({ name: 'identity' }, { widths: { budget: { bytesPerToken: 200, candidates: [0, 8] } } }))).message, 'looks at no text');
  assert.match((await refusal(options({}, { groups: 1 }))).message, '1 group');
  assert.match((await refusal(options({ norm: 'sliced', shared: 8 }))).message, 'sliced norm needs an orthogonal basis');
  assert.match((await refusal(options({}, { calibration: null }))).message, 'name one with --calibration');
  assert.match((await refusal(options({}, { calibration: { file: join(root, 'none.txt'), context: 64, tokens: 1024, queries: 16, seed: 1 } }))).message, 'cannot be read');
  const short = join(root, 'short.txt');
  writeFileSync(short, 'Too short to fit anything on. '.repeat(10));
  assert.match((await refusal(options({}, { calibration: { file: short, context: 64, tokens: 1024, queries: 4, seed: 1 } }))).message, /is too short: \d+ tokens give \d+ queries/);
  assert.match((await refusal(options({}, { out: source }))).message, 'is the model itself');
});

test('a checkpoint that is reparameterised already, and an output that holds something else', async () => {
  const plan = options({ name: 'identity' });
  await convert(plan, SILENT);
  assert.match((await refusal(options({ name: 'identity' }, { model: plan.out }))).message, 'is already reparameterised');
  assert.match((await refusal({ ...plan, methodName: 'hadamard' })).message, 'already holds a checkpoint');
  const other = join(root, 'other');
  cpSync(source, other, { recursive: true });
  rmSync(join(other, 'config.json'));
  assert.match((await refusal(options({ name: 'identity' }, { out: other }))).message, 'is not empty');
});

test.run();
