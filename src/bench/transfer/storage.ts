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
  if (what.storage!.memory === 'gpu') requireGpu();
  setCuFileEnvironment();
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

function requireGpu(): void {
  const { devices, reason } = native().probe().cuda;
  if (devices.length === 0) throw new TplaError('GPU_UNAVAILABLE', `--memory gpu needs an NVIDIA GPU: ${reason ?? 'none was found'}`);
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

  static async open(what: BenchCase): Promise<StorageRun> {
    const { source: layout, tokens } = what;
    const storage = what.storage!;
    const memory = storage.memory === 'gpu' ? gpu(0) : HOST;
    const opened: { close(): void }[] = [];
    try {
      const { arena, pages } = await patternArena(memory, layout, tokens, SEED);
      opened.push(arena);
      const back = newArena(memory, layout, pagesFor(layout, tokens));
      opened.push(back);
      const { file, plain, mechanism, passedOver } = await openFiles(what, arena);
      opened.push(file, plain);
      const state: StorageState = {
        memory: storage.memory, pages_per_block: storage.pagesPerBlock, block_bytes: blockBytes(what), queue_depth: storage.queueDepth, threads: storage.threads,
        direct_io: file.direct, passed_over: passedOver,
      };
      const run = new StorageRun(what, mechanism, state, arena, back, await cut(what, arena, pages), file, plain);
      // What is read must be there, and what is written first takes its room on the disk.
      await run.#writeBlocks();
      await describingTheDisk(what, () => plain.write(run.bytes));
      return run;
    } catch (error) {
      opened.reverse().forEach((one) => one.close());
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
    const diskBytes = this.#blocks.reduce((sum, { pages }) => sum + headers * ALIGNMENT + aligned(pages.length * pageBytes), 0);
    return { bytes: this.bytes, diskBytes, postUs: (posted - started) * 1e3, latencyUs: (performance.now() - started) * 1e3 };
  }
}

const blockTokens = ({ source, storage }: BenchCase) => storage!.pagesPerBlock * source.pageTokens;
const blockBytes = (what: BenchCase) => blockTokens(what) * tokenBytes(what.source);
const aligned = (bytes: number) => Math.ceil(bytes / ALIGNMENT) * ALIGNMENT;

/** Neither file has a name any more when this resolves: whatever ends the process ends them. */
function openFiles(what: BenchCase, arena: KvArena): Promise<{ file: BlockFile; plain: PlainFile; mechanism: StorageMechanism; passedOver: string | null }> {
  const { directory, engine, queueDepth, threads, pagesPerBlock } = what.storage!;
  const path = (kind: string) => join(directory, `tpla-bench-${process.pid}.${kind}`);
  const slots = Math.ceil(what.tokens / blockTokens(what));
  return describingTheDisk(what, async () => {
    const opened: { close(): void }[] = [];
    try {
      const file = native().openBlockFile({
        path: path('blocks'), layout: what.source, bytes: ALIGNMENT + slots * (ALIGNMENT + aligned(blockBytes(what))), threads, depth: queueDepth, pagesPerBlock, engine,
      });
      opened.push(file);
      const plain = native().openPlainFile(path('plain'), engine, queueDepth);
      opened.push(plain);
      // cuFile takes only files that have a name.
      return { file, plain, ...await file.mechanism(arena) };
    } catch (error) {
      opened.forEach((one) => one.close());
      throw error;
    } finally {
      for (const kind of ['blocks', 'plain']) rmSync(path(kind), { force: true });
    }
  });
}

/** The sequence as blocks, with the checksums under which they are stored. */
async function cut(what: BenchCase, arena: KvArena, pages: Int32Array): Promise<Block[]> {
  const { source: layout, tokens, storage } = what;
  const pagesPerBlock = storage!.pagesPerBlock;
  const sums = await native().kvChecksum(arena, [0, layout.layers], [0, tokens], [pages]);
  const backPages = scatteredPages(layout, tokens, SEED)[0]!;
  const size = blockTokens(what);
  return Array.from({ length: Math.ceil(tokens / size) }, (_, index): Block => {
    const [begin, end] = [index * pagesPerBlock, Math.min((index + 1) * pagesPerBlock, pages.length)];
    const checksum = sums.slice(begin, end).reduce((sum, page) => BigInt.asUintN(64, sum + page), 0n);
    return {
      slot: index, pages: pages.slice(begin, end), backPages: backPages.slice(begin, end),
      record: { id: index.toString(16).padStart(32, '0'), index, tokens: Math.min(size, tokens - index * size), checksum: String(checksum) },
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
