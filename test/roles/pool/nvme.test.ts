import { mkdtempSync, openSync, closeSync, rmSync, statSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { PoolConfig } from '../../../src/config/types.js';
import { WorkerClient } from '../../../src/http/client.js';
import { PoolClient } from '../../../src/kv/pool_client.js';
import type { PoolState } from '../../../src/kv/pool_protocol.js';
import { native } from '../../../src/native/loader.js';
import type { KvArena, KvLayout } from '../../../src/native/types.js';
import { blockBytes } from '../../../src/roles/pool/block_pool.js';
import { eventually, RoleProcess } from '../../support/role_process.js';
import { LAYOUT } from './layout.js';

const test = suite('pool/nvme');
const directory = mkdtempSync(join(tmpdir(), 'tpla-nvme-'));
test.after(() => rmSync(directory, { recursive: true }));
const addon = native();
const log = pino({ level: 'silent' });
const BLOCK = blockBytes(LAYOUT);
const SLOT = 4096 + Math.ceil(BLOCK / 4096) * 4096;
/** Room for two blocks is kept: an eighth. */
const DRAM_SLOTS = 16;
const BLOCKS = 40;

let serial = 0;
function config(diskSlots = 64): PoolConfig {
  const at = join(directory, `pool${serial++}`);
  return {
    listen: `unix:${at}.sock`, id: 'pool-0', channel_listen: `unix:${at}.channel`, dram_bytes: DRAM_SLOTS * BLOCK,
    nvme: { path: `${at}.blocks`, bytes: Math.max(4096 + diskSlots * SLOT, 1 << 20), queue_depth: 8 }, drain_ms: 1000, log_level: 'info',
  };
}

const ids = (begin: number, end: number) => Array.from({ length: end - begin }, (_, i) => (begin + i).toString(16).padStart(32, '0'));
const table = (pages: number) => [Int32Array.from({ length: pages }, (_, i) => i)];

function filled(pages: number): KvArena {
  const arena = new addon.KvArena(LAYOUT, pages);
  for (let layer = 0; layer < LAYOUT.layers; layer++) for (let page = 0; page < pages; page++) {
    const bytes = arena.page(0, layer, page);
    new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4).forEach((_, i, all) => { all[i] = layer * 100 + page + i / 1e5; });
  }
  return arena;
}

class Pool {
  readonly config: PoolConfig;
  process!: RoleProcess;
  worker!: PoolClient;
  http!: WorkerClient;

  constructor(settings: PoolConfig) {
    this.config = settings;
  }

  async start(layout: KvLayout = LAYOUT): Promise<this> {
    this.process = await RoleProcess.start('pool', this.config);
    this.http = new WorkerClient(this.config.listen);
    this.worker = new PoolClient({ address: this.config.listen, name: 'worker', layout, addon, log });
    await this.worker.ready;
    return this;
  }

  state(): Promise<PoolState> {
    return this.http.json<PoolState>('GET', '/state');
  }

  async metric(name: string): Promise<number> {
    return Number(new RegExp(`^${name.replace(/[{}]/g, '\\$&')} (\\d+)`, 'm').exec(await this.http.text('/metrics'))?.[1] ?? NaN);
  }

  /** Stores blocks two at a time, each pair once the one before is on disk. */
  async fill(source: KvArena, blocks: number): Promise<void> {
    for (let begin = 0; begin < blocks; begin += 2) {
      await this.worker.offer(ids(begin, begin + 2), begin, { arena: source, pages: table(blocks) });
      await eventually(async () => {
        const { pages, nvme } = await this.state();
        return pages.total - pages.used - pages.cached >= 2 || nvme!.blocks >= Math.min(nvme!.slots, begin + 2 - (DRAM_SLOTS - 2));
      }, 'blocks to be on disk');
    }
  }

  /** How many of the blocks [begin, end) are found, loaded and equal to the source's. */
  async check(source: KvArena, begin: number, end: number): Promise<number> {
    const lease = await this.worker.find(ids(begin, end));
    const target = new addon.KvArena(LAYOUT, end - begin);
    // Its pages stand where the blocks do in their sequence.
    const pages = [Int32Array.from({ length: end }, (_, page) => Math.max(0, page - begin))];
    const loaded = lease.blocks === 0 ? 0 : await this.worker.load(lease, 0, lease.blocks, { arena: target, pages: begin === 0 ? pages : table(end - begin) });
    lease.release();
    for (let block = 0; block < loaded; block++) for (let layer = 0; layer < LAYOUT.layers; layer++) {
      assert.is(Buffer.compare(target.page(0, layer, block), source.page(0, layer, begin + block)), 0, `block ${begin + block}, layer ${layer}`);
    }
    target.close();
    return loaded;
  }

  async end(): Promise<void> {
    await this.worker.close();
    await this.http.close();
  }
}

test('what memory has no room for goes to disk and comes back when it is asked for, verified', async () => {
  const pool = await new Pool(config()).start();
  const source = filled(BLOCKS);
  await pool.fill(source, BLOCKS);
  const { nvme } = await pool.state();
  assert.ok(['io_uring', 'threads'].includes(nvme!.engine));
  assert.is(await pool.metric(`tpla_pool_nvme_info{engine="${nvme!.engine}",direct="${nvme!.direct}"}`), 1);
  assert.ok(nvme!.blocks >= BLOCKS - DRAM_SLOTS, `${nvme!.blocks} blocks on disk`);
  assert.is(await pool.check(source, 0, 4), 4);
  assert.ok(await pool.metric('tpla_pool_nvme_loaded_blocks_total') >= 4);
  assert.ok(await pool.metric('tpla_pool_nvme_spilled_blocks_total') >= BLOCKS - DRAM_SLOTS);
  assert.is(await pool.metric('tpla_pool_nvme_corrupt_blocks_total'), 0);
  await pool.end();
  await pool.process.stop();
});

test('the pool is killed and started again: its blocks are found in the file', async () => {
  const pool = await new Pool(config()).start();
  const source = filled(BLOCKS);
  await pool.fill(source, BLOCKS);
  await pool.process.stop();
  await pool.end();
  await pool.start();
  await eventually(async () => (await pool.state()).nvme!.blocks >= BLOCKS - DRAM_SLOTS, 'the index to be recovered');
  assert.equal((await pool.state()).pages.cached, 0);
  assert.is(await pool.check(source, 0, 4), 4);
  // Forgotten blocks stay forgotten.
  await pool.http.json('POST', '/evict', {});
  await eventually(async () => (await pool.state()).nvme!.blocks === 0, 'the disk to be empty');
  await pool.process.stop();
  await pool.end();
  await pool.start();
  assert.is(await pool.check(source, 0, 4), 0);
  await pool.end();
  await pool.process.stop();
});

test('a block that changed on disk is a miss, and dropped', async () => {
  const pool = await new Pool(config()).start();
  const source = filled(BLOCKS);
  await pool.fill(source, BLOCKS);
  await pool.process.stop();
  await pool.end();
  const { path } = pool.config.nvme;
  const fd = openSync(path!, 'r+');
  for (let at = 4096; at < statSync(path!).size; at += SLOT) writeSync(fd, Buffer.of(0xff, 0x17, 0xff), 0, 3, at + 4096 + 1000);
  closeSync(fd);
  await pool.start();
  await eventually(async () => (await pool.state()).nvme!.blocks >= BLOCKS - DRAM_SLOTS, 'the index to be recovered');
  assert.is(await pool.check(source, 0, 4), 0);
  assert.ok(await pool.metric('tpla_pool_nvme_corrupt_blocks_total') >= 1);
  await pool.end();
  await pool.process.stop();
});

test('a disk that is full of blocks makes room for those in use; another layout, or a file of something else, starts empty', async () => {
  const settings = { ...config(1), id: 'small' };
  const slots = Math.floor((settings.nvme.bytes - 4096) / SLOT);
  const pool = await new Pool(settings).start();
  const blocks = slots + DRAM_SLOTS + 8;
  const source = filled(blocks);
  await pool.fill(source, blocks - blocks % 2);
  const { nvme } = await pool.state();
  assert.is(nvme!.slots, slots);
  assert.ok(nvme!.blocks <= slots);
  await pool.process.stop();
  await pool.end();
  await pool.start({ ...LAYOUT, layers: 2 });
  assert.is((await pool.state()).nvme!.blocks, 0);
  await pool.process.stop();
  await pool.end();
  writeFileSync(settings.nvme.path!, 'something else');
  await pool.start();
  assert.is((await pool.state()).nvme!.blocks, 0);
  await pool.end();
  await pool.process.stop();
});

test('a disk that cannot be used leaves the pool in memory', async () => {
  const settings = config();
  const pool = await new Pool({ ...settings, nvme: { ...settings.nvme, path: join(directory, 'nowhere/file') } }).start();
  assert.is((await pool.state()).nvme, null);
  const source = filled(2);
  await pool.worker.offer(ids(0, 2), 0, { arena: source, pages: table(2) });
  assert.is(await pool.check(source, 0, 2), 2);
  await pool.end();
  await pool.process.stop();
});

test.run();
