/** The hand-off of a prompt's KV from a prefill worker to a decode worker. Decode owns memory and grants it; prefill pushes. */
import type { ErrorCode } from '../errors.js';
import type { ModelIdentity } from '../model/spec.js';
import type { KvArena, KvLayout, LinkMemory, Nixl, SampledToken, Ucx } from '../native/types.js';

/**
 * How bytes move; stated in the handshake, in metrics and in every benchmark line. Best first; NIXL, which is taken only where it was asked for,
 * stands before the paths between hosts that are taken unasked.
 */
export const PATHS = ['same-gpu', 'cuda-ipc', 'cuda-fd', 'shm', 'pinned', 'nixl', 'ucx', 'tcp'] as const;
export type TransferPath = (typeof PATHS)[number];

/** Who moves the bytes: prefill writes (push), or decode reads (pull). */
export const DIRECTIONS = ['push', 'pull'] as const;
export type HandoffDirection = (typeof DIRECTIONS)[number];

/** Of the messages on the hand-off channel; both sides speak the same. */
export const PROTOCOL = 3;

/** Both sides must agree on every field but `layout`, which may differ in form, ranks, page size and dtype. */
export interface Handshake {
  protocol: typeof PROTOCOL;
  identity: ModelIdentity;
  layout: KvLayout;
}

/** What decode tells prefill (through route): where to push. */
export interface HandoffTicket {
  /** Address of decode's hand-off channel, `unix:/path` or `tcp://host:port`. */
  address: string;
  /** Names the session; unguessable. */
  session: string;
  /** Tokens [begin, end) prefill must push; what precedes is already on decode. */
  tokens: [number, number];
}

/** What arrives with the last page. */
export interface HandoffCommit {
  /** First token(s) sampled by prefill, one per choice (`n`). */
  firstTokens: SampledToken[];
  path: TransferPath;
  /** Bytes written into decode's pages. */
  bytes: number;
  /** Milliseconds from the first push until the last was in place: by the sender's clock up to its commit message, by decode's from there on. */
  transferMs: number;
  prefill: PrefillStats;
}

export interface PrefillStats {
  /** Prompt tokens, of them found in the pool, of them already on decode. */
  promptTokens: number;
  pooledTokens: number;
  skippedTokens: number;
  computedTokens: number;
  queueMs: number;
  computeMs: number;
}

/** Decode's side. One per process; serves any number of prefill workers. */
export interface HandoffReceiver {
  readonly address: string;
  /**
   * Opens a session on pages that the caller has allocated. Resolves once committed and every checksum matched;
   * rejects with HANDOFF_FAILED, CHECKSUM_MISMATCH, LEASE_EXPIRED or CANCELLED. Until it settles the pages belong to the session;
   * after it has settled no late write can touch them.
   */
  open(grant: HandoffGrant): OpenHandoff;
  cancel(session: string): void;
  stats(): HandoffStats;
  /** Fails what is open and disconnects; waits a second at most for peers that hang in the middle of a write. */
  close(): Promise<void>;
}

export interface OpenHandoff {
  ticket: HandoffTicket;
  committed: Promise<HandoffCommit>;
  /**
   * Aborts, with the error as its reason, as soon as the hand-off is known to have failed. `committed` rejects with the same error once the
   * pages are safe: at once, unless a peer was stopped in the middle of a write and neither goes on nor dies.
   */
  failing: AbortSignal;
}

export interface HandoffStats {
  /** Sessions under way, and failed ones whose pages are still held because of a writer inside. */
  open: number;
  draining: number;
  /** Since the start. */
  committed: number;
  bytes: number;
  failed: Partial<Record<ErrorCode, number>>;
}

export interface HandoffGrant {
  tokens: [number, number];
  /** Page tables of the whole sequence as in DecodeItem.pages. */
  pages: Int32Array[];
  rank?: number;
  /** Cut off when nothing is heard from the sender for so long. */
  leaseMs: number;
}

/** Prefill's side of one session. */
export interface HandoffSession {
  readonly path: TransferPath;
  /** Of a path between hosts: where rows leave from. */
  readonly linkMemory?: LinkMemory | undefined;
  /** Of a path through UCX: the `transport/device` pairs that carry it, as UCX tells by now; none where the library does not tell. */
  linkTransports?(): string[];
  /** What pushes have put in place so far, what travelled for it, and when the last of it was there (microseconds of the host's monotonic clock). */
  readonly sent: { bytes: number; wireBytes: number; placedAt: number };
  /** Pushes layers [begin, end) of tokens [begin, end); calls may overlap computing and one another. */
  push(layers: [number, number], tokens: [number, number], srcPages: Int32Array): Promise<void>;
  /** Sends results; resolves when all pushes have ended and decode has verified and accepted them. Nothing is pushed after it. */
  commit(result: { firstTokens: SampledToken[]; prefill: PrefillStats }): Promise<void>;
  /** Tells decode why nothing more will come. */
  fail(reason: string): void;
  /** Fires when decode cancels or dies. */
  readonly aborted: AbortSignal;
}

export interface HandoffSender {
  /** Connects (or reuses a connection), shakes hands and opens the session. HANDSHAKE_REFUSED names both fingerprints. */
  open(ticket: HandoffTicket): Promise<HandoffSession>;
  close(): Promise<void>;
}

export interface HandoffEndpointOptions {
  handshake: Handshake;
  /** In host memory, or a CudaKvArena. */
  arena: KvArena;
  /** Refuse a connection whose path is slower than this one; `nixl`, which names a library and no speed, is that or nothing. */
  requirePath?: TransferPath;
  /** What carries KV between hosts beside TCP; stays the caller's. */
  ucx?: Ucx | null;
  nixl?: Nixl | null;
}

export interface HandoffReceiverOptions extends HandoffEndpointOptions {
  /** Prefill writes into decode's pages, or decode reads prefill's. Default push. */
  direction?: HandoffDirection;
}
