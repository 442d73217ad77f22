/** What a path of the benchmark has to say of itself; `paths.ts` has them all. */
import type { HandoffEndpointOptions, TransferPath } from '../../transfer/types.js';
import type { BenchCase } from './cases.js';
import type { Memory } from './memory.js';
import type { Baseline, BenchRow } from './rows.js';

/** Two processes hand KV over: how the ends are set up so that it takes this path. The hand-off states the one it took. */
export interface HandoffPath {
  summary: string;
  /** What the hand-off states. */
  path: TransferPath;
  /** Why it cannot run on this machine; null where it can. */
  missing(): string | null;
  source: Memory;
  target: Memory;
  /** What decode's hand-off channel listens on. */
  channel: 'unix' | 'tcp';
  /** What the same bytes are moved by with nothing done to them. */
  baseline: Baseline;
  /** What each end needs beyond handshake and arena; opened for every case anew. */
  link?: () => Promise<OpenLink>;
}

export interface OpenLink {
  /** What carries the bytes, as it says of itself. */
  carrier?: string;
  options: Partial<HandoffEndpointOptions>;
  close(): void;
}

/** One process moves KV by itself (to a disk, say). */
export interface LocalPath {
  summary: string;
  missing(): string | null;
  run(what: BenchCase, options: { iterations: number; warmup: number; verify: boolean }): Promise<BenchRow[]>;
}

export type BenchPath = HandoffPath | LocalPath;
