import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { native } from '../../../src/native/loader.js';
import { tpla } from '../../support/cli.js';

const test = suite('bench-attention');
const dir = mkdtempSync(join(tmpdir(), 'tpla-bench-'));
test.after(() => rmSync(dir, { recursive: true }));

const bench = (...args: string[]) => tpla(['bench-attention', '--device', 'cpu', '--threads', '2', ...args]);
const SMALL = ['--heads', '8', '--kv-len', '64', '--runs', '3'];

test('a table: device, its measured rates, one row per shape', async () => {
  const { status, stdout, stderr } = await bench('--heads', '4,8', '--kv-len', '64,100', '--runs', '3');
  assert.is(status, 0, stderr);
  assert.match(stdout, /^copy +\d+ GB\/s, read \+ written\nmatrix +[\d.]+ TFLOP\/s \(fp32 products in cache, \w+\)$/m);
  assert.is(stdout.match(/^decode 512\+64 .* ok$/gm)?.length, 4);
});

test('a chunk behind cached tokens is computed as the engine does', async () => {
  const { status, stdout, stderr } = await bench('--kind', 'chunk', '--heads', '4', '--kv-len', '300', '--q-tokens', '20,64', '--runs', '2', '--json');
  assert.is(status, 0, stderr);
  const { rows } = JSON.parse(stdout) as { rows: { kernel: string; verdict: string; timing: { ms: number; choice_ratio: null } }[] };
  assert.equal(rows.map(({ kernel, verdict, timing }) => [kernel.startsWith('un-absorbed, '), verdict, timing.ms > 0, timing.choice_ratio]), [[true, 'ok', true, null], [true, 'ok', true, null]]);
});

test('CSV of a run is a comparison and a list of shapes for the next', async () => {
  const first = await bench(...SMALL, '--csv');
  assert.is(first.status, 0, first.stderr);
  const file = join(dir, 'before.csv');
  writeFileSync(file, first.stdout);
  const svg = join(dir, 'roofline.svg');
  const second = await bench('--shapes', file, '--compare', file, '--runs', '3', '--svg', svg, '--json');
  assert.is(second.status, 0, second.stderr);
  const { rows, comparisons } = JSON.parse(second.stdout) as { rows: { shape: unknown; timing: { ms: number }; compared: { name: string; ms: number; ratio: number }[] }[]; comparisons: unknown };
  assert.equal(comparisons, [{ name: 'before', rows: 1, matched: 1 }]);
  const { timing, compared } = rows[0]!;
  assert.is(compared[0]?.ratio, compared[0]!.ms / timing.ms);
  assert.match(readFileSync(svg, 'utf8'), /^<svg[^]*<\/svg>\n$/);
});

test('--check-only times nothing', async () => {
  const { status, stdout } = await bench('--heads', '8', '--kv-len', '64', '--check-only', '--json');
  assert.is(status, 0);
  const { rates, rows } = JSON.parse(stdout) as { rates: null; rows: { verdict: string; timing: null; check: { same_bits: boolean } }[] };
  assert.is(rates, null);
  assert.equal(rows.map(({ verdict, timing, check }) => [verdict, timing, check.same_bits]), [['ok', null, true]]);
});

test('one clear error, status 2, for what cannot run', async () => {
  for (const [args, text] of [
    [[], /^tpla: USAGE: name what to run: --preset [^\n]+\n$/],
    [['--kind', 'prefill', '--kv-len', '64'], /^tpla: REQUEST_INVALID: prefill [^\n]* is timed on GPUs only[^\n]*--kind chunk[^\n]*prefill 192\/128 causal[^\n]*\n$/],
    [['--kind', 'chunk', '--kv-len', '64', '--form', 'absorbed'], /^tpla: REQUEST_INVALID: the CPU computes chunks un-absorbed only[^\n]*chunk latent 512\+64 bf16 causal[^\n]*\n$/],
    [['--kind', 'chunk', '--kv-len', '64', '--no-causal'], /^tpla: REQUEST_INVALID: the CPU computes causal chunks only[^\n]*\n$/],
    [['--kv-len', '64', '--path', 'sm90'], /^tpla: REQUEST_INVALID: sm90 and sm80 name kernels of GPUs[^\n]*\n$/],
    [['--kv-len', '64', '--heads', 'many'], /^tpla: REQUEST_INVALID: shape of the flags: heads is "many"[^\n]*\n$/],
    [['--preset', 'none'], /^tpla: USAGE: Expected --preset=none to be one of: flashmla, [^\n]*\n$/],
  ] as [string[], RegExp][]) {
    const { status, stdout, stderr } = await bench(...args);
    assert.is(status, 2, stderr);
    assert.is(stdout, '');
    assert.match(stderr, text);
  }
  assert.match((await tpla(['bench-attention', '--device', 'tpu', '--kv-len', '64'])).stderr, /^tpla: USAGE: --device tpu: expected gpu, gpu:N or cpu\n$/);
});

test('without a GPU, or without CUDA in the addon: one clear error that names what to do, status 69', async () => {
  const { compiled, devices } = native().probe().cuda;
  const { status, stdout, stderr } = await tpla(['bench-attention', '--device', `gpu:${devices.length + 7}`, '--kv-len', '64']);
  assert.is(status, 69);
  assert.is(stdout, '');
  assert.match(stderr, compiled ? /^tpla: GPU_UNAVAILABLE: (no GPU can be used|there is no GPU)[^\n]*--device cpu[^\n]*\n$/ : /^tpla: GPU_UNAVAILABLE: [^\n]*TPLA_CUDA=on npm run build:native[^\n]*--device cpu[^\n]*\n$/);
});

test('a problem too large for the CPU is refused, not tried', async () => {
  const { status, stderr } = await bench('--heads', '1', '--batch', '128', '--kv-len', '131072', '--check-only');
  assert.is(status, 71);
  assert.match(stderr, /^tpla: OUT_OF_MEMORY: this shape takes \d+ MiB of KV[^\n]*128 × 131072[^\n]*\n$/);
});

test.run();
