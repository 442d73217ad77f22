/** The pool's memory, what lies in it, and the workers that use it. */
import { randomBytes } from 'node:crypto';
import type { Logger } from 'pino';
import type { NvmeConfig } from '../../config/types.js';
import { TplaError } from '../../errors.js';
import { consecutiveRuns, slotTable, tokenRange } from '../../kv/block_runs.js';
import { POOL_PROTOCOL, type CommitRequest, type LookupRequest, type PoolAnswer, type PoolHello, type PoolState, type Reservation, type ReserveRequest, type StoredBlock, type UnpinRequest } from '../../kv/pool_protocol.js';
import type { KvLayout, KvRegion, NativeModule, SharedMemory } from '../../native/types.js';
import { BlockIndex } from './block_index.js';
import { NvmeTier, type Memory, type NvmeCounters, type NvmeState } from './nvme_tier.js';

export type PoolNative = Pick<NativeModule, 'SharedMemory' | 'mapKvRegion' | 'kvChecksum' | 'listenChannel' | 'openBlockFile'>;

/** The memory cut into slots of one layout. The first worker decides the layout; it can change once nobody is connected. */
interface Shelf {
  layout: KvLayout;
  region: KvRegion;
  index: BlockIndex;
  /** Where blocks are kept on disk too. */
  tier: NvmeTier | null;
}

/** The disk behind the memory, if there is one. */
export interface PoolDisk {
  config: NvmeConfig & { path: string };
  log: Logger;
}

export interface PoolCounters {
  lookups: number;
  hitBlocks: number;
  missedBlocks: number;
  storedBlocks: number;
  refusedBlocks: number;
  evictedBlocks: number;
}

export class BlockPool {
  readonly memory: SharedMemory;
  readonly counters: PoolCounters = { lookups: 0, hitBlocks: 0, missedBlocks: 0, storedBlocks: 0, refusedBlocks: 0, evictedBlocks: 0 };
  readonly nvmeCounters: NvmeCounters = { spilledBlocks: 0, loadedBlocks: 0, corruptBlocks: 0, failedWrites: 0 };
  readonly #native: PoolNative;
  readonly #disk: PoolDisk | null;
  readonly #clients = new Map<string, string>();
  #shelf: Shelf | null = null;
  #verifying = 0;

  constructor(native: PoolNative, bytes: number, disk: PoolDisk | null = null) {
    this.#native = native;
    this.#disk = disk;
    this.memory = native.SharedMemory.create(bytes, 'tpla-kv-pool');
  }

  get clients(): number {
    return this.#clients.size;
  }

  get layout(): KvLayout | null {
    return this.#shelf?.layout ?? null;
  }

  get pages(): PoolState['pages'] {
    return this.#shelf?.index.counts ?? { total: 0, used: 0, cached: 0 };
  }

  /** null without a disk, or before the first worker has decided the layout. */
  get nvme(): NvmeState | null {
    return this.#shelf?.tier?.state ?? null;
  }

  join(hello: PoolHello): PoolAnswer {
    if (hello.protocol !== POOL_PROTOCOL) return refuse(`this pool speaks protocol ${POOL_PROTOCOL}, the worker ${hello.protocol}; run the same version of tpla on both`);
    const { layout } = hello;
    if (layout.form !== 'mla' || layout.ranks !== 1) return refuse(`the pool holds canonical blocks (mla, one rank); the worker offers ${layout.form} over ${layout.ranks}`);
    if (!this.#shelf || !sameLayout(this.#shelf.layout, layout)) {
      if (this.#shelf && (this.#clients.size > 0 || this.#verifying > 0)) {
        return refuse(`this pool holds blocks of ${describe(this.#shelf.layout)}, the worker has ${describe(layout)}; give it a pool of its own, or the same model, kv.dtype and kv.page_tokens`);
      }
      const answer = this.#build(layout);
      if (answer) return answer;
    }
    const client = randomBytes(12).toString('hex');
    this.#clients.set(client, hello.name);
    return { type: 'welcome', client, slots: this.pages.total };
  }

  leave(client: string): void {
    if (!this.#clients.delete(client)) return;
    this.#shelf?.index.dropClient(client);
    this.#shelf?.tier?.spill();
  }

  /** What is on disk is brought back first. */
  async lookup({ client, ids }: LookupRequest): Promise<StoredBlock[]> {
    this.#indexOf(client);
    const release = await this.#shelf!.tier?.load(ids);
    let blocks: StoredBlock[];
    try {
      blocks = this.#indexOf(client).lookup(client, ids);
    } finally {
      release?.();
    }
    this.counters.lookups++;
    this.counters.hitBlocks += blocks.length;
    this.counters.missedBlocks += ids.length - blocks.length;
    return blocks;
  }

  reserve({ client, ids, pin }: ReserveRequest): Reservation[] {
    return this.#indexOf(client).reserve(client, ids, pin);
  }

  /** Verifies what was written; a block whose memory is not what its checksum says is given up. */
  async commit({ client, blocks, pin }: CommitRequest): Promise<boolean[]> {
    const index = this.#indexOf(client);
    const writing = (block: CommitRequest['blocks'][number]) => index.isWriting(client, block.id, block.slot);
    const sums = await this.#checksums(blocks.filter(writing));
    const stored = blocks.map((block) => {
      if (!writing(block)) return false;
      if (sums.get(block.slot) !== block.checksum) {
        index.unpin(client, [block.slot]);
        this.counters.refusedBlocks++;
        return false;
      }
      index.commit(client, block, pin);
      this.counters.storedBlocks++;
      return true;
    });
    this.#shelf?.tier?.spill();
    return stored;
  }

  unpin({ client, slots }: UnpinRequest): void {
    this.#indexOf(client).unpin(client, slots);
    this.#shelf?.tier?.spill();
  }

  /** From the disk, too. */
  async evict(ids?: string[]): Promise<number> {
    const evicted = this.#shelf?.index.evict(ids) ?? 0;
    await this.#shelf?.tier?.evict(ids);
    return evicted;
  }

  check(): string[] {
    return this.#shelf?.index.check() ?? [];
  }

  get evictions(): number {
    return this.counters.evictedBlocks + (this.#shelf?.index.evictions ?? 0);
  }

  close(): void {
    this.#shelf?.tier?.close();
    this.#shelf?.region.close();
    this.#shelf = null;
    this.memory.close();
  }

  /** By slot, checksums of what the memory holds. */
  async #checksums(blocks: StoredBlock[]): Promise<Map<number, string>> {
    const { region, layout } = this.#shelf!;
    const sums = new Map<number, string>();
    this.#verifying++;
    try {
      for (const run of consecutiveRuns(blocks, layout.pageTokens)) {
        const found = await this.#native.kvChecksum(region, [0, layout.layers], tokenRange(run, layout.pageTokens), [slotTable(run)]);
        run.forEach(({ slot }, i) => sums.set(slot, String(found[i])));
      }
    } finally {
      this.#verifying--;
    }
    return sums;
  }

  #indexOf(client: string): BlockIndex {
    if (!this.#shelf || !this.#clients.has(client)) throw new TplaError('PROTOCOL', 'this client is not connected to the pool; connect to its channel and say hello again');
    return this.#shelf.index;
  }

  #build(layout: KvLayout): PoolAnswer | null {
    const slots = Math.floor(this.memory.bytes / blockBytes(layout));
    if (!(slots >= 1)) return refuse(`dram_bytes ${this.memory.bytes} hold no block of ${describe(layout)}, which takes ${blockBytes(layout)} bytes; raise dram_bytes`);
    let region: KvRegion;
    try {
      region = this.#native.mapKvRegion(layout, slots, [this.memory.fd]);
    } catch (thrown) {
      return refuse(`the pool cannot hold ${describe(layout)}: ${(thrown as Error).message}`);
    }
    if (this.#shelf) {
      this.counters.evictedBlocks += this.#shelf.index.evictions;
      this.#shelf.tier?.close();
      this.#shelf.region.close();
    }
    const memory = { layout, region, index: new BlockIndex(slots) };
    this.#shelf = { ...memory, tier: this.#openTier(memory) };
    return null;
  }

  /** A disk that cannot be used is said; the memory serves without it. */
  #openTier(memory: Memory): NvmeTier | null {
    if (!this.#disk) return null;
    const { config, log } = this.#disk;
    try {
      return new NvmeTier(this.#native, config, memory, this.nvmeCounters, log);
    } catch (error) {
      log.error({ path: config.path, reason: (error as Error).message }, 'the NVMe tier is off');
      return null;
    }
  }
}

/** Bytes of one block over all layers; the formula of native/core/kv_layout.h for the whole width. */
export function blockBytes({ dtype, latent, rope, pageTokens, layers }: KvLayout): number {
  const row = dtype === 'f32' ? (latent + rope) * 4 : dtype === 'bf16' ? (latent + rope) * 2 : Math.ceil(latent / 4) * 4 + Math.ceil(latent / 128) * 4 + rope * 2;
  return row * pageTokens * layers;
}

function sameLayout(a: KvLayout, b: KvLayout): boolean {
  return a.layers === b.layers && a.latent === b.latent && a.rope === b.rope && a.dtype === b.dtype && a.pageTokens === b.pageTokens;
}

function describe({ layers, latent, rope, dtype, pageTokens }: KvLayout): string {
  return `${layers} layers of ${latent}+${rope} ${dtype} in pages of ${pageTokens} tokens`;
}

function refuse(message: string): PoolAnswer {
  return { type: 'refused', message };
}
