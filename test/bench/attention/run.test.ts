import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { resultsAsCsv } from '../../../src/bench/attention/columns.js';
import { printResults } from '../../../src/bench/attention/print.js';
import { rooflineSvg } from '../../../src/bench/attention/roofline.js';
import { benchAttention, judge, shortName, timingOf, type BenchResult } from '../../../src/bench/attention/run.js';
import { shapeFromFields, workOfShape } from '../../../src/bench/attention/shape.js';
import { native } from '../../../src/native/loader.js';
import { parseCsv } from '../../../src/report/csv.js';
import { SILENT } from '../../../src/report/progress.js';

const CHECK = { worstRow: 1e-3, overall: 1e-3, worstLse: 1e-4, sameBits: true, repeats: 2, reference: 'x' };

test('a verdict names the first thing that is wrong', () => {
  assert.is(judge(CHECK, 'gpu', 'decode'), 'ok');
  assert.is(judge(CHECK, 'cpu', 'decode'), 'error 1.0e-3');
  assert.is(judge({ ...CHECK, worstRow: NaN, sameBits: false }, 'gpu', 'decode'), 'NaN in the result');
  assert.is(judge({ ...CHECK, worstRow: 0.02 }, 'gpu', 'decode'), 'error 2.0e-2');
  assert.equal(['decode', 'chunk'].map((kind) => judge({ ...CHECK, worstRow: 0.01 }, 'gpu', kind as 'chunk')), ['error 1.0e-2', 'ok']);
  assert.is(judge({ ...CHECK, worstRow: 0.01 }, 'cpu', 'chunk'), 'error 1.0e-2');
  assert.is(judge({ ...CHECK, worstLse: 0.02 }, 'gpu', 'decode'), 'lse error 2.0e-2');
  assert.is(judge({ ...CHECK, worstLse: Infinity }, 'gpu', 'decode'), 'lse error Infinity');
  assert.is(judge({ ...CHECK, sameBits: false }, 'gpu', 'decode'), 'results differ');
});

test('rates follow from the least work, and the nearer limit is named', () => {
  const rates = { copy_gb_per_s: 3000, matrix_tflops: 800, matrix_source: 'x' };
  const timing = { medianMs: 0.5432, minMs: 0.54, maxMs: 0.55, runs: 20, callsPerRun: 4, buffers: 2 };
  const wide = timingOf(shapeFromFields({ batch: 128, kv_len: 8192 }, 'here'), timing, rates);
  assert.is(Math.round(wide.tflops), 538); // what is published for FlashMLA at this time
  assert.ok(Math.abs(wide.mfu - 538 / 800) < 1e-3);
  assert.is(timingOf(shapeFromFields({ batch: 128, kv_len: 8192, q_tokens: 2 }, 'here'), timing, rates).bound, 'matrix');
  const narrow = timingOf(shapeFromFields({ batch: 128, kv_len: 8192, heads: 16 }, 'here'), timing, rates);
  assert.is(narrow.bound, 'memory');
  assert.is(narrow.bound_fraction, narrow.copy_fraction);
});

test('of a chunk both forms are told, and how far the chosen one is from the faster', () => {
  const rates = { copy_gb_per_s: 3000, matrix_tflops: 800, matrix_source: 'x' };
  const timing = (medianMs: number) => ({ medianMs, minMs: medianMs, maxMs: medianMs, runs: 20, callsPerRun: 4, buffers: 2 });
  const shape = shapeFromFields({ kind: 'chunk', kv_len: 8192, q_tokens: 256 }, 'here');
  const { ms, absorbed_ms, unabsorbed_ms, choice_ratio, serial_ms } = timingOf(shape, timing(0.5), rates, { serial: null, absorbed: timing(0.5), unabsorbed: timing(0.4) });
  assert.equal([ms, absorbed_ms, unabsorbed_ms, choice_ratio, serial_ms], [0.5, 0.5, 0.4, 0.8, null]);
  assert.is(timingOf(shape, timing(0.5), rates, { absorbed: timing(0.5), unabsorbed: timing(0.6) }).choice_ratio, 1);
  assert.is(timingOf(shape, timing(0.5), rates).choice_ratio, null);
});

test("a GPU's name in results files is its model", () => {
  assert.is(shortName('NVIDIA H100 80GB HBM3'), 'H100');
  assert.is(shortName('NVIDIA H200'), 'H200');
  assert.is(shortName('NVIDIA A100-SXM4-40GB'), 'A100');
  assert.is(shortName('NVIDIA GB200'), 'GB200');
  assert.is(shortName('Tesla T4'), 'Tesla T4');
});

test('CPU decode is right for every dtype, ragged queries, empty sequences, and slices of a latent', async () => {
  const shapes = [
    { kv_lens: '130;0;1;65', q_lens: '1;1;1;1', heads: 16 },
    { kv_lens: '100;3;33', q_lens: '2;5;0', heads: 5, latent: 256, page: 16, latent_scale: true },
    { kv_lens: '100;3;33', q_tokens: 3, heads: 5, latent: 320, page: 48, causal: false },
    { kv_len: 700, batch: 3, heads: 70, latent: 128, kv_dtype: 'fp8' },
    { kv_len: 300, batch: 1, heads: 128, kv_dtype: 'f32' },
  ].map((fields) => shapeFromFields(fields, 'here'));
  const result = await benchAttention(native(), { target: { kind: 'cpu', threads: 2 }, shapes, repeats: 3, runs: 0, seed: 7, comparisons: () => [], progress: SILENT });
  assert.equal(result.rows.map(({ verdict }) => verdict), shapes.map(() => 'ok'), JSON.stringify(result.rows.map(({ check }) => check)));
  assert.is(result.failed, 0);
  assert.ok(result.rows.every(({ check }) => check !== null && check.worstRow > 0 && check.repeats === 3 && check.reference === 'float64 on the CPU'));
});

test('CPU chunks are right for every dtype, ragged, without tokens or queries, and with more queries than keys', async () => {
  const shapes = [
    { kv_lens: '130;0;1;65', q_lens: '30;0;1;65', heads: 3 },
    { kv_lens: '100;3;33;0', q_lens: '20;9;0;2', heads: 2, page: 16, kv_dtype: 'fp8' },
    { kv_len: 300, q_tokens: 70, batch: 2, heads: 5, kv_dtype: 'f32', form: 'unabsorbed' },
  ].map((fields) => shapeFromFields({ kind: 'chunk', ...fields }, 'here'));
  const result = await benchAttention(native(), { target: { kind: 'cpu', threads: 2 }, shapes, repeats: 3, runs: 0, seed: 7, comparisons: () => [], progress: SILENT });
  assert.equal(result.rows.map(({ verdict }) => verdict), shapes.map(() => 'ok'), JSON.stringify(result.rows.map(({ check }) => check)));
  assert.ok(result.rows.every(({ check, kernel }) => check !== null && check.worstRow > 0 && check.sameBits && kernel.startsWith('un-absorbed, ')));
});

test('the seed decides the data: the same error to the last bit, or another', async () => {
  const shape = shapeFromFields({ kv_len: 200, batch: 2, heads: 8 }, 'here');
  const errorOf = async (seed: number) => {
    const { rows } = await benchAttention(native(), { target: { kind: 'cpu', threads: 1 }, shapes: [shape], repeats: 1, runs: 0, seed, comparisons: () => [], progress: SILENT });
    return rows[0]?.check?.worstRow;
  };
  assert.is(await errorOf(1), await errorOf(1));
  assert.is.not(await errorOf(1), await errorOf(2));
});

const TIMED: BenchResult = {
  device: { gpu: 'H100', name: 'NVIDIA H100 <80GB>', capability: '9.0', multiprocessors: 132, l2_bytes: 5e7, memory_bytes: 8e10, sm_clock_mhz: 1980, memory_clock_mhz: 2619 },
  rates: { copy_gb_per_s: 3000, matrix_tflops: 800, matrix_source: 'x' },
  comparisons: [{ name: 'flashmla', rows: 1, matched: 1 }],
  rows: [{ batch: 128, kv_len: 8192 }, { kv_lens: '64;100', q_tokens: 2, latent: 256, heads: 16 }].map((fields, i) => {
    const shape = shapeFromFields(fields, 'here');
    const timing = timingOf(shape, { medianMs: 0.25, minMs: 0.24, maxMs: 0.3, runs: 20, callsPerRun: 8, buffers: 2 }, { copy_gb_per_s: 3000, matrix_tflops: 800, matrix_source: 'x' });
    return { shape, kernel: 'sm90', verdict: 'ok', check: CHECK, timing, compared: i === 0 ? [{ name: 'flashmla', ms: 0.5, ratio: 2 }] : [] };
  }),
  failed: 0,
};

test('CSV has the columns that plans and comparisons read, and reads back as the same shapes', () => {
  const [head, ...rows] = parseCsv(resultsAsCsv(TIMED));
  const records = rows.map((cells) => Object.fromEntries(head!.map((name, i) => [name, cells[i] as string])));
  assert.equal(records.map(({ gpu, latent, rope, batch, heads, kv_len, q_tokens, kv_lens, ms, latency_us }) => [gpu, latent, rope, batch, heads, kv_len, q_tokens, kv_lens, ms, latency_us]), [
    ['H100', '512', '64', '128', '128', '8192', '1', '', '0.25', '250'],
    ['H100', '256', '64', '2', '16', '', '2', '64;100', '0.25', '250'],
  ]);
  assert.equal([records[0]?.flashmla_ms, records[0]?.flashmla_ratio, records[1]?.flashmla_ratio], ['0.5', '2', '']);
  assert.is(Number(records[0]?.mfu), Number((TIMED.rows[0]!.timing!.tflops / 800).toPrecision(4)));
});

test('only tables with a chunk whose form was chosen have columns for both', () => {
  assert.not.match(printResults(TIMED), 'un-absorbed');
  const [row] = TIMED.rows;
  const chunk = { ...row!, shape: shapeFromFields({ kind: 'chunk', kv_len: 4096 }, 'here'), kernel: 'absorbed, sm90', timing: { ...row!.timing!, absorbed_ms: 0.25, unabsorbed_ms: 0.2, choice_ratio: 0.8 } };
  const text = printResults({ ...TIMED, rows: [...TIMED.rows, chunk] });
  assert.match(text, /absorbed +un-absorbed +of faster/);
  assert.match(text, /^chunk .*absorbed, sm90 .*0\.2500 +0\.2000 +80\.0 %/m);
});

test('the roofline has a filled point per row, a hollow one per comparison, and survives any name', () => {
  const svg = rooflineSvg(TIMED, TIMED.rates!);
  const circles = [...svg.matchAll(/<circle cx="([\d.]+)" cy="([\d.]+)" r="4.5" fill="(\S+?)"/g)];
  const legend = new Set(TIMED.rows.map(({ shape }) => workOfShape(shape))).size + 1;
  assert.is(circles.length, 3 + legend);
  assert.is(circles.filter(([, , , fill]) => fill === 'white').length, 1 + 1);
  for (const [, cx, cy] of circles) assert.ok(Number(cx) >= 80 && Number(cx) <= 960 && Number(cy) >= 50 && Number(cy) <= 540);
  assert.match(svg, /NVIDIA H100 &lt;80GB&gt;: 3000 GB\/s copy, 800 TFLOP\/s/);
  assert.is(svg.match(/NaN|undefined|Infinity/), null);
});

test.run();
