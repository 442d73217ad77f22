import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { parseCsv, rowOfRecord } from '../../src/bench/attention/csv.js';
import { PRESETS } from '../../src/bench/attention/presets.js';
import { rooflineSvg } from '../../src/bench/attention/roofline.js';
import { caseOf, lengthsText, rowKey } from '../../src/bench/attention/rows.js';
import { benchRows, toCsv } from '../../src/bench/attention/run.js';
import type { AttentionModule, AttentionRequest } from '../../src/native/attention.js';

const MACHINE = { name: 'Test GPU', copyBytesPerSecond: 3e12, matrixFlopsPerSecond: 8e14 };

/** Answers as a GPU would, with arithmetic instead of kernels. */
function fakeAddon(ok: boolean, asked: AttentionRequest[] = []): AttentionModule {
  const benchAttention = (request: AttentionRequest) => {
    asked.push(request);
    if (request.operation === 'machine') return Promise.resolve(MACHINE);
    if (request.operation === 'time') return Promise.resolve({ ms: 0.5, bytes: 1e9, flops: 1e11 });
    return Promise.resolve({ name: 'shape', ok, error: ok ? 2e-3 : 0.5, lseError: 1e-6, sameBits: true });
  };
  return { benchAttention } as AttentionModule;
}

test('a row of an anchor file and the same row of a preset have the same key', () => {
  const [even, uneven] = parseCsv('gpu,batch,heads,kv_len,q_tokens,kv_lens,ms\nH100,128,64,8192,1,,0.4394\nH100,4,128,,4,4641;45118;1730;1696,0.1216\n').map(rowOfRecord);
  assert.is(even!.ms, 0.4394);
  const keys = PRESETS.flashmla.map(rowKey);
  assert.ok(keys.includes(rowKey(even!)));
  assert.ok(keys.includes(rowKey(uneven!)));
  assert.is(lengthsText(uneven!), '4641;45118;1730;1696');
});

test('a latent column tells TPLA rows from MLA rows', () => {
  const [row] = parseCsv('gpu,latent,rope,batch,heads,kv_len,q_tokens,kv_lens,ms\nH100,256,64,128,128,8192,1,,0.3010').map(rowOfRecord);
  assert.ok(PRESETS.tpla.map(rowKey).includes(rowKey(row!)));
  assert.not(PRESETS.flashmla.map(rowKey).includes(rowKey(row!)));
});

test('malformed numbers and lengths that contradict the batch are refused by column', () => {
  assert.throws(() => rowOfRecord({ batch: '2', heads: 'many', kv_len: '10' }), /column heads/);
  assert.throws(() => rowOfRecord({ batch: '3', heads: '16', kv_lens: '1;2' }), /expected 3 lengths/);
});

test('every row is checked before it is timed, and rates follow from its time', async () => {
  const asked: AttentionRequest[] = [];
  const row = PRESETS.thundermla[0]!;
  const { results } = await benchRows(fakeAddon(true, asked), [row], { path: 'auto', seed: 1, repeats: 3, others: new Map([[rowKey(row), 1.0]]) });
  assert.equal(asked.map((request) => request.operation), ['machine', 'check', 'time']);
  const [result] = results;
  assert.is(result!.gb_per_s, 2000);
  assert.is(result!.tflops, 200);
  assert.is(result!.ratio, 2);
  assert.ok(Math.abs(result!.mbu - 2 / 3) < 1e-12);
  assert.ok(Math.abs(result!.mfu - 0.25) < 1e-12);
});

test('a wrong result is an error and has no time', async () => {
  const asked: AttentionRequest[] = [];
  let message = '';
  await benchRows(fakeAddon(false, asked), PRESETS.thundermla, { path: 'auto', seed: 1, repeats: 3, others: new Map() }).catch((error: Error) => { message = error.message; });
  assert.match(message, /wrong result/);
  assert.not(asked.some((request) => request.operation === 'time'));
});

test('results survive as CSV, and the plot has one dot a row under its roof', async () => {
  const { machine, results } = await benchRows(fakeAddon(true), PRESETS.thundermla, { path: 'auto', seed: 1, repeats: 1, others: new Map() });
  const read = parseCsv(toCsv(results));
  assert.equal(read.map((record) => rowKey(rowOfRecord(record))), PRESETS.thundermla.map(rowKey));
  assert.is(read[0]!.latency_us, '500.0');
  const svg = rooflineSvg(machine, results);
  assert.is(svg.match(/<circle /g)!.length, results.length);
  assert.match(svg, /3\.00 TB\/s/);
});

test('prefill rows ask for as many queries as keys', () => {
  const work = caseOf(PRESETS.prefill[0]!, 'auto');
  assert.is(work.kind, 'prefill');
  if (work.kind === 'prefill') assert.equal([...work.qLens], [...work.kvLens]);
});

test.run();
