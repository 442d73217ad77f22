/** What a hand-off is measured against: as many bytes between the same two processes with nothing done to them. */
import { availableParallelism } from 'node:os';
import { TplaError } from '../../errors.js';
import { parseAddress } from '../../http/address.js';
import { native } from '../../native/loader.js';
import type { KvArena, KvRegion } from '../../native/types.js';
import { bytesLanded, memoryBytes, targetPages, type BenchCase } from './cases.js';
import type { Control } from './control.js';
import type { HandoffPath } from './path.js';

const SOCKETS = 4;
const MAX_THREADS = 16;

/** Repeated beside the hand-offs, so that both see the same machine. */
export interface PlainCopy {
  readonly bytes: number;
  /** Seconds. */
  run(): Promise<number>;
  close(): void;
}

/** Where decode's pages are, as the answer to setup told. */
export interface TargetMemory {
  address: string;
  handles: string[];
  fds: number[];
}

export async function openPlainCopy(path: HandoffPath, control: Control, what: BenchCase, source: KvArena, target: TargetMemory): Promise<PlainCopy> {
  if (path.baseline === 'sockets') return openSockets(control, what, target.address);
  const region = mapTarget(path, what, target);
  const pinned = path.baseline === 'gpu-copy' && path.source.kind === 'host' ? native().pinKvRegion(source, 0) : null;
  const bytes = Math.min(bytesLanded(what), memoryBytes(source.layout, source.pages), memoryBytes(region.layout, region.pages));
  const threads = Math.min(availableParallelism(), MAX_THREADS);
  return {
    bytes,
    run: () => native().kvPlainCopy(pinned ?? source, region, bytes, threads),
    close: () => {
      pinned?.close();
      region.close();
    },
  };
}

async function openSockets(control: Control, what: BenchCase, address: string): Promise<PlainCopy> {
  const target = parseAddress(address);
  if (target.kind !== 'tcp') throw new TplaError('INTERNAL', `sockets are no baseline for hand-offs at ${address}`);
  const { answer: { port } } = await control.ask({ op: 'sink' });
  const bytes = bytesLanded(what);
  return { bytes, run: () => native().plainSend(target.host, port, SOCKETS, bytes), close: () => {} };
}

/** Decode's pages as the side that copies sees them. */
function mapTarget(path: HandoffPath, what: BenchCase, { handles, fds }: TargetMemory): KvRegion {
  const addon = native();
  const { target } = what;
  const pages = targetPages(what);
  if (path.target.kind === 'gpu') return addon.mapCudaKvRegion(target, pages, handles.length > 0 ? handles : fds, 0);
  const host = addon.mapKvRegion(target, pages, fds);
  if (path.baseline === 'memcpy') return host;
  const pinned = addon.pinKvRegion(host, 0);
  host.close();
  return pinned;
}
