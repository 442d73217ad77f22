// time limit: 120 s
import { spawn, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { BenchRow } from '../../../src/bench/transfer/rows.js';
import { ERRORS } from '../../../src/errors.js';
import { native } from '../../../src/native/loader.js';
import { tpla, TPLA } from '../../support/cli.js';
import { until } from '../../support/handoff.js';

const test = suite('bench-transfer --path nvme');
const directory = mkdtempSync(join(tmpdir(), 'tpla-bench-nvme-'));
test.after(() => rmSync(directory, { recursive: true }));

const DEFAULTS: Record<string, string> = {
  path: 'nvme', layers: '3', latent: '64', rope: '16', tokens: '300', 'page-tokens': '16', iterations: '3', warmup: '1', directory,
};
const argsOf = (change: Record<string, string>) => ['bench-transfer', ...Object.entries({ ...DEFAULTS, ...change }).flatMap(([name, value]) => [`--${name}`, value])];
const bench = (change: Record<string, string>, ...more: string[]) => tpla([...argsOf(change), ...more]);
const rowsOf = (stdout: string) => (JSON.parse(stdout) as { rows: BenchRow[] }).rows;
const PAGE = 16 * 80 * 2;

test('a sweep writes and reads blocks of every size with every mechanism, each beside a plain file', async () => {
  const [csv, plot] = [join(directory, 'sweep.csv'), join(directory, 'sweep.svg')];
  const { status, stdout, stderr } = await bench({ mechanism: 'io_uring,threads', 'page-tokens': '16,48', 'pages-per-block': '1,5', 'queue-depth': '2,32', dtype: 'bf16,fp8', csv, plot }, '--json');
  assert.is(status, 0, stderr);
  const rows = rowsOf(stdout);
  assert.is(rows.length, 2 * (2 * 2 * 2 * 2 * 2 * 2));
  for (const [i, row] of rows.entries()) {
    assert.ok(row.gb_per_s > 0 && row.storage !== undefined, JSON.stringify(row));
    if (i % 2 === 0) {
      assert.is(row.path, 'plain-file');
      continue;
    }
    assert.ok(row.verified);
    assert.is(row.single_copy_gb_per_s, rows[i - 1]!.gb_per_s);
    assert.ok(Math.abs(row.fraction_of_single_copy - row.gb_per_s / rows[i - 1]!.gb_per_s) < 1e-9);
    assert.ok(row.wire_bytes > row.bytes, 'headers and what fills the blocks of the disk');
    assert.is(row.storage.memory, 'host');
    assert.is(row.storage.passed_over, null);
  }
  const one = rows.find(({ path, direction, source_page_tokens, source_dtype, storage }) =>
    path === 'threads' && direction === 'write' && source_page_tokens === 16 && source_dtype === 'bf16' && storage!.pages_per_block === 5)!;
  assert.is(one.bytes, 300 * 3 * 160);
  assert.is(one.piece_bytes, PAGE);
  assert.is(one.storage!.block_bytes, 5 * 3 * PAGE);
  // 19 pages are three blocks of five and one of four; two headers each.
  assert.is(one.wire_bytes, 4 * 2 * 4096 + 3 * Math.ceil(5 * 3 * PAGE / 4096) * 4096 + Math.ceil(4 * 3 * PAGE / 4096) * 4096);
  const lines = readFileSync(csv, 'utf8').trim().split('\n').map((line) => line.split(','));
  assert.is(lines.length, rows.length + 1);
  assert.is(lines[1]![lines[0]!.indexOf('storage_queue_depth')], '2');
  assert.match(readFileSync(plot, 'utf8'), /io_uring/);
  assert.equal(readdirSync(directory).sort(), ['sweep.csv', 'sweep.svg'], 'no file stays');
});

test('the table says what moved the blocks, and stands beside hand-offs', async () => {
  const csv = join(directory, 'both.csv');
  const { status, stdout, stderr } = await bench({ path: 'shm,nvme', mechanism: 'threads', csv });
  assert.is(status, 0, stderr);
  const lines = stdout.trimEnd().split('\n');
  assert.match(lines[2]!, / shm +[\d.]+ +push +mla +300 +16→16 +bf16 +\d+ %$/);
  assert.match(lines[3]!, / plain-file.* +host to file +mla +300 +1×16 +bf16$/);
  assert.match(lines[4]!, / threads.* +host to file +mla +300 +1×16 +bf16 +\d+ %$/);
  assert.match(lines[6]!, / threads.* +file to host +mla +300 +1×16 +bf16 +\d+ %$/);
  const table = readFileSync(csv, 'utf8').trim().split('\n').map((line) => line.split(','));
  assert.ok(table.every((cells) => cells.length === table[0]!.length));
  assert.ok(table[0]!.includes('storage_block_bytes'));
});

test('what is not for it is refused, saying what is', async () => {
  const cases: [Record<string, string>, RegExp][] = [
    [{ direction: 'push' }, /USAGE: direction "push" is none of write, read/],
    [{ memory: 'tape' }, /USAGE: memory "tape" is none of host, gpu/],
    [{ mechanism: 'dma' }, /USAGE: mechanism "dma" is none of auto, cufile, io_uring, threads/],
    [{ mechanism: 'cufile' }, /USAGE: mechanism cufile moves GPU memory: --memory gpu/],
    [{ view: 'tpla2' }, /USAGE: --view tpla2: blocks on a disk are canonical/],
    [{ 'require-path': 'shm' }, /USAGE: --require-path is for hand-offs.*--mechanism/],
    [{ 'target-dtype': 'fp8' }, /USAGE: --target-dtype is for hand-offs/],
    [{ 'pages-per-block': '0' }, /USAGE: --pages-per-block: "0" is not a whole number from 1 on/],
    [{ path: 'shm' }, /USAGE: --directory is for --path nvme/],
    [{ path: 'shm', direction: 'write' }, /USAGE: direction "write" is none of push, pull/],
    [{ preset: 'collation' }, /USAGE: --preset collation is for hand-offs/],
    [{ directory: '/proc/nowhere' }, /IO_FAILED: cannot open the file \/proc\/nowhere\/.*: No such file or directory; \/proc\/nowhere must hold two files/],
  ];
  if (native().probe().cuda.devices.length === 0) cases.push([{ memory: 'gpu' }, /GPU_UNAVAILABLE: --memory gpu needs an NVIDIA GPU/]);
  for (const [change, message] of cases) {
    const { status, stderr, stdout } = await bench(change);
    assert.match(stderr, message);
    assert.is.not(status, 0);
    assert.is(stdout, '');
  }
});

const mayMount = spawnSync('unshare', ['-rm', 'true']).status === 0;
if (!mayMount) console.log('skipping full disks and odd filesystems: this process may not make a mount namespace');
const mounting = mayMount ? test : test.skip;

/** Runs the benchmark in a directory that is a filesystem of its own. */
function onFilesystem(mount: string, change: Record<string, string>) {
  const at = mkdtempSync(join(directory, 'mounted-'));
  const script = `${mount.replace('AT', '"$0"')} && ${process.execPath} ${TPLA} "$@"; status=$?; ls "$0" | sed 's/^/left: /' >&2; exit $status`;
  return spawnSync('unshare', ['-rm', 'sh', '-c', script, at, ...argsOf({ ...change, directory: at })], { encoding: 'utf8' });
}

mounting('a full disk is one clear error, and leaves nothing', () => {
  for (const mechanism of ['io_uring', 'threads']) {
    const { status, stdout, stderr } = onFilesystem('mount -t tmpfs -o size=256k none AT', { tokens: '3000', mechanism });
    assert.is(status, ERRORS.IO_FAILED.exit, stderr);
    assert.match(stderr, /IO_FAILED: writing failed: No space left on device; .*mounted-.* must hold two files of/);
    assert.is(stderr.trim().split('\n').length, 1, stderr);
    assert.is(stdout, '');
  }
});

test('a limit on the size of files is one clear error, too', () => {
  const at = join(directory, 'limited');
  mkdirSync(at);
  // 65 pages: the arenas have room for 75 and may be as large, the file takes two blocks of 64.
  const args = argsOf({ directory: at, tokens: '1040', 'pages-per-block': '64' });
  const { status, stderr } = spawnSync('prlimit', [`--fsize=${100 * 3 * PAGE}`, process.execPath, TPLA, ...args], { encoding: 'utf8' });
  assert.is(status, ERRORS.IO_FAILED.exit, stderr);
  assert.match(stderr, /IO_FAILED: .*File too large/);
  assert.equal(readdirSync(at), []);
});

test('a benchmark that is killed in the middle of a write leaves no file', async () => {
  const at = join(directory, 'killed');
  mkdirSync(at);
  const run = spawn(process.execPath, [TPLA, ...argsOf({ directory: at, direction: 'write', iterations: '1000000', layers: '61', latent: '512', rope: '64' })], { stdio: 'ignore' });
  const exit = new Promise((resolve) => run.once('exit', resolve));
  const holds = () => readdirSync(`/proc/${run.pid}/fd`).some((fd) => {
    try {
      return readlinkSync(`/proc/${run.pid}/fd/${fd}`).includes('.blocks (deleted)');
    } catch {
      return false;
    }
  });
  try {
    await until(holds, 'the file to be made and to lose its name', 60_000);
    // The threads are in the middle of it.
    const before = writtenBy(run.pid!);
    await until(() => writtenBy(run.pid!) > before, 'blocks to be written', 60_000);
    assert.equal(readdirSync(at), []);
  } finally {
    run.kill('SIGKILL');
    await exit;
  }
  assert.equal(readdirSync(at), []);
});

/** Bytes that a process has sent to disks. */
const writtenBy = (pid: number) => Number(/^write_bytes: (\d+)$/m.exec(readFileSync(`/proc/${pid}/io`, 'utf8'))![1]);

test.run();
