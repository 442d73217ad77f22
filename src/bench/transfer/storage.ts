/** Blocks of a sequence to and from a file on this machine, beside as many bytes in one plain file. */
import { rmSync, statfsSync } from 'node:fs';
import { join } from 'node:path';
import { formatBytes } from '../../config/bytes.js';
import { setCuFileEnvironment } from '../../config/env.js';
import { TplaError, toTplaError } from '../../errors.js';
import { native } from '../../native/loader.js';
import type { BlockFile, BlockRecord, KvArena, PlainFile, StorageMechanism } from '../../native/types.js';
import { tokenBytes } from '../../kv/layout.js';
import { bytesLanded, pagesFor, scatteredPages, type BenchCase, type StorageShape } from './cases.js';
import { gpu, HOST, newArena } from './memory.js';
import { differenceFromPattern, patternArena } from './pattern.js';
import { plainRow, storageRow, type BenchRow, type StorageSample, type StorageState } from './rows.js';

const SEED = 20251;
/** Of a disk, as native/storage has it. */
const ALIGNMENT = 4096;

export interface StorageBenchOptions {
  iterations: number;
  warmup: number;
  verify: boolean;
}

/** Two rows: the plain file, then the blocks. Each run of one is followed by a run of the other, so that both see the same disk. */
export async function benchStorage(what: BenchCase, { iterations, warmup, verify }: StorageBenchOptions): Promise<BenchRow[]> {
  const run = await StorageRun.open(what);
  try {
    const plainSeconds: number[] = [];
    const samples: StorageSample[] = [];
    for (let i = -warmup; i < iterations; i++) {
      const seconds = await run.plain();
      const sample = await run.blocks();
      if (i < 0) continue;
      plainSeconds.push(seconds);
      samples.push(sample);
    }
    if (verify) await run.verify();
    const copy = plainRow(what, 'file', run.bytes, plainSeconds, run.plainState);
    return [copy, storageRow(what, run.mechanism, run.state, samples, copy, verify)];
  } finally {
    run.close();
  }
}

interface Block {
  slot: number;
  pages: Int32Array;
  backPages: Int32Array;
  record: BlockRecord;
}

/** Both files, the sequence, and pages to read it back into. */
class StorageRun {
  readonly mechanism: StorageMechanism;
  readonly state: StorageState;
  readonly bytes: number;
  readonly #what: BenchCase;
  readonly #storage: StorageShape;
  readonly #source: KvArena;
  readonly #back: KvArena;
  readonly #blocks: Block[];
  readonly #file: BlockFile;
  readonly #plain: PlainFile;

  private constructor(what: BenchCase, mechanism: StorageMechanism, state: StorageState, source: KvArena, back: KvArena, blocks: Block[], file: BlockFile, plain: PlainFile) {
    this.#what = what;
    this.#storage = what.storage!;
    this.mechanism = mechanism;
    this.state = state;
    this.bytes = bytesLanded(what);
    this.#source = source;
    this.#back = back;
    this.#blocks = blocks;
    this.#file = file;
    this.#plain = plain;
  }

  /** The files have no name any more when this resolves: whatever ends the process ends them. */
  static async open(what: BenchCase): Promise<StorageRun> {
    const { source: layout, tokens } = what;
    const storage = what.storage!;
    const addon = native();
    const { devices, reason } = storage.memory === 'gpu' ? addon.probe().cuda : { devices: [0], reason: null };
    if (devices.length === 0) throw new TplaError('GPU_UNAVAILABLE', `--memory gpu needs an NVIDIA GPU: ${reason ?? 'none was found'}`);
    setCuFileEnvironment();
    const blockTokens = storage.pagesPerBlock * layout.pageTokens;
    const blockBytes = blockTokens * tokenBytes(layout);
    const slots = Math.ceil(tokens / blockTokens);
    const fileBytes = ALIGNMENT + slots * (ALIGNMENT + Math.ceil(blockBytes / ALIGNMENT) * ALIGNMENT);
    const open: { close(): void }[] = [];
    try {
      const memory = storage.memory === 'gpu' ? gpu(0) : HOST;
      const { arena, pages } = await patternArena(memory, layout, tokens, SEED);
      open.push(arena);
      const back = newArena(memory, layout, pagesFor(layout, tokens));
      open.push(back);
      const [blocksAt, plainAt] = ['blocks', 'plain'].map((kind) => join(storage.directory, `tpla-bench-${process.pid}.${kind}`)) as [string, string];
      const { file, plain, mechanism, passedOver } = await describingTheDisk(what, async () => {
        try {
          const options = { path: blocksAt, layout, bytes: fileBytes, threads: storage.threads, depth: storage.queueDepth, pagesPerBlock: storage.pagesPerBlock, engine: storage.engine };
          const blockFile = addon.openBlockFile(options);
          open.push(blockFile);
          const plainFile = addon.openPlainFile(plainAt, storage.engine, storage.queueDepth);
          open.push(plainFile);
          // cuFile takes files with a name only.
          return { file: blockFile, plain: plainFile, ...await blockFile.mechanism(arena) };
        } finally {
          rmSync(blocksAt, { force: true });
          rmSync(plainAt, { force: true });
        }
      });
      const blocks = await cut(what, arena, pages);
      const state: StorageState = {
        memory: storage.memory, pages_per_block: storage.pagesPerBlock, block_bytes: blockBytes, queue_depth: storage.queueDepth, threads: storage.threads,
        direct_io: file.direct, passed_over: passedOver,
      };
      const run = new StorageRun(what, mechanism, state, arena, back, blocks, file, plain);
      // What is read must be there, and what is written first takes its room on the disk.
      await run.#writeBlocks();
      await describingTheDisk(what, () => plain.write(run.bytes));
      return run;
    } catch (error) {
      open.reverse().forEach((opened) => opened.close());
      throw error;
    }
  }

  /** The plain file goes through host memory, by one thread. */
  get plainState(): StorageState {
    return { ...this.state, memory: 'host', threads: 1, direct_io: this.#plain.direct, passed_over: null };
  }

  /** Seconds of the plain file. */
  plain(): Promise<number> {
    return describingTheDisk(this.#what, () => this.#plain[this.#storage.direction](this.bytes));
  }

  blocks(): Promise<StorageSample> {
    return this.#storage.direction === 'write' ? this.#writeBlocks() : this.#readBlocks();
  }

  /** Reads everything back and compares every row. Throws CHECKSUM_MISMATCH. */
  async verify(): Promise<void> {
    await this.#readBlocks();
    const { tokens, source } = this.#what;
    const difference = await differenceFromPattern(this.#back, { tokens, seed: SEED, sourceDType: source.dtype });
    if (difference !== null) throw new TplaError('CHECKSUM_MISMATCH', `what came back from the disk is not what was written: ${difference}`);
  }

  close(): void {
    this.#file.close();
    this.#plain.close();
    this.#back.close();
    this.#source.close();
  }

  #writeBlocks(): Promise<StorageSample> {
    return this.#timed(({ slot, pages, record }) => this.#file.write(slot, this.#source, pages, record), 2);
  }

  #readBlocks(): Promise<StorageSample> {
    return this.#timed(async ({ slot, backPages, record }) => {
      if (!await this.#file.read(slot, this.#back, backPages, record)) throw new TplaError('CHECKSUM_MISMATCH', `block ${record.index} came back from the disk changed, or not at all`);
    }, 1);
  }

  /** All blocks at once; the file's threads take them in order. `headers`: of a slot that go to the disk, or come from it. */
  async #timed(move: (block: Block) => Promise<void>, headers: number): Promise<StorageSample> {
    const started = performance.now();
    const underWay = this.#blocks.map(move);
    const posted = performance.now();
    await describingTheDisk(this.#what, async () => {
      const results = await Promise.allSettled(underWay);
      const failed = results.find((result) => result.status === 'rejected');
      if (failed) throw failed.reason;
    });
    const { source } = this.#what;
    const pageBytes = source.pageTokens * tokenBytes(source);
    const diskBytes = this.#blocks.reduce((sum, { pages }) => sum + headers * ALIGNMENT + Math.ceil(pages.length * pageBytes / ALIGNMENT) * ALIGNMENT, 0);
    return { bytes: this.bytes, diskBytes, postUs: (posted - started) * 1e3, latencyUs: (performance.now() - started) * 1e3 };
  }
}

/** The sequence as blocks, with the checksums under which they are stored. */
async function cut({ source: layout, tokens, storage }: BenchCase, arena: KvArena, pages: Int32Array): Promise<Block[]> {
  const pagesPerBlock = storage!.pagesPerBlock;
  const sums = await native().kvChecksum(arena, [0, layout.layers], [0, tokens], [pages]);
  const backPages = scatteredPages(layout, tokens, SEED)[0]!;
  const blockTokens = pagesPerBlock * layout.pageTokens;
  return Array.from({ length: Math.ceil(tokens / blockTokens) }, (_, index): Block => {
    const [begin, end] = [index * pagesPerBlock, Math.min((index + 1) * pagesPerBlock, pages.length)];
    const checksum = sums.slice(begin, end).reduce((sum, page) => BigInt.asUintN(64, sum + page), 0n);
    return {
      slot: index, pages: pages.slice(begin, end), backPages: backPages.slice(begin, end),
      record: { id: index.toString(16).padStart(32, '0'), index, tokens: Math.min(blockTokens, tokens - index * blockTokens), checksum: String(checksum) },
    };
  });
}

/** What fails says on which disk, and how much room there was. */
async function describingTheDisk<T>(what: BenchCase, body: () => Promise<T>): Promise<T> {
  const { directory } = what.storage!;
  try {
    return await body();
  } catch (thrown) {
    const error = toTplaError(thrown, 'IO_FAILED');
    if (error.code !== 'IO_FAILED') throw error;
    let room = '';
    try {
      const { bavail, bsize } = statfsSync(directory);
      room = ` (${formatBytes(bavail * bsize)} free)`;
    } catch { /* there is no such directory, as the message says */ }
    throw new TplaError('IO_FAILED', `${error.message}; ${directory}${room} must hold two files of ${formatBytes(bytesLanded(what))}: name another --directory, or fewer --tokens`, { cause: error });
  }
}
