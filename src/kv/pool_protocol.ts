/**
 * Messages between kv-pool and the workers of its host.
 *
 * A worker connects to the pool's channel (address in GET /state), says hello and gets a descriptor of the pool's memory, which it maps.
 * The channel then carries nothing more: its end is the kernel's word that the worker is gone, and releases all the worker pinned
 * or was writing. Everything else is HTTP, under the client token of the welcome:
 *
 *   POST /lookup   LookupRequest  → LookupReply    pins the longest prefix that is here
 *   POST /reserve  ReserveRequest → ReserveReply   slots to write
 *   POST /commit   CommitRequest  → CommitReply    written blocks become visible once the pool has verified their checksums
 *   POST /unpin    UnpinRequest   → {}             gives back pins, and slots reserved but not committed
 *   POST /evict    EvictRequest   → EvictReply     forgets blocks
 *   GET  /state /metrics /health
 *
 * Memory is that of a KvRegion of form mla with one rank; a slot is a page of it and holds one block of all layers.
 */
import type { KvLayout } from '../native/types.js';

export const POOL_PROTOCOL = 1;

export interface PoolHello {
  type: 'hello';
  protocol: number;
  /** The worker's id, for logs. */
  name: string;
  /** Canonical: form mla, one rank. */
  layout: KvLayout;
}

export type PoolAnswer =
  /** With one descriptor: the memory. */
  | { type: 'welcome'; client: string; slots: number }
  | { type: 'refused'; message: string };

export interface LookupRequest {
  client: string;
  ids: string[];
}

export interface StoredBlock {
  slot: number;
  /** Which block of its sequence it is; an id implies it, and the checksum of a row depends on its position. */
  index: number;
  /** Rows of the block that are filled; all of them but for the last block of a preempted sequence. */
  tokens: number;
  /** As kvChecksum gives it, decimal. */
  checksum: string;
}

export interface LookupReply {
  blocks: StoredBlock[];
}

export interface ReserveRequest {
  client: string;
  ids: string[];
  /** Pins blocks that are here already. */
  pin: boolean;
}

export type Reservation =
  | { state: 'write'; slot: number }
  | ({ state: 'present' } & StoredBlock)
  /** Another client is writing it, or it is being dropped while pinned. */
  | { state: 'busy' }
  /** Every slot is pinned. */
  | { state: 'full' };

export interface ReserveReply {
  blocks: Reservation[];
}

export interface CommitRequest {
  client: string;
  blocks: ({ id: string } & StoredBlock)[];
  /** Keeps the stored blocks pinned for this client. */
  pin: boolean;
}

export interface CommitReply {
  /** Per block; false where the memory does not hold what the checksum says, or the reservation is gone. */
  stored: boolean[];
}

export interface UnpinRequest {
  client: string;
  slots: number[];
}

export interface EvictRequest {
  /** Omitted: every block that is not pinned. */
  ids?: string[];
}

export interface EvictReply {
  /** Pinned blocks are invisible at once and counted here, their slots follow with the last pin. */
  evicted: number;
}

export interface PoolState {
  role: 'kv-pool';
  id: string;
  /** Address of the channel that hands out the memory. */
  channel: string;
  draining: boolean;
  clients: number;
  bytes: number;
  /** null until the first worker has connected. */
  layout: KvLayout | null;
  /** `used` slots are pinned or being written, `cached` ones can be evicted. */
  pages: { total: number; used: number; cached: number };
  /** The block file behind the memory; null without one, or until the first worker has connected. */
  nvme: { path: string; engine: 'io_uring' | 'threads'; direct: boolean; slots: number; blocks: number } | null;
}
