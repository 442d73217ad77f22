// time limit: 180 s
import { spawnSync } from 'node:child_process';
import { closeSync, existsSync, mkdtempSync, openSync, readFileSync, readSync, realpathSync, rmSync, statfsSync, truncateSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { pagesFor, scatteredPages } from '../../src/bench/transfer/cases.js';
import { gpu, HOST, newArena } from '../../src/bench/transfer/memory.js';
import { differenceFromPattern, patternArena } from '../../src/bench/transfer/pattern.js';
import type { BenchRow } from '../../src/bench/transfer/rows.js';
import { setCuFileEnvironment } from '../../src/config/env.js';
import { ERRORS } from '../../src/errors.js';
import { native } from '../../src/native/loader.js';
import type { BlockFile, BlockRecord, KvArena, KvLayout, StorageEngine } from '../../src/native/types.js';
import { tpla, TPLA } from '../support/cli.js';
import { cuFileStandIn } from '../support/cufile_library.js';
import { failure } from '../support/handoff.js';

const addon = native();
setCuFileEnvironment();

const directory = mkdtempSync(join(tmpdir(), 'tpla-gpu-blocks-'));
const SEED = 77;
const TOKENS = 700;
const LAYOUT: KvLayout = { form: 'mla', ranks: 1, layers: 61, latent: 512, rope: 64, shared: 0, dtype: 'bf16', pageTokens: 64 };
/** Pages that end nowhere near where a disk's blocks do. */
const ODD: KvLayout = { ...LAYOUT, layers: 7, latent: 96, rope: 8, pageTokens: 48 };
let files = 0;
const path = () => join(directory, `${files++}.blocks`);
const open = (at: string, layout: KvLayout, engine: StorageEngine, pagesPerBlock: number) =>
  addon.openBlockFile({ path: at, layout, bytes: 64 << 20, threads: 2, depth: 8, engine, pagesPerBlock });

/** Where cuFile is, or why it cannot be used here: then its tests are skipped, and say so. */
function findCuFile(): { path: string; detail: string } | { missing: string } {
  try {
    open(path(), LAYOUT, 'cufile', 1).close();
    return addon.describeCuFile();
  } catch (error) {
    return { missing: (error as Error).message };
  }
}
const cuFile = findCuFile();
const isHere = 'path' in cuFile;
console.log(isHere ? `${cuFile.detail} (${cuFile.path})` : `skipping cuFile: ${cuFile.missing}`);

const test = suite('blocks of GPU memory in files');
const withCuFile = isHere ? test : test.skip;
test.after(() => rmSync(directory, { recursive: true }));

interface Block { slot: number; pages: Int32Array; record: BlockRecord }

async function blocksOf(arena: KvArena, table: Int32Array, pagesPerBlock: number): Promise<Block[]> {
  const { layout } = arena;
  const sums = await addon.kvChecksum(arena, [0, layout.layers], [0, TOKENS], [table]);
  const blockTokens = layout.pageTokens * pagesPerBlock;
  return Array.from({ length: Math.ceil(TOKENS / blockTokens) }, (_, index) => {
    const [begin, end] = [index * pagesPerBlock, Math.min((index + 1) * pagesPerBlock, table.length)];
    const checksum = sums.slice(begin, end).reduce((sum, one) => BigInt.asUintN(64, sum + one), 0n);
    return { slot: index, pages: table.slice(begin, end), record: { id: String(index).padStart(32, '0'), index, tokens: Math.min(blockTokens, TOKENS - index * blockTokens), checksum: String(checksum) } };
  });
}

const tableOf = (arena: KvArena) => scatteredPages(arena.layout, TOKENS, SEED)[0]!;

async function readInto(file: BlockFile, arena: KvArena, blocks: Block[], pagesPerBlock: number): Promise<boolean[]> {
  const table = tableOf(arena);
  return Promise.all(blocks.map(({ slot, pages, record }) => file.read(slot, arena, table.slice(slot * pagesPerBlock, slot * pagesPerBlock + pages.length), record)));
}

for (const engine of ['cufile', 'auto', 'io_uring', 'threads'] as const) {
  for (const [name, layout, pagesPerBlock] of [['pages', LAYOUT, 1], ['blocks of three pages', LAYOUT, 3], ['odd pages', ODD, 1], ['blocks of five odd pages', ODD, 5]] as const) {
    (engine === 'cufile' ? withCuFile : test)(`${name} go from the GPU to a file and back, and into host memory: ${engine}`, async () => {
      const at = path();
      const { arena, pages } = await patternArena(gpu(0), layout, TOKENS, SEED);
      const blocks = await blocksOf(arena, pages, pagesPerBlock);
      const file = open(at, layout, engine, pagesPerBlock);
      const { mechanism, passedOver } = await file.mechanism(arena);
      if (engine === 'cufile') assert.match(mechanism, /^cufile-(gds|compat)$/);
      else if (engine !== 'auto') assert.is(mechanism, engine);
      else if (mechanism !== 'cufile-gds') assert.match(passedOver!, /cuFile/);
      await Promise.all(blocks.map(({ slot, pages: own, record }) => file.write(slot, arena, own, record)));
      const back = newArena(gpu(0), layout, pagesFor(layout, TOKENS));
      assert.ok((await readInto(file, back, blocks, pagesPerBlock)).every((whole) => whole));
      assert.is(await differenceFromPattern(back, { tokens: TOKENS, seed: SEED, sourceDType: 'bf16' }), null);
      file.close();
      // Nothing in the file tells what moved it.
      const other = open(at, layout, 'threads', pagesPerBlock);
      assert.not.ok(other.fresh);
      const host = newArena(HOST, layout, pagesFor(layout, TOKENS));
      assert.ok((await readInto(other, host, blocks, pagesPerBlock)).every((whole) => whole));
      assert.is(await differenceFromPattern(host, { tokens: TOKENS, seed: SEED, sourceDType: 'bf16' }), null);
      other.close();
      for (const opened of [arena, back, host]) opened.close();
    });
  }

  (engine === 'cufile' ? withCuFile : test)(`flipped bytes and a file that was cut off are misses on the GPU, too: ${engine}`, async () => {
    const at = path();
    const { arena, pages } = await patternArena(gpu(0), LAYOUT, TOKENS, SEED);
    const [first, second] = await blocksOf(arena, pages, 3);
    const writing = open(at, LAYOUT, engine, 3);
    for (const { slot, pages: own, record } of [first!, second!]) await writing.write(slot, arena, own, record);
    writing.close();
    const blockBytes = 3 * 61 * 64 * 1152;
    const payload = 2 * 4096;
    for (const offset of [payload, payload + blockBytes / 2 + 1, payload + blockBytes - 1]) {
      flip(at, offset);
      const file = open(at, LAYOUT, engine, 3);
      assert.equal(await readInto(file, arena, [first!, second!], 3), [false, true], `byte ${offset}`);
      file.close();
      flip(at, offset);
    }
    const whole = readFileSync(at);
    truncateSync(at, payload + blockBytes + 4096 + 1_000_000);
    const file = open(at, LAYOUT, engine, 3);
    assert.equal(await readInto(file, arena, [first!, second!], 3), [true, false]);
    file.close();
    writeFileSync(at, whole);
    arena.close();
  });
}

function flip(at: string, offset: number): void {
  const fd = openSync(at, 'r+');
  const byte = Buffer.alloc(1);
  readSync(fd, byte, 0, 1, offset);
  writeSync(fd, Buffer.of(byte[0]! ^ 1), 0, 1, offset);
  closeSync(fd);
}

withCuFile('cuFile moves GPU memory only, and leaves no log behind', async () => {
  const file = open(path(), LAYOUT, 'cufile', 1);
  const host = newArena(HOST, LAYOUT, 2);
  assert.match((await failure(file.mechanism(host))).message, /cuFile moves GPU memory/);
  file.close();
  host.close();
  assert.not.ok(existsSync('cufile.log'));
});

const hiding = !isHere ? cuFile.missing : spawnSync('unshare', ['-m', 'true']).status === 0 ? null : 'this process may not make a mount namespace';
if (hiding !== null) console.log(`skipping a missing cuFile: ${hiding}`);
(hiding === null ? test : test.skip)('without cuFile blocks go through host memory, and the row says why', async () => {
  const args = [TPLA, 'bench-transfer', '--path', 'nvme', '--memory', 'gpu', '--layers', '4', '--tokens', '700', '--iterations', '1', '--warmup', '0', '--directory', directory, '--json'];
  const without = (...more: string[]) =>
    spawnSync('unshare', ['-m', 'sh', '-c', 'mount --bind /dev/null "$0" && exec "$@"', realpathSync((cuFile as { path: string }).path), process.execPath, ...args, ...more], { encoding: 'utf8' });
  const { status, stdout, stderr } = without();
  assert.is(status, 0, stderr);
  for (const row of (JSON.parse(stdout) as { rows: BenchRow[] }).rows.filter(({ path: by }) => by !== 'plain-file')) {
    assert.match(row.path, /^(io_uring|threads)$/);
    assert.match(row.storage!.passed_over!, /cuFile is not installed/);
    assert.ok(row.verified);
  }
  const asked = without('--mechanism', 'cufile');
  assert.is.not(asked.status, 0);
  assert.match(asked.stderr, /cuFile is not installed/);
});

// cuFile that says it has GPUDirect Storage, over pread, pwrite and the CUDA driver: what follows from its word, not the disk's DMA.
const isLocalDisk = [0xef53, 0x58465342].includes(statfsSync(directory).type);
if (!isLocalDisk) console.log('skipping GPUDirect Storage by a stand-in: the temporary directory is neither on ext4 nor on XFS (TMPDIR names another)');
(isLocalDisk ? test : test.skip)('GPUDirect Storage is taken where cuFile says it serves the filesystem, in as many pieces as it likes', async () => {
  const args = ['bench-transfer', '--path', 'nvme', '--memory', 'gpu', '--layers', '16', '--tokens', '700', '--pages-per-block', '8', '--iterations', '1', '--warmup', '0', '--directory', directory, '--json'];
  const library = cuFileStandIn(directory);
  const said = (env: Record<string, string>) => tpla(args, { env: { ...library, CUFILE_STAND_IN_NVFS_MAJOR: '2', CUFILE_STAND_IN_NVFS_MINOR: '25', CUFILE_STAND_IN_FILESYSTEMS: '0x10', ...env } });
  const paths = ({ stdout }: { stdout: string }) => (JSON.parse(stdout) as { rows: BenchRow[] }).rows.filter(({ path: by }) => by !== 'plain-file').map(({ path: by, storage, verified }) => [by, storage!.passed_over, verified]);
  const manners: Record<string, string>[] = [{}, { CUFILE_STAND_IN_PIECE: '1048576' }, { CUFILE_STAND_IN_BUFFER: '5013' }];
  for (const env of manners) {
    const found = await said(env);
    assert.is(found.status, 0, found.stderr);
    assert.equal(paths(found), [['cufile-gds', null, true], ['cufile-gds', null, true]]);
  }
  const elsewhere = await said({ CUFILE_STAND_IN_FILESYSTEMS: '0x4' });
  assert.is(elsewhere.status, 0, elsewhere.stderr);
  for (const [by, why, verified] of paths(elsewhere)) {
    assert.match(by as string, /^(io_uring|threads)$/);
    assert.is(why, 'cuFile 1.15, GPUDirect Storage by nvidia-fs 2.25, not for this filesystem');
    assert.ok(verified);
  }
  const failing = await said({ CUFILE_STAND_IN_WRITE: '5008' });
  assert.is(failing.status, ERRORS.IO_FAILED.exit);
  assert.match(failing.stderr, /IO_FAILED: writing failed: cuFile error \(5008\); /);
});

test('the benchmark sweeps memory, mechanisms and directions, verified', async () => {
  const mechanisms = isHere ? 'cufile,io_uring,threads' : 'io_uring,threads';
  const { status, stdout, stderr } = await tpla([
    'bench-transfer', '--path', 'nvme', '--directory', directory, '--memory', 'host,gpu', '--mechanism', mechanisms, '--pages-per-block', '1,4', '--layers', '8', '--tokens', '700', '--iterations', '2', '--warmup', '1', '--json',
  ]);
  assert.is(status, 0, stderr);
  const rows = (JSON.parse(stdout) as { rows: BenchRow[] }).rows.filter(({ path: by }) => by !== 'plain-file');
  assert.is(rows.length, (2 + mechanisms.split(',').length) * 2 * 2);
  for (const row of rows) assert.ok(row.verified && row.gb_per_s > 0, JSON.stringify(row));
  const of = (memory: string) => new Set(rows.filter(({ storage }) => storage!.memory === memory).map(({ path: by }) => by.replace(/-(gds|compat)$/, '')));
  assert.equal([...of('gpu')].sort(), mechanisms.split(',').sort());
  assert.equal([...of('host')].sort(), ['io_uring', 'threads']);
});

test.run();
