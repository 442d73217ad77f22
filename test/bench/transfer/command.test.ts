import { spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { BenchRow } from '../../../src/bench/transfer/rows.js';
import { ERRORS } from '../../../src/errors.js';
import { native } from '../../../src/native/loader.js';
import { tpla, TPLA } from '../../support/cli.js';
import { until } from '../../support/handoff.js';

const test = suite('bench-transfer');
const directory = mkdtempSync(join(tmpdir(), 'tpla-bench-test-'));
test.after(() => rmSync(directory, { recursive: true }));

const SHAPE = ['--layers', '3', '--latent', '64', '--rope', '16', '--tokens', '300'];
const bench = (...args: string[]) => tpla(['bench-transfer', ...SHAPE, '--page-tokens', '16', '--iterations', '3', '--warmup', '1', ...args]);
const rowsOf = (stdout: string) => (JSON.parse(stdout) as { rows: BenchRow[] }).rows;
const handoffs = (rows: BenchRow[]) => rows.filter(({ path }) => !path.startsWith('plain-'));

test('a sweep over paths, views and precisions lands whole, each beside its plain copy', async () => {
  const csv = join(directory, 'sweep.csv');
  const plot = join(directory, 'sweep.svg');
  const { status, stdout, stderr } = await bench('--path', 'shm,tcp', '--view', 'mla,tpla2,tpla2+16,tpla2+0/64/16,tpla4,dcp2', '--target-dtype', 'bf16,fp8', '--target-page-tokens', '32', '--csv', csv, '--plot', plot, '--json');
  assert.is(status, 0, stderr);
  const rows = rowsOf(stdout);
  assert.is(rows.length, 2 * 6 * 2 * 2);
  assert.equal(new Set(rows.map(({ path }) => path)), new Set(['plain-memcpy', 'shm', 'plain-sockets', 'tcp']));
  for (const row of handoffs(rows)) {
    const { gb_per_s, bytes, put_us, latency_us, fraction_of_single_copy, single_copy_gb_per_s, wire_bytes } = row;
    assert.ok(row.verified, JSON.stringify(row));
    assert.ok(Math.abs(gb_per_s - bytes / put_us.p50 / 1e3) < 1e-9);
    assert.ok(Math.abs(fraction_of_single_copy - gb_per_s / single_copy_gb_per_s) < 1e-9);
    assert.ok(latency_us.min <= latency_us.p50 && latency_us.p50 <= latency_us.p99 && latency_us.p99 <= latency_us.p999 && latency_us.p999 <= latency_us.max);
    assert.ok(put_us.min <= latency_us.max);
    if (row.path === 'tcp') assert.ok(wire_bytes > bytes, 'frames have headers');
    else assert.is(wire_bytes, bytes);
  }
  const row = (view: string, dtype: string) => rows.find((one) => one.path === 'shm' && one.view === view && one.target_dtype === dtype)!;
  assert.is(row('mla', 'bf16').bytes, 300 * 3 * 160);
  assert.is(row('tpla2', 'bf16').bytes, 300 * 3 * 2 * (32 + 16) * 2);
  assert.is(row('tpla2+16', 'bf16').bytes, 300 * 3 * 2 * (16 + 24 + 16) * 2);
  assert.is(row('tpla2+0/64/16', 'bf16').bytes, 300 * 2 * (32 + 64 + 40 + 3 * 16) * 2);
  assert.is(row('mla', 'fp8').bytes, 300 * 3 * (64 + 4 + 32));
  assert.is(row('mla', 'bf16').piece_bytes, 16 * 160);
  const lines = readFileSync(csv, 'utf8').trim().split('\n').map((line) => line.split(','));
  assert.is(lines.length, rows.length + 1);
  assert.equal(lines[0]!.slice(0, 10), ['piece_bytes', 'pieces', 'gb_per_s', 'latency_us_avg', 'prepare_us_avg', 'prepare_us_p99', 'post_us_avg', 'post_us_p99', 'put_us_avg', 'put_us_p99']);
  assert.is(lines[1]![lines[0]!.indexOf('latency_us_p999')], String(rows[0]!.latency_us.p999));
  assert.match(readFileSync(plot, 'utf8'), /GB\/s/);
});

test('several requests under way land in pages of their own, and are counted together', async () => {
  const { status, stdout, stderr } = await bench('--path', 'shm,tcp', '--view', 'mla,dcp2', '--in-flight', '1,3', '--layers-per-push', '2', '--json');
  assert.is(status, 0, stderr);
  const rows = handoffs(rowsOf(stdout));
  assert.equal(rows.map(({ in_flight }) => in_flight), [1, 3, 1, 3, 1, 3, 1, 3]);
  for (const { verified, gb_per_s, bytes, put_us, in_flight, latency_us, layers_per_push } of rows) {
    assert.ok(verified);
    assert.is(bytes, 300 * 3 * 160);
    assert.is(layers_per_push, 2);
    assert.ok(Math.abs(gb_per_s - in_flight * bytes / put_us.p50 / 1e3) < 1e-9);
    assert.ok(latency_us.min > 0);
  }
  const text = await bench('--in-flight', '2');
  assert.match(text.stdout, / mla +2×300 +16→16 +bf16 +\d+ %$/m);
});

test('--timeline says when each step happened in both processes', async () => {
  const { status, stdout } = await bench('--timeline');
  assert.is(status, 0);
  for (const step of [/ prefill +put asked for 1$/m, / prefill +put in place 1$/m, / prefill +pushed sent 1$/m, / decode +pushed received 1$/m, / decode +verified 1$/m, / decode +message sent 1$/m]) {
    assert.match(stdout, step);
  }
});

test('the table has the columns of nixlbench first', async () => {
  const { status, stdout } = await bench();
  assert.is(status, 0);
  const [head, plain, handoff] = stdout.split('\n');
  assert.match(head!, /^piece B +pieces +GB\/s +avg µs +prep µs +prep p99 +post µs +post p99 +tx µs +tx p99 +p50 µs +p99 µs +p99.9 µs +wire MB +path/m);
  assert.match(plain!, /plain-memcpy/);
  assert.match(handoff!, / shm .* 300 +16→16 +bf16 +\d+ %$/);
});

test('the collation preset sets calls a piece beside one pass, for every path', async () => {
  const { status, stdout, stderr } = await tpla(['bench-transfer', ...SHAPE, '--iterations', '3', '--preset', 'collation', '--path', 'shm,tcp', '--json']);
  assert.is(status, 0, stderr);
  const rows = handoffs(rowsOf(stdout));
  assert.equal(rows.map(({ setup, source_page_tokens, target_page_tokens, tokens_per_push, pieces }) => [setup, source_page_tokens, target_page_tokens, tokens_per_push, pieces]),
    ['shm', 'tcp'].flatMap((path) => [[path, 16, 16, 16, 57], [path, 128, 128, 128, 9], [path, 16, 16, 300, 57], [path, 16, 128, 300, 57]]));
  const text = await tpla(['bench-transfer', ...SHAPE, '--iterations', '3', '--preset', 'collation', '--path', 'shm']);
  assert.match(text.stdout, /^shm( +[\d.]+ ms \([\d.]+\)){4} +[\d.]+$/m);
});

test('two ends on addresses of their own: a driver that leaves makes room for the next', async () => {
  const address = `unix:${join(directory, 'control.sock')}`;
  const end = spawn(process.execPath, [TPLA, 'bench-transfer', '--listen', address], { stdio: ['ignore', 'ignore', 'pipe'] });
  let log = '';
  end.stderr.on('data', (chunk: Buffer) => { log += chunk.toString(); });
  try {
    await until(() => log.includes('ready for bench-transfer'), 'the other end to listen');
    for (let round = 0; round < 2; round++) {
      const { status, stdout, stderr } = await bench('--connect', address, '--path', 'shm', '--json');
      assert.is(status, 0, stderr);
      assert.ok(handoffs(rowsOf(stdout)).every(({ verified }) => verified));
    }
  } finally {
    end.kill('SIGTERM');
    await new Promise((resolve) => end.once('close', resolve));
  }
});

test('another end over TCP serves TCP, and names what it cannot lend', async () => {
  const port = 20000 + process.pid % 20000;
  const address = `tcp://127.0.0.1:${port}`;
  const end = spawn(process.execPath, [TPLA, 'bench-transfer', '--listen', address, '--once'], { stdio: ['ignore', 'ignore', 'inherit'] });
  const over = new Promise<number | null>((resolve) => end.once('close', resolve));
  await until(async () => (await bench('--connect', address, '--path', 'tcp')).status === 0, 'a run over TCP');
  assert.is(await over, 0, 'with --once it ends with its driver');
  const again = spawn(process.execPath, [TPLA, 'bench-transfer', '--listen', address, '--once'], { stdio: ['ignore', 'ignore', 'inherit'] });
  const ended = new Promise((resolve) => again.once('close', resolve));
  let refused = { status: null as number | null, stderr: '' };
  await until(async () => (refused = await bench('--connect', address, '--path', 'shm')).stderr.includes('USAGE'), 'shared memory to be refused');
  assert.match(refused.stderr, /path shm is between two processes of one host: have the other end --listen at a unix: address/);
  await ended;
});

test('a faster path can be required', async () => {
  const { status, stderr } = await bench('--path', 'tcp', '--require-path', 'shm');
  assert.is(status, ERRORS.HANDSHAKE_REFUSED.exit);
  assert.match(stderr, /the path to decode is tcp, at least shm is required/);
});

test('what cannot run is refused before anything starts, saying what is missing', async () => {
  const cases: [string[], RegExp][] = [
    [['--path', 'carrier-pigeon'], /USAGE: path "carrier-pigeon" is none of same-gpu, .*shm.*tcp/],
    [['--view', 'tpla2-7'], /USAGE: view "tpla2-7" is none of mla, tplaN/],
    [['--page-tokens', '16,x'], /USAGE: --page-tokens: "x" is not a whole number from 1 on/],
    [['--in-flight', '0'], /USAGE: --in-flight: "0" is not a whole number from 1 on/],
    [['--preset', 'collation', '--in-flight', '2'], /USAGE: --preset collation has one request under way/],
    [['--preset', 'collation', '--view', 'tpla2'], /USAGE: --preset collation has its own pieces and takes no --view/],
    [['--listen', 'unix:/nowhere'], /USAGE: .*cannot also be provided when using --listen/],
    [['--dtype', 'int4'], /USAGE: dtype "int4" is none of f32, bf16, fp8/],
  ];
  if (native().probe().cuda.devices.length === 0) cases.push([['--path', 'cuda-ipc'], /GPU_UNAVAILABLE: path cuda-ipc cannot run here: it needs an NVIDIA GPU/]);
  for (const [args, message] of cases) {
    const { status, stderr, stdout } = await tpla(['bench-transfer', ...SHAPE, ...args]);
    assert.match(stderr, message);
    assert.is.not(status, 0);
    assert.is(stdout, '');
  }
});

test('an interrupted benchmark takes its other end with it', async () => {
  const run = spawn(process.execPath, [TPLA, 'bench-transfer', ...SHAPE, '--iterations', '1000000'], { stdio: 'ignore' });
  const otherEnds = () => processes().filter(({ parent, command }) => parent === run.pid && command.includes('--listen')).map(({ pid }) => pid);
  await until(() => otherEnds().length === 1, 'the other end to be started');
  const [end] = otherEnds();
  await until(() => openDescriptors(end!).some((target) => target.includes('memfd:tpla')), 'the other end to lend its pages');
  run.kill('SIGKILL');
  await until(() => !processes().some(({ pid }) => pid === end), 'the other end to leave');
});

function processes(): { pid: number; parent: number; command: string }[] {
  return readdirSync('/proc').filter((name) => /^\d+$/.test(name)).flatMap((name) => {
    try {
      const parent = Number(/^PPid:\s+(\d+)/m.exec(readFileSync(`/proc/${name}/status`, 'utf8'))![1]);
      return [{ pid: Number(name), parent, command: readFileSync(`/proc/${name}/cmdline`, 'utf8') }];
    } catch {
      return []; // it has ended meanwhile
    }
  });
}

function openDescriptors(pid: number): string[] {
  return readdirSync(`/proc/${pid}/fd`).flatMap((fd) => {
    try {
      return [readlinkSync(`/proc/${pid}/fd/${fd}`)];
    } catch {
      return [];
    }
  });
}

test.run();
