// time limit: 120 s
import { spawn } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, readFileSync, readSync, rmSync, statSync, truncateSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { native } from '../../src/native/loader.js';
import type { BlockFile, BlockFileOptions, BlockRecord, KvArena, KvLayout } from '../../src/native/types.js';
import { failure, fillCanonical } from '../support/handoff.js';

const addon = native();
const directory = mkdtempSync(join(tmpdir(), 'tpla-blocks-'));
test.after(() => rmSync(directory, { recursive: true }));

const ALIGNED: KvLayout = { form: 'mla', ranks: 1, layers: 3, latent: 448, rope: 64, shared: 0, dtype: 'bf16', pageTokens: 16 };
const ODD: KvLayout = { ...ALIGNED, latent: 52, rope: 8, pageTokens: 48 };
let files = 0;
const path = () => join(directory, `${files++}.blocks`);
const open = (options: Partial<BlockFileOptions> & { path: string }) => addon.openBlockFile({ layout: ALIGNED, bytes: 4 << 20, threads: 2, depth: 8, ...options });
const id = (n: number) => n.toString(16).padStart(32, '0');

async function record(arena: KvArena, page: number, tokens: number, index = 2): Promise<BlockRecord> {
  const table = new Int32Array(index + 1);
  table[index] = page;
  const first = index * arena.layout.pageTokens;
  const [checksum] = await addon.kvChecksum(arena, [0, arena.layout.layers], [first, first + tokens], [table]);
  return { id: id(page), index, tokens, checksum: String(checksum) };
}

function pageOf(arena: KvArena, page: number): Buffer {
  return Buffer.concat(Array.from({ length: arena.layout.layers }, (_, layer) => Buffer.from(arena.page(0, layer, page))));
}

function filled(layout: KvLayout, pages: number): KvArena {
  const arena = new addon.KvArena(layout, pages);
  for (let page = 0; page < pages; page++) fillCanonical(arena, Int32Array.of(page), [0, layout.pageTokens], page);
  return arena;
}

for (const engine of ['io_uring', 'threads'] as const) {
  for (const [name, layout] of [['aligned pages', ALIGNED], ['pages of an odd size', ODD]] as const) {
    test(`blocks come back as they were, also to another process's open: ${engine}, ${name}`, async () => {
      const arena = filled(layout, 8);
      const file = path();
      const records = await Promise.all(Array.from({ length: 4 }, (_, page) => record(arena, page, page === 3 ? 5 : layout.pageTokens)));
      const first = open({ path: file, layout, engine });
      assert.is(first.engine, engine);
      assert.ok(first.fresh);
      assert.equal(await first.scan(), []);
      await Promise.all(records.map((entry, page) => first.write(page + 1, arena, page, entry)));
      await first.erase(2);
      first.close();
      const second = open({ path: file, layout, engine });
      assert.not.ok(second.fresh);
      assert.equal(await second.scan(), [0, 2, 3].map((page) => ({ slot: page + 1, ...records[page]! })));
      for (const page of [0, 2]) {
        assert.ok(await second.read(page + 1, arena, page + 4, records[page]!));
        assert.is(Buffer.compare(pageOf(arena, page), pageOf(arena, page + 4)), 0);
      }
      assert.ok(await second.read(4, arena, 7, records[3]!));
      // What is asked for is not what the slot holds.
      assert.not.ok(await second.read(4, arena, 7, records[0]!));
      assert.not.ok(await second.read(2, arena, 7, records[1]!));
      second.close();
      arena.close();
    });
  }
}

for (const engine of ['io_uring', 'threads'] as const) {
  test(`blocks of several pages are one record, and the last one may be shorter: ${engine}`, async () => {
    const layout = { ...ODD, pageTokens: 16 };
    const arena = filled(layout, 12);
    const file = path();
    const blocks = open({ path: file, layout, engine, pagesPerBlock: 4 });
    assert.equal(await blocks.mechanism(arena), { mechanism: engine, passedOver: null });
    const records = await Promise.all(([[0, Int32Array.of(5, 1, 3, 0), 64], [1, Int32Array.of(2, 4), 21]] as const).map(async ([index, pages, tokens]) => {
      const table = new Int32Array(index * 4 + pages.length);
      table.set(pages, index * 4);
      const sums = await addon.kvChecksum(arena, [0, layout.layers], [index * 64, index * 64 + tokens], [table]);
      return { pages, record: { id: id(index), index, tokens, checksum: String(sums.reduce((sum, one) => BigInt.asUintN(64, sum + one), 0n)) } };
    }));
    await Promise.all(records.map(({ pages, record: entry }, slot) => blocks.write(slot, arena, pages, entry)));
    blocks.close();
    // A block is not a page: the same file with another cut is another file.
    const again = open({ path: file, layout, engine, pagesPerBlock: 4 });
    assert.equal(await again.scan(), records.map(({ record: entry }, slot) => ({ slot, ...entry })));
    assert.ok(await again.read(0, arena, Int32Array.of(8, 9, 10, 11), records[0]!.record));
    for (const [from, to] of [[5, 8], [1, 9], [3, 10], [0, 11]] as const) assert.is(Buffer.compare(pageOf(arena, from), pageOf(arena, to)), 0);
    assert.ok(await again.read(1, arena, Int32Array.of(6, 7), records[1]!.record));
    // Pages in another order are not what was stored.
    const swapped = Int32Array.of(7, 6);
    assert.ok(await again.read(1, arena, swapped, records[1]!.record));
    assert.is(Buffer.compare(pageOf(arena, 2), pageOf(arena, 7)), 0);
    for (const pages of [Int32Array.of(6), Int32Array.of(6, 7, 8), new Int32Array(0)]) {
      assert.match((await failure(again.read(1, arena, pages, records[1]!.record))).message, /pages came for 21 tokens/);
    }
    again.close();
    const other = open({ path: file, layout, engine, pagesPerBlock: 3 });
    assert.ok(other.fresh);
    other.close();
    arena.close();
  });
}

test('memory of another layout is refused, and so is host memory where cuFile is wanted', async () => {
  const arena = filled({ ...ALIGNED, layers: 2 }, 1);
  const blocks = open({ path: path() });
  assert.match((await failure(blocks.write(0, arena, 0, await record(arena, 0, 16)))).message, /another layout/);
  blocks.close();
  arena.close();
  const same = filled(ALIGNED, 1);
  // Where cuFile is not installed the file cannot be opened for it; where it is, the pages are on the wrong side.
  const wanted = await failure((async () => {
    const file = open({ path: path(), engine: 'cufile' });
    try {
      await file.write(0, same, 0, await record(same, 0, 16));
    } finally {
      file.close();
    }
  })());
  assert.is(wanted.code, 'REQUEST_INVALID');
  assert.match(wanted.message, /cuFile is not installed|cuFile does not start|cuFile moves GPU memory/);
  same.close();
});

test('a plain file is as long as what was written, and a shorter one cannot be read', async () => {
  const file = path();
  for (const engine of ['auto', 'threads'] as const) {
    const plain = addon.openPlainFile(file, engine, 4);
    assert.ok(await plain.write(5_000_000) > 0);
    assert.is(statSync(file).size, Math.ceil(5_000_000 / 4096) * 4096);
    assert.ok(await plain.read(5_000_000) > 0);
    truncateSync(file, 4_000_000);
    assert.is((await failure(plain.read(5_000_000))).code, 'IO_FAILED');
    plain.close();
    assert.is((await failure(Promise.resolve().then(() => plain.read(1)))).code, 'IO_FAILED');
  }
});

async function oneBlock(): Promise<{ file: string; arena: KvArena; entry: BlockRecord; reopen(): BlockFile }> {
  const arena = filled(ALIGNED, 2);
  const file = path();
  const entry = await record(arena, 0, 16);
  const blocks = open({ path: file });
  await blocks.write(0, arena, 0, entry);
  blocks.close();
  return { file, arena, entry, reopen: () => open({ path: file }) };
}

test('flipped bytes are found, in the rows and in the header', async () => {
  const { file, arena, entry, reopen } = await oneBlock();
  const payload = ALIGNED.layers * ALIGNED.pageTokens * 1024;
  for (const offset of [4096 + 4096, 4096 + 4096 + payload - 1, 4096 + 4096 + 20_001]) {
    const fd = openSync(file, 'r+');
    const byte = Buffer.alloc(1);
    readSync(fd, byte, 0, 1, offset);
    writeSync(fd, Buffer.of(byte[0]! ^ 1), 0, 1, offset);
    const blocks = reopen();
    assert.equal((await blocks.scan()).length, 1);
    assert.not.ok(await blocks.read(0, arena, 1, entry), `byte ${offset}`);
    blocks.close();
    writeSync(fd, byte, 0, 1, offset);
    closeSync(fd);
  }
  for (let offset = 0; offset < 80; offset += 3) {
    const fd = openSync(file, 'r+');
    const byte = Buffer.alloc(1);
    readSync(fd, byte, 0, 1, 4096 + offset);
    writeSync(fd, Buffer.of(byte[0]! ^ 0x40), 0, 1, 4096 + offset);
    const blocks = reopen();
    assert.equal(await blocks.scan(), [], `header byte ${offset}`);
    assert.not.ok(await blocks.read(0, arena, 1, entry));
    blocks.close();
    writeSync(fd, byte, 0, 1, 4096 + offset);
    closeSync(fd);
  }
  const blocks = reopen();
  assert.ok(await blocks.read(0, arena, 1, entry));
  blocks.close();
  arena.close();
});

test('a file that was cut off loses what was cut, and nothing else', async () => {
  const { file, arena, entry, reopen } = await oneBlock();
  for (const bytes of [4096 + 4096 + 10_000, 4096 + 100, 4096]) {
    const whole = readFileSync(file);
    truncateSync(file, bytes);
    const blocks = reopen();
    assert.not.ok(blocks.fresh);
    assert.not.ok(await blocks.read(0, arena, 1, entry), `${bytes} bytes left`);
    blocks.close();
    writeFileSync(file, whole);
  }
  assert.ok(statSync(file).size > 1 << 20);
  const blocks = reopen();
  assert.ok(await blocks.read(0, arena, 1, entry));
  blocks.close();
  arena.close();
});

test('another layout, or something else in the file, starts afresh', async () => {
  const { file, arena } = await oneBlock();
  const other = open({ path: file, layout: { ...ALIGNED, layers: 2 } });
  assert.ok(other.fresh);
  assert.equal(await other.scan(), []);
  other.close();
  writeFileSync(file, 'not a block file');
  const blocks = open({ path: file });
  assert.ok(blocks.fresh);
  blocks.close();
  arena.close();
});

test('a writer that is killed leaves no block that looks whole and is not', async () => {
  const file = path();
  const script = `
    import { native } from ${JSON.stringify(join(import.meta.dirname, '../../src/native/loader.ts'))};
    import { fillCanonical } from ${JSON.stringify(join(import.meta.dirname, '../support/handoff.ts'))};
    const addon = native();
    const layout = ${JSON.stringify(ALIGNED)};
    const file = addon.openBlockFile({ path: ${JSON.stringify(file)}, layout, bytes: ${4 << 20}, threads: 2, depth: 8 });
    const arena = new addon.KvArena(layout, 2);
    process.stdout.write('writing\\n');
    for (let round = 0; ; round++) {
      fillCanonical(arena, Int32Array.of(0), [0, 16], round);
      const [checksum] = await addon.kvChecksum(arena, [0, 3], [0, 16], [Int32Array.of(0)]);
      await Promise.all(Array.from({ length: 40 }, (_, slot) => file.write(slot, arena, 0, { id: (round * 64 + slot).toString(16).padStart(32, '0'), index: 0, tokens: 16, checksum: String(checksum) })));
    }`;
  const arena = filled(ALIGNED, 2);
  for (let round = 0; round < 4; round++) {
    const child = spawn(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script], { stdio: ['ignore', 'pipe', 'inherit'] });
    await new Promise((resolve) => child.stdout.once('data', resolve));
    if (round === 0) assert.match((await failure(Promise.resolve().then(() => open({ path: file })))).message, /in use by another process/);
    await new Promise((resolve) => setTimeout(resolve, 40 + round * 35));
    child.kill('SIGKILL');
    await new Promise((resolve) => child.once('exit', resolve));
    const blocks = open({ path: file });
    for (const { slot, ...entry } of await blocks.scan()) assert.ok(await blocks.read(slot, arena, 1, entry), `slot ${slot}`);
    blocks.close();
  }
  arena.close();
});

test('wrong use is refused', async () => {
  const file = path();
  assert.is((await failure(Promise.resolve().then(() => open({ path: file, bytes: 1 << 12 })))).code, 'REQUEST_INVALID');
  assert.is((await failure(Promise.resolve().then(() => open({ path: file, layout: { ...ALIGNED, form: 'dcp', ranks: 2 } })))).code, 'REQUEST_INVALID');
  assert.is((await failure(Promise.resolve().then(() => open({ path: join(directory, 'nowhere/file') })))).code, 'IO_FAILED');
  const blocks = open({ path: file });
  const arena = filled(ALIGNED, 1);
  const entry = await record(arena, 0, 16);
  for (const [slot, page] of [[-1, 0], [blocks.slots, 0], [0, 1]] as const) {
    assert.is((await failure(Promise.resolve().then(() => blocks.write(slot, arena, page, entry)))).code, 'REQUEST_INVALID');
  }
  blocks.close();
  assert.is((await failure(Promise.resolve().then(() => blocks.scan()))).code, 'IO_FAILED');
  arena.close();
});

test.run();
