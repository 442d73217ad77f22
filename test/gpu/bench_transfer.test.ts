// time limit: 600 s
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { BENCH_PATHS } from '../../src/bench/transfer/paths.js';
import type { OverlapRow } from '../../src/bench/transfer/overlap.js';
import type { BenchRow } from '../../src/bench/transfer/rows.js';
import { tpla } from '../support/cli.js';

const test = suite('bench-transfer on the GPU');
const SMALL = ['--layers', '4', '--tokens', '700', '--iterations', '3', '--warmup', '1', '--json'];

const handoffs = (...args: string[]) => bench([...SMALL, ...args]);

async function bench(args: string[]): Promise<BenchRow[]> {
  const { status, stdout, stderr } = await tpla(['bench-transfer', ...args]);
  assert.is(status, 0, stderr);
  return (JSON.parse(stdout) as { rows: BenchRow[] }).rows.filter(({ path }) => !path.startsWith('plain-'));
}

test('two processes on one GPU hand KV over in every view and precision, pushed and pulled', async () => {
  const rows = await handoffs('--path', 'same-gpu,same-gpu-ipc', '--direction', 'push,pull', '--page-tokens', '16', '--target-page-tokens', '64', '--view', 'mla,tpla2+64,tpla2+0/64/512,dcp2', '--target-dtype', 'bf16,fp8');
  assert.is(rows.length, 2 * 2 * 4 * 2);
  for (const row of rows) {
    assert.is(row.path, 'same-gpu');
    assert.ok(row.verified && row.gb_per_s > 0, JSON.stringify(row));
  }
});

test('two GPUs of one host hand KV over by descriptors and by IPC', async () => {
  const missing = BENCH_PATHS['cuda-fd']!.missing();
  if (missing !== null) return console.log(`not run: ${missing}`);
  const rows = await handoffs('--path', 'cuda-fd,cuda-ipc', '--direction', 'push,pull', '--page-tokens', '16', '--target-page-tokens', '64', '--view', 'mla,tpla2+64,tpla2+0/64/512,dcp2', '--target-dtype', 'bf16,fp8');
  assert.is(rows.length, 2 * 2 * 4 * 2);
  for (const row of rows) {
    assert.is(row.path, row.setup);
    assert.ok(row.verified && row.gb_per_s > 0, JSON.stringify(row));
  }
});

test('several requests under way on a GPU land in pages of their own', async () => {
  const rows = await handoffs('--path', 'same-gpu', '--page-tokens', '16', '--in-flight', '3', '--layers-per-push', '1,4');
  assert.equal(rows.map(({ in_flight, layers_per_push, verified }) => [in_flight, layers_per_push, verified]), [[3, 1, true], [3, 4, true]]);
});

test('a prompt large enough is pushed in groups that shrink', async () => {
  const [row] = await bench(['--path', 'same-gpu', '--layers', '30', '--tokens', '5000', '--iterations', '2', '--warmup', '1', '--json']);
  assert.is(row!.layers_per_push, '23+6+1');
  assert.ok(row!.verified);
});

test('GPU and host memory hand KV over in both directions', async () => {
  const rows = await handoffs('--path', 'pinned,pinned-to-gpu', '--view', 'mla,tpla2');
  assert.equal(rows.map(({ setup, path, verified }) => [setup, path, verified]), [
    ['pinned', 'pinned', true], ['pinned', 'pinned', true], ['pinned-to-gpu', 'pinned', true], ['pinned-to-gpu', 'pinned', true],
  ]);
});

test('between hosts KV in GPU memory goes over UCX, into GPU memory, through pinned memory where nothing reads it directly', async () => {
  const missing = BENCH_PATHS['ucx-gpu']!.missing();
  if (missing !== null) return console.log(`not run: ${missing}`);
  const rows = await handoffs('--path', 'ucx-gpu', '--page-tokens', '16', '--target-page-tokens', '64', '--view', 'mla,tpla2+64,dcp2', '--target-dtype', 'bf16,fp8');
  assert.is(rows.length, 3 * 2);
  for (const row of rows) {
    assert.is(row.path, 'ucx');
    assert.ok(row.verified && row.gb_per_s > 0, JSON.stringify(row));
    assert.match(row.carried_by!, /^UCX .*rows (of the GPU leave through pinned memory|leave from the GPU's own memory)( over .+)?$/);
  }
});

test('a hand-off is measured beside prefill', async () => {
  const { status, stdout, stderr } = await tpla(['bench-transfer', ...SMALL, '--preset', 'overlap', '--path', 'same-gpu', '--layers-per-push', '2']);
  assert.is(status, 0, stderr);
  const [row] = (JSON.parse(stdout) as { rows: OverlapRow[] }).rows;
  assert.ok(row!.verified);
  assert.ok(row!.prefill_alone_us.p50 > 0 && row!.with_handoff_us.p50 > 0);
  assert.is(row!.bytes, 700 * 4 * 1152);
});

test.run();
