/** How KV bytes get from prefill's pages into decode's, behind the hand-off protocol: one implementation a path. */
import type { Channel, KvArena, KvLayout, LinkMemory } from '../native/types.js';
import type { PathOffer } from './messages.js';
import type { TransferPath } from './types.js';

/** What lets a session's writes in, told to the sender with its grant. */
export interface Admission {
  slot: number;
  epoch: number;
}

/** Pages that decode reserved for a session. */
export interface Reservation {
  session: string;
  tokens: [number, number];
  pages: Int32Array[];
  rank: number;
}

/** What the sender may write: the receiver's grant. */
export type Credit = Reservation & Admission;

/** Decode's side of one connection. */
export interface Landing {
  readonly offer: PathOffer;
  /** Descriptors that go with the offer; they stay the landing's. */
  readonly fds: number[];
  /** The peer itself writes into our memory, so that its end is the end of all writes; else a thread of this process does. */
  readonly peerWrites: boolean;
  admit(reservation: Reservation): Admission;
  /** Shuts the session's writes out; true when none can land any more. */
  revoke(slot: number): boolean;
  /** After revoke: the same, asked again. */
  isDrained(slot: number): boolean;
  /** The slot may serve another session. */
  release(slot: number): void;
  /** The peer is gone or silent: ends what this process is still taking in on its behalf. */
  abandon(): void;
  /** The peer is gone and every session settled. */
  close(): void;
}

/** What a put has placed. */
export interface Placed {
  bytes: number;
  wireBytes: number;
  /** When the last byte was there, as this process knows: microseconds of the host's monotonic clock. */
  placedAt: number;
}

/** Part of a sequence: layers [begin, end) of tokens [begin, end). */
export interface Rectangle {
  layers: [number, number];
  tokens: [number, number];
}

/** Prefill's side of one connection. */
export interface Reach {
  readonly path: TransferPath;
  /** Of a link between hosts: where its rows leave from. */
  readonly memory?: LinkMemory | undefined;
  /** A session is being opened. */
  expect?(source: KvArena): void;
  /** Puts of this credit will follow: what they have in common can be made ready. */
  prepare?(source: KvArena, credit: Credit, channel: Channel): void;
  /** Of a link through a library: the `transport/device` pairs that carry it, as the library tells by now. */
  transports?(): string[];
  /**
   * Writes a rectangle of the sequence into the credit's pages; resolves once every byte is there. Rejects with CANCELLED when shut out. What
   * `channel` carries to decode by then is the path's: `pushed` with checksums, unless decode took the bytes itself and knows them.
   */
  put(source: KvArena, srcPages: Int32Array, credit: Credit, rectangle: Rectangle, channel: Channel): Promise<Placed>;
  /** Where a put writes into no memory of decode's itself: ends those that are under way, since decode is gone and the path may never hear of it. */
  abandon?(): void;
  close(): void;
}

/** What a reach is built from: the receiver's welcome. Descriptors are closed by whoever passes them, when the builder has returned. */
export interface Welcome {
  address: string;
  layout: KvLayout;
  pages: number;
  offer: PathOffer;
  fds: number[];
}
