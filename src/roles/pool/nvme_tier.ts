/** Blocks of the pool's memory that are kept on disk too, and come back when they are asked for; also after a restart. */
import type { Logger } from 'pino';
import type { NvmeConfig } from '../../config/types.js';
import type { StoredBlock } from '../../kv/pool_protocol.js';
import type { BlockFile, KvLayout, KvRegion, NativeModule } from '../../native/types.js';
import { chooseSpills } from '../../policy/spill.js';
import type { BlockIndex } from './block_index.js';
import { DiskIndex } from './disk_index.js';

/** Under which the tier itself holds blocks in the index of the memory. */
const CLIENT = 'nvme';
/** Transfers at a time, each in pieces of its own. */
const THREADS = 2;
const MAX_WRITES = 2 * THREADS;

export interface NvmeCounters {
  spilledBlocks: number;
  loadedBlocks: number;
  /** Found torn, cut off or changed when they were read. */
  corruptBlocks: number;
  failedWrites: number;
}

export interface NvmeState {
  path: string;
  engine: BlockFile['engine'];
  /** Past the page cache. */
  direct: boolean;
  slots: number;
  blocks: number;
}

/** Memory in which blocks become visible. */
export interface Memory {
  layout: KvLayout;
  region: KvRegion;
  index: BlockIndex;
}

export class NvmeTier {
  readonly counters: NvmeCounters;
  readonly #path: string;
  readonly #file: BlockFile;
  readonly #memory: Memory;
  readonly #log: Logger;
  readonly #loading = new Map<string, Promise<void>>();
  readonly #ready: Promise<void>;
  #disk: DiskIndex;
  #writes = 0;
  #isClosed = false;

  /** Throws IO_FAILED, or REQUEST_INVALID where `bytes` hold no block. */
  constructor(addon: Pick<NativeModule, 'openBlockFile'>, { path, bytes, queue_depth: depth }: NvmeConfig & { path: string }, memory: Memory, counters: NvmeCounters, log: Logger) {
    this.#path = path;
    this.#memory = memory;
    this.#log = log;
    this.counters = counters;
    this.#file = addon.openBlockFile({ path, layout: memory.layout, bytes, threads: THREADS, depth });
    this.#disk = new DiskIndex(0, []);
    this.#ready = this.#recover();
  }

  get state(): NvmeState {
    const { engine, direct, slots } = this.#file;
    return { path: this.#path, engine, direct, slots, blocks: this.#disk.blocks };
  }

  /** Writes what will be evicted next, in the background. To be called whenever blocks became idle. */
  spill(): void {
    if (this.#isClosed) return;
    const { index } = this.#memory;
    const { total, used, cached } = index.counts;
    const state = { slots: total, free: total - used - cached, underWay: this.#writes, maxUnderWay: MAX_WRITES };
    const seen = new Map<string, { id: string } & StoredBlock>();
    function* ids(): Iterable<string> {
      for (const block of index.idle()) {
        seen.set(block.id, block);
        yield block.id;
      }
    }
    for (const id of chooseSpills(state, ids(), (known) => this.#disk.has(known))) void this.#write(seen.get(id)!);
  }

  /**
   * Brings back what of the longest prefix of `ids` is on disk, and pins that prefix. Returns what gives the pins back, to be called once the
   * blocks were pinned for who asked.
   */
  async load(ids: readonly string[]): Promise<() => void> {
    await this.#ready;
    const { index } = this.#memory;
    const pinned: number[] = [];
    const loads: Promise<void>[] = [];
    const pin = (id: string) => pinned.push(...index.lookup(CLIENT, [id]).map(({ slot }) => slot));
    for (const id of ids) {
      if (index.has(id)) pin(id);
      else if (this.#disk.has(id)) loads.push(this.#load(id).then(() => void pin(id)));
      else break;
    }
    await Promise.all(loads);
    return () => {
      index.unpin(CLIENT, pinned);
      this.spill();
    };
  }

  /** Forgets blocks, those named, or all; resolves once a restart would not find them. */
  async evict(ids?: readonly string[]): Promise<void> {
    await this.#ready;
    await Promise.all((ids ?? this.#disk.ids()).map((id) => this.#forget(id)));
  }

  /** Waits for what is under way. */
  close(): void {
    this.#isClosed = true;
    this.#file.close();
  }

  async #recover(): Promise<void> {
    try {
      this.#disk = new DiskIndex(this.#file.slots, await this.#file.scan());
    } catch (error) {
      this.#disk = new DiskIndex(this.#file.slots, []);
      this.#log.warn({ path: this.#path, reason: (error as Error).message }, 'the block file cannot be read; it starts empty');
    }
    const { fresh } = this.#file;
    this.#log.info(this.state, fresh ? 'the block file is new, or held another layout and was emptied' : 'blocks were found in the block file');
    this.spill();
  }

  async #write({ slot: page, ...block }: { id: string } & StoredBlock): Promise<void> {
    const { index, region } = this.#memory;
    const slot = this.#disk.reserve(block);
    if (slot === null) return;
    this.#writes++;
    try {
      await this.#file.write(slot, region, page, block);
      // Evicted meanwhile, its page may have been another's when it was copied.
      if (index.has(block.id)) {
        this.#disk.commit(block.id);
        this.counters.spilledBlocks++;
      } else {
        await this.#forget(block.id);
      }
    } catch (error) {
      await this.#forget(block.id);
      if (this.counters.failedWrites++ === 0) this.#log.warn({ path: this.#path, reason: (error as Error).message }, 'a block could not be written to disk; the memory goes on without');
    } finally {
      this.#writes--;
    }
    this.spill();
  }

  #load(id: string): Promise<void> {
    const known = this.#loading.get(id);
    if (known) return known;
    const loading = this.#read(id).finally(() => this.#loading.delete(id));
    this.#loading.set(id, loading);
    return loading;
  }

  async #read(id: string): Promise<void> {
    const { index, region } = this.#memory;
    const stored = this.#disk.use(id);
    if (!stored) return;
    const [place] = index.reserve(CLIENT, [id], false);
    if (place?.state !== 'write') return;
    const isWhole = await this.#file.read(stored.slot, region, place.slot, stored.record).catch(() => false);
    // Else its slot was given to another block meanwhile, and what was read is not to be judged.
    const isSame = this.#disk.use(id)?.slot === stored.slot;
    if (isWhole && isSame) {
      index.commit(CLIENT, { ...stored.record, slot: place.slot }, false);
      this.counters.loadedBlocks++;
      return;
    }
    index.unpin(CLIENT, [place.slot]);
    if (!isSame) return;
    this.counters.corruptBlocks++;
    this.#log.warn({ path: this.#path, id }, 'a block on disk is not what was written; it is dropped');
    await this.#forget(id);
  }

  async #forget(id: string): Promise<void> {
    const slot = this.#disk.drop(id);
    if (slot === null || this.#isClosed) return;
    await this.#file.erase(slot).catch(() => {});
    this.#disk.free(slot);
  }
}
