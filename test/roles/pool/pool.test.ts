import { spawn } from 'node:child_process';
import { closeSync, existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { pino } from 'pino';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import type { PoolConfig } from '../../../src/config/types.js';
import { WorkerClient } from '../../../src/http/client.js';
import { PoolClient, type KvSequence } from '../../../src/kv/pool_client.js';
import type { PoolState } from '../../../src/kv/pool_protocol.js';
import { native } from '../../../src/native/loader.js';
import type { KvArena, KvLayout, SharedMemory } from '../../../src/native/types.js';
import { blockBytes } from '../../../src/roles/pool/block_pool.js';
import { startPool } from '../../../src/roles/pool/index.js';
import type { RunningRole } from '../../../src/roles/role.js';
import { eventually, RoleProcess } from '../../support/role_process.js';
import { NO_DISK } from '../../support/worker_stack.js';
import { LAYOUT } from './layout.js';

const directory = mkdtempSync(join(tmpdir(), 'tpla-pool-'));
test.after(() => rmSync(directory, { recursive: true }));
const addon = native();
const log = pino({ level: 'silent' });
const BLOCK = blockBytes(LAYOUT);

let serial = 0;
function config(slots = 16): PoolConfig {
  const name = `pool${serial++}`;
  return { listen: `unix:${directory}/${name}.sock`, id: name, channel_listen: `unix:${directory}/${name}.channel`, dram_bytes: slots * BLOCK, nvme: NO_DISK, drain_ms: 1000, log_level: 'info' };
}

interface Setup {
  config: PoolConfig;
  role: RunningRole;
  http: WorkerClient;
  state(): Promise<PoolState>;
  connect(layout?: KvLayout, name?: string): Promise<PoolClient>;
  end(): Promise<void>;
}

async function setup(slots?: number): Promise<Setup> {
  const settings = config(slots);
  const role = await startPool(settings, { log, clock: { now: () => performance.now() } });
  const http = new WorkerClient(settings.listen);
  const clients: PoolClient[] = [];
  return {
    config: settings, role, http,
    state: () => http.json<PoolState>('GET', '/state'),
    async connect(layout = LAYOUT, name = 'worker') {
      const client = new PoolClient({ address: settings.listen, name, layout, addon, log });
      clients.push(client);
      await client.ready;
      return client;
    },
    async end() {
      for (const client of clients) await client.close();
      await http.close();
      await role.close();
    },
  };
}

function id(text: string): string {
  return Buffer.from(text).toString('hex').padEnd(32, '0').slice(0, 32);
}
const ids = (...names: string[]) => names.map(id);

/** An arena whose page p of layer l is filled with numbers that depend on both. */
function filled(pages: number, layout: KvLayout = LAYOUT): KvArena {
  const arena = new addon.KvArena(layout, pages);
  for (let layer = 0; layer < layout.layers; layer++) for (let page = 0; page < pages; page++) {
    const bytes = arena.page(0, layer, page);
    new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4).forEach((_, i, all) => { all[i] = layer * 100 + page + i / 1e5; });
  }
  return arena;
}

function sequence(arena: KvArena, ...pages: number[]): KvSequence {
  return { arena, pages: [Int32Array.from(pages)] };
}

/** Whether `tokens` tokens of the two sequences are the same in canonical form. */
async function sameTokens(a: KvSequence, b: KvSequence, tokens: number): Promise<boolean> {
  const layout = { ...a.arena.layout, form: 'mla' as const, ranks: 1 };
  const pages = Math.ceil(tokens / layout.pageTokens);
  const bytes = await Promise.all([a, b].map(async ({ arena, pages: src, rank }) => {
    const flat = new addon.KvArena(layout, pages);
    const table = Int32Array.from({ length: pages }, (_, i) => i);
    await addon.kvPut({ src: arena, dst: flat, layers: [0, layout.layers], tokens: [0, tokens], srcPages: src, dstPages: [table], ...(rank === undefined ? {} : { srcRank: rank }) });
    return Buffer.concat(Array.from({ length: layout.layers * pages }, (_, i) => Buffer.from(flat.page(0, Math.floor(i / pages), i % pages))));
  }));
  return bytes[0]!.equals(bytes[1]!);
}

test('blocks that one worker offers, another finds, loads and gives back', async () => {
  const pool = await setup();
  const [writer, reader] = [await pool.connect(LAYOUT, 'prefill'), await pool.connect(LAYOUT, 'decode')];
  const source = sequence(filled(6), 5, 1, 3);
  await writer.offer(ids('a', 'b', 'c'), 0, source);
  assert.equal((await pool.state()).pages, { total: 16, used: 0, cached: 3 });

  const lease = await reader.find(ids('a', 'b', 'c', 'd'));
  assert.is(lease.blocks, 3);
  assert.is((await pool.state()).pages.used, 3);
  const target = sequence(new addon.KvArena(LAYOUT, 4), 2, 0, 1);
  assert.is(await reader.load(lease, 0, 2, target), 2);
  assert.is(await reader.load(lease, 2, 3, target), 3);
  assert.ok(await sameTokens(source, target, 192));
  lease.release();
  lease.release();
  await eventually(async () => (await pool.state()).pages.used === 0, 'the pins to be gone');
  assert.equal((await pool.state()).clients, 2);
  await pool.end();
});

test('blocks later in a sequence are stored and found as such', async () => {
  const pool = await setup();
  const client = await pool.connect();
  const source = sequence(filled(4), 0, 1, 2, 3);
  await client.offer(ids('a', 'b'), 0, source);
  await client.offer(ids('c', 'd'), 2, source);
  const lease = await client.find(ids('a', 'b', 'c', 'd'));
  const target = sequence(new addon.KvArena(LAYOUT, 4), 3, 2, 1, 0);
  assert.is(await client.load(lease, 1, 4, target), 4);
  assert.is(await client.load(lease, 0, 1, target), 1);
  assert.ok(await sameTokens(source, target, 256));
  await pool.end();
});

for (const [form, ranks] of [['tpla', 2], ['dcp', 2], ['dp', 2]] as const) {
  test(`a ${form} sequence is parked with its partial page and comes back, elsewhere`, async () => {
    const pool = await setup();
    const client = await pool.connect();
    const layout: KvLayout = { ...LAYOUT, form, ranks };
    const arena = new addon.KvArena(layout, 12);
    const rank = form === 'dp' ? 1 : undefined;
    const place = (first: number): KvSequence => ({
      arena, rank, pages: form === 'dcp' ? [Int32Array.of(first, first + 1), Int32Array.of(first, first + 1)] : [Int32Array.of(first, first + 1, first + 2, first + 3)],
    });
    const original = sequence(filled(4), 0, 1, 2, 3);
    const before = place(0);
    await addon.kvPut({ src: original.arena, dst: arena, layers: [0, 3], tokens: [0, 230], srcPages: original.pages, dstPages: before.pages, ...(rank === undefined ? {} : { dstRank: rank }) });
    await client.offer(ids('a'), 0, original);

    const lease = await client.park(ids('a', 'b'), 230, before);
    assert.is(lease.blocks, 4);
    assert.equal((await pool.state()).pages, { total: 16, used: 4, cached: 0 });
    const after = place(6);
    assert.is(await client.load(lease, 0, lease.blocks, after), 4);
    assert.ok(await sameTokens(original, after, 230));
    lease.release();
    await eventually(async () => (await pool.state()).pages.used === 0, 'the pins to be gone');
    assert.is((await pool.state()).pages.cached, 2, 'what has no shareable name is forgotten');
    await pool.end();
  });
}

test('when all is pinned, parking stores the beginning; offering stores nothing', async () => {
  const pool = await setup(3);
  const client = await pool.connect();
  const source = sequence(filled(5), 0, 1, 2, 3, 4);
  const lease = await client.park([], 64 * 5, source);
  assert.is(lease.blocks, 3);
  await client.offer(ids('x'), 0, source);
  assert.is((await client.find(ids('x'))).blocks, 0);
  lease.release();
  await eventually(async () => (await pool.state()).pages.used === 0, 'the pins to be gone');
  assert.ok(client.connected);
  await pool.end();
});

/** The pool's memory, as any worker gets it. */
async function memoryOf(pool: Setup): Promise<SharedMemory> {
  return new Promise((resolve) => {
    void addon.connectChannel(pool.config.channel_listen.slice('unix:'.length), {
      onMessage(_channel, _message, fds) {
        resolve(addon.SharedMemory.map(fds[0]!, pool.config.dram_bytes));
        fds.forEach((fd) => closeSync(fd));
      },
      onClose() {},
    }).then((channel) => channel.send(Buffer.from(JSON.stringify({ type: 'hello', protocol: 1, name: 'vandal', layout: LAYOUT }))));
  });
}

test('a flipped bit is a miss: the block is dropped and never handed on', async () => {
  const pool = await setup();
  const [writer, reader] = [await pool.connect(), await pool.connect()];
  const source = sequence(filled(3), 0, 1, 2);
  await writer.offer(ids('a', 'b', 'c'), 0, source);
  const lease = await reader.find(ids('a', 'b', 'c'));
  const memory = await memoryOf(pool);
  const slots = memory.bytes / BLOCK;
  const page = BLOCK / LAYOUT.layers;
  // Slot of block b: blocks were reserved in order from slot 0. Last layer, somewhere in the page.
  new Uint8Array(memory.buffer)[2 * slots * page + page + 777]! ^= 4;
  const target = sequence(new addon.KvArena(LAYOUT, 3), 0, 1, 2);
  assert.is(await reader.load(lease, 0, 3, target), 1);
  assert.is(reader.counters.corruptBlocks, 1);
  assert.ok(await sameTokens(source, target, 64));
  assert.ok(target.arena.page(0, 0, 1).every((byte) => byte === 0), 'nothing was copied from the damaged block on');
  lease.release();
  assert.is((await writer.find(ids('a', 'b', 'c'))).blocks, 1);
  await writer.offer(ids('a', 'b', 'c'), 0, source);
  assert.is((await reader.find(ids('a', 'b', 'c'))).blocks, 3);
  memory.close();
  await pool.end();
});

test('a commit whose bytes are not what it says is refused', async () => {
  const pool = await setup();
  const client = await pool.connect();
  const lying = Object.assign(Object.create(Object.getPrototypeOf(addon) as object) as typeof addon, addon, {
    kvPut: async (put: Parameters<typeof addon.kvPut>[0]) => {
      const result = await addon.kvPut(put);
      result.checksums[0]! ^= 1n;
      return result;
    },
  });
  const liar = new PoolClient({ address: pool.config.listen, name: 'liar', layout: LAYOUT, addon: lying, log });
  await liar.ready;
  await liar.offer(ids('a', 'b'), 0, sequence(filled(2), 0, 1));
  assert.is((await client.find(ids('a', 'b'))).blocks, 0);
  assert.equal((await pool.state()).pages, { total: 16, used: 0, cached: 1 });
  assert.match(await pool.http.text('/metrics'), /tpla_pool_refused_blocks_total 1/);
  await liar.close();
  await pool.end();
});

test('kill -9 of a worker releases its pins and its half-written blocks', async () => {
  const pool = await setup();
  const child = spawn(process.execPath, ['--import', 'tsx', fileURLToPath(new URL('./holder.ts', import.meta.url)), pool.config.listen], { stdio: ['ignore', 'pipe', 'inherit'] });
  await new Promise<void>((resolve) => child.stdout.once('data', () => resolve()));
  assert.equal((await pool.state()).pages, { total: 16, used: 6, cached: 0 });
  child.kill('SIGKILL');
  await eventually(async () => (await pool.state()).clients === 0, 'the pool to notice');
  const { pages } = await pool.state();
  assert.is(pages.used, 0);
  assert.is(pages.cached, 4);
  await pool.end();
});

test('a worker outlives its pool: kill -9 is a cache loss, a new pool is found again', async () => {
  const settings = config();
  let role = await RoleProcess.start('pool', settings);
  const client = new PoolClient({ address: settings.listen, name: 'worker', layout: LAYOUT, addon, log });
  await client.ready;
  const source = sequence(filled(2), 0, 1);
  await client.offer(ids('a', 'b'), 0, source);
  const lease = await client.find(ids('a', 'b'));
  assert.is(lease.blocks, 2);
  await role.stop('SIGKILL');
  await eventually(() => !client.connected, 'the client to notice');
  assert.is(lease.blocks, 0);
  assert.is(await client.load(lease, 0, 2, sequence(new addon.KvArena(LAYOUT, 2), 0, 1)), 0);
  assert.is((await client.find(ids('a', 'b'))).blocks, 0);
  await client.offer(ids('a'), 0, source);
  assert.is((await client.park([], 100, source)).blocks, 0);
  lease.release();

  assert.ok(existsSync(settings.listen.slice(5)), 'kill -9 leaves the socket file, which the next process replaces');
  role = await RoleProcess.start('pool', settings);
  await eventually(() => client.connected, 'the client to connect again');
  assert.is((await client.find(ids('a', 'b'))).blocks, 0);
  await client.offer(ids('a', 'b'), 0, source);
  assert.is((await client.find(ids('a', 'b'))).blocks, 2);
  await client.close();
  assert.is((await role.stop('SIGTERM')).status, 0);
  assert.not.ok(existsSync(settings.listen.slice(5)));
  assert.not.ok(existsSync(settings.channel_listen.slice(5)));
});

test('a worker that comes before its pool connects later', async () => {
  const settings = config();
  const client = new PoolClient({ address: settings.listen, name: 'early', layout: LAYOUT, addon, log });
  await client.ready;
  assert.not.ok(client.connected);
  const role = await startPool(settings, { log, clock: { now: () => performance.now() } });
  await eventually(() => client.connected, 'the client to connect');
  await client.close();
  await role.close();
});

test('a worker of another shape is refused while others are connected, and served once they are gone', async () => {
  const pool = await setup();
  const first = await pool.connect();
  await first.offer(ids('a'), 0, sequence(filled(1), 0));
  const other: KvLayout = { ...LAYOUT, layers: 2 };
  const second = await pool.connect(other, 'other model');
  assert.not.ok(second.connected);
  await first.close();
  await eventually(() => second.connected, 'the second to be let in');
  assert.equal((await pool.state()).layout!.layers, 2);
  assert.is((await pool.state()).pages.cached, 0);
  await second.offer(ids('a'), 0, sequence(filled(1, other), 0));
  assert.is((await second.find(ids('a'))).blocks, 1);
  await pool.end();
});

test('strangers and malformed requests are refused without harm', async () => {
  const pool = await setup();
  const client = await pool.connect();
  const post = async (path: string, body: unknown): Promise<string> => {
    try {
      await pool.http.json('POST', path, body);
      return 'ok';
    } catch (error) {
      return (error as { code: string }).code;
    }
  };
  assert.is(await post('/lookup', { client: 'stranger', ids: [] }), 'PROTOCOL');
  assert.is(await post('/lookup', { client: 'stranger' }), 'REQUEST_INVALID');
  assert.is(await post('/reserve', { client: 'stranger', ids: ['short'], pin: true }), 'REQUEST_INVALID');
  assert.is(await post('/commit', { client: 'x', blocks: [{ id: id('a'), slot: -1, index: 0, tokens: 64, checksum: '1' }], pin: true }), 'REQUEST_INVALID');
  assert.is(await post('/nowhere', {}), 'NOT_FOUND');
  for (const message of ['', 'no json', '{"type":"hello"}', 'null', '{"type":"hello","name":"x","protocol":1,"layout":{"form":"mla","ranks":1,"layers":-5}}']) {
    let closed = '';
    const channel = await addon.connectChannel(pool.config.channel_listen.slice(5), {
      onMessage(_channel, answer) { closed = Buffer.from(answer).toString(); },
      onClose(_channel, reason) { closed ||= reason; },
    });
    channel.send(Buffer.from(message));
    await eventually(() => closed !== '', 'the pool to answer');
    assert.not.match(closed, /welcome/);
    channel.close();
  }
  assert.ok(client.connected);
  assert.equal((await pool.http.json<{ status: string }>('GET', '/health')).status, 'ok');
  await pool.end();
});

test('an address in use, or a file that is no socket, is said so', async () => {
  const pool = await setup();
  const code = (listen: Partial<PoolConfig>) => startPool({ ...config(), ...listen }, { log, clock: { now: () => 0 } }).then(() => 'started', (error: { code: string }) => error.code);
  assert.is(await code({ listen: pool.config.listen }), 'ADDRESS_IN_USE');
  assert.is(await code({ channel_listen: pool.config.channel_listen }), 'ADDRESS_IN_USE');
  writeFileSync(join(directory, 'file'), '');
  assert.is(await code({ channel_listen: `unix:${directory}/file` }), 'ADDRESS_IN_USE');
  assert.is(await code({ channel_listen: 'tcp://127.0.0.1:9' }), 'CONFIG_INVALID');
  await pool.end();
});

test.run();
