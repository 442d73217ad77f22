/**
 * A worker's side of kv-pool. The pool is a cache: whatever goes wrong here (no pool, a pool that restarts, refuses or is full, a block whose
 * bytes changed) is logged and looks like a miss, never like an error.
 */
import { randomBytes } from 'node:crypto';
import { closeSync } from 'node:fs';
import type { Logger } from 'pino';
import { TplaError } from '../errors.js';
import { parseAddress } from '../http/address.js';
import { WorkerClient } from '../http/client.js';
import type { Channel, KvArena, KvLayout, KvRegion, NativeModule } from '../native/types.js';
import { consecutiveRuns, slotTable, tokenRange, type PlacedBlock } from './block_runs.js';
import { POOL_PROTOCOL, type CommitReply, type CommitRequest, type LookupReply, type PoolAnswer, type PoolHello, type PoolState, type Reservation, type ReserveReply, type StoredBlock } from './pool_protocol.js';

export type PoolClientNative = Pick<NativeModule, 'connectChannel' | 'mapKvRegion' | 'kvPut' | 'kvChecksum'>;

/** KV of one sequence in this worker's arena. */
export interface KvSequence {
  arena: KvArena;
  /** As in DecodeItem.pages. */
  pages: Int32Array[];
  rank?: number | undefined;
}

/** Blocks of the pool that stay where they are until release(). Block i is logical page i of the sequence. */
export interface BlockLease {
  readonly blocks: number;
  release(): void;
}

/** Where workers keep blocks beyond their own pages. Nothing here throws. */
export interface BlockStore {
  readonly connected: boolean;
  /** Pins the longest prefix of `ids` that the store has. */
  find(ids: readonly string[]): Promise<BlockLease>;
  /** Copies blocks [begin, end) of the lease into the same logical pages of `target`. Returns the end of what was verified. */
  load(lease: BlockLease, begin: number, end: number, target: KvSequence): Promise<number>;
  /** Offers the full blocks `ids` of logical pages [begin, begin + ids.length). */
  offer(ids: readonly string[], begin: number, source: KvSequence): Promise<void>;
  /** Stores the first `tokens` tokens of a sequence, pinned. `ids` name its shareable blocks; the rest is stored under names of its own. */
  park(ids: readonly string[], tokens: number, source: KvSequence): Promise<BlockLease>;
  close(): Promise<void>;
}

export interface PoolClientOptions {
  /** HTTP address of kv-pool. */
  address: string;
  /** This worker's id. */
  name: string;
  /** Canonical: form mla, one rank. */
  layout: KvLayout;
  addon: PoolClientNative;
  log: Logger;
}

export interface PoolClientCounters {
  /** Blocks whose bytes were not those of their checksum. */
  corruptBlocks: number;
  loadedBlocks: number;
  storedBlocks: number;
  disconnects: number;
}

const RPC_TIMEOUT_MS = 5000;
const RETRY_MIN_MS = 100;
const RETRY_MAX_MS = 5000;
const NO_LEASE: BlockLease = { blocks: 0, release() {} };

/** One connection: the pool's memory, mapped, and what is being copied in or out of it. */
interface Session {
  client: string;
  channel: Channel;
  region: KvRegion;
  slots: number;
  alive: boolean;
  copies: number;
}

class PoolLease implements BlockLease {
  readonly session: Session;
  readonly stored: readonly StoredBlock[];
  readonly ids: readonly string[];
  readonly #giveBack: () => void;
  #released = false;

  constructor(session: Session, ids: readonly string[], stored: readonly StoredBlock[], giveBack: () => void) {
    this.session = session;
    this.ids = ids;
    this.stored = stored;
    this.#giveBack = giveBack;
  }

  get blocks(): number {
    return this.session.alive ? this.stored.length : 0;
  }

  release(): void {
    if (this.#released) return;
    this.#released = true;
    this.#giveBack();
  }
}

export class PoolClient implements BlockStore {
  readonly counters: PoolClientCounters = { corruptBlocks: 0, loadedBlocks: 0, storedBlocks: 0, disconnects: 0 };
  readonly #options: PoolClientOptions;
  readonly #http: WorkerClient;
  #session: Session | null = null;
  #retry: NodeJS.Timeout | undefined;
  #retryMs = RETRY_MIN_MS;
  #lastReason = '';
  #closed = false;
  #connecting: Promise<void>;

  constructor(options: PoolClientOptions) {
    this.#options = options;
    this.#http = new WorkerClient(options.address);
    this.#connecting = this.#connect();
  }

  /** Resolves after the first attempt to connect, whether it worked or not. */
  get ready(): Promise<void> {
    return this.#connecting;
  }

  get connected(): boolean {
    return this.#session !== null;
  }

  async find(ids: readonly string[]): Promise<BlockLease> {
    if (ids.length === 0) return NO_LEASE;
    return this.#attempt(NO_LEASE, async (session) => {
      const { blocks } = await this.#call<LookupReply>(session, '/lookup', { ids });
      return this.#lease(session, ids.slice(0, blocks.length), blocks);
    });
  }

  async load(lease: BlockLease, begin: number, end: number, target: KvSequence): Promise<number> {
    if (!(lease instanceof PoolLease) || begin >= end || lease.blocks < end) return begin;
    return this.#attempt(begin, async (session) => {
      if (lease.session !== session) return begin;
      const good = await this.#copying(session, () => this.#loadVerified(lease, begin, end, target));
      // A pool that went away in the meantime may have given the slots to somebody else.
      if (!session.alive) return begin;
      this.counters.loadedBlocks += good - begin;
      if (good < end) await this.#reportCorrupt(session, lease, good);
      return good;
    });
  }

  async offer(ids: readonly string[], begin: number, source: KvSequence): Promise<void> {
    if (ids.length === 0) return;
    await this.#attempt(undefined, async (session) => {
      const { blocks } = await this.#call<ReserveReply>(session, '/reserve', { ids, pin: false });
      await this.#write(session, ids, begin, (begin + ids.length) * this.#pageTokens, blocks, source, false);
    });
  }

  async park(ids: readonly string[], tokens: number, source: KvSequence): Promise<BlockLease> {
    return this.#attempt(NO_LEASE, async (session) => {
      const names = Array.from({ length: Math.ceil(tokens / this.#pageTokens) }, (_, index) => ids[index] ?? privateId());
      const reservations = await this.#reservePinned(session, names);
      const stored = await this.#write(session, names, 0, tokens, reservations, source, true);
      const prefix = stored.findIndex((block) => block === null);
      const kept = (prefix < 0 ? stored : stored.slice(0, prefix)) as StoredBlock[];
      const useless = stored.slice(kept.length).filter((block) => block !== null) as StoredBlock[];
      const isPrivate = (name: string, index: number) => name !== ids[index];
      if (useless.length > 0) this.#giveBack(session, useless, names.slice(kept.length).filter((name, i) => isPrivate(name, kept.length + i)));
      return this.#lease(session, names.slice(0, kept.length), kept, names.slice(0, kept.length).filter(isPrivate));
    });
  }

  async close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#retry);
    if (this.#session) this.#disconnect(this.#session, 'this worker closes');
    await this.#connecting;
    await this.#http.close();
  }

  get #pageTokens(): number {
    return this.#options.layout.pageTokens;
  }

  // ---------------------------------------------------------------- blocks

  async #loadVerified(lease: PoolLease, begin: number, end: number, target: KvSequence): Promise<number> {
    const { addon } = this.#options;
    const { region } = lease.session;
    const layers: [number, number] = [0, region.layout.layers];
    const run = lease.stored.slice(begin, end);
    const sums = await addon.kvChecksum(region, layers, tokenRange(run, this.#pageTokens), [slotTable(run)]);
    const bad = run.findIndex(({ checksum }, i) => String(sums[i]) !== checksum);
    const good = bad < 0 ? run : run.slice(0, bad);
    if (good.length === 0) return begin;
    await addon.kvPut({
      src: region, dst: target.arena, layers, tokens: tokenRange(good, this.#pageTokens), srcPages: [slotTable(good)], dstPages: target.pages,
      ...(target.rank === undefined ? {} : { dstRank: target.rank }),
    });
    return begin + good.length;
  }

  async #reportCorrupt(session: Session, lease: PoolLease, index: number): Promise<void> {
    const id = lease.ids[index]!;
    this.counters.corruptBlocks++;
    this.#options.log.error({ block: id, slot: lease.stored[index]!.slot }, 'a block of kv-pool is not what its checksum says; it is dropped and computed again');
    await this.#call(session, '/evict', { ids: [id] }, { bare: true });
  }

  /** Pinned reservations; a block that another worker is just writing is stored a second time under a private name. */
  async #reservePinned(session: Session, names: string[]): Promise<Reservation[]> {
    const { blocks } = await this.#call<ReserveReply>(session, '/reserve', { ids: names, pin: true });
    const busy = blocks.flatMap(({ state }, i) => (state === 'busy' ? [i] : []));
    if (busy.length === 0) return blocks;
    for (const i of busy) names[i] = privateId();
    const again = await this.#call<ReserveReply>(session, '/reserve', { ids: busy.map((i) => names[i]!), pin: true });
    busy.forEach((i, k) => { blocks[i] = again.blocks[k]!; });
    return blocks;
  }

  /** Writes the blocks that were reserved for it, and commits. Per block, where it lies, or null where it is not stored. */
  async #write(session: Session, ids: readonly string[], begin: number, tokens: number, reservations: Reservation[], source: KvSequence, pin: boolean): Promise<(StoredBlock | null)[]> {
    const stored = reservations.map(({ state, ...block }) => (state === 'present' ? block as StoredBlock : null));
    const reserved = reservations.flatMap((reservation, i) => {
      const index = begin + i;
      return reservation.state === 'write' ? [{ id: ids[i]!, slot: reservation.slot, index, tokens: Math.min(this.#pageTokens, tokens - index * this.#pageTokens) }] : [];
    });
    const written: CommitRequest['blocks'] = [];
    for (const run of consecutiveRuns(reserved, this.#pageTokens)) {
      const sums = await this.#copying(session, () => this.#putRun(session, run, source));
      run.forEach((block, i) => written.push({ ...block, checksum: String(sums[i]) }));
    }
    if (written.length === 0) return stored;
    const reply = await this.#call<CommitReply>(session, '/commit', { blocks: written, pin });
    written.forEach(({ slot, index, tokens: filled, checksum }, i) => {
      if (reply.stored[i]) stored[index - begin] = { slot, index, tokens: filled, checksum };
    });
    this.counters.storedBlocks += reply.stored.filter(Boolean).length;
    return stored;
  }

  /** Checksums of the canonical blocks written. */
  async #putRun(session: Session, run: PlacedBlock[], source: KvSequence): Promise<BigUint64Array> {
    const { checksums } = await this.#options.addon.kvPut({
      src: source.arena, dst: session.region, layers: [0, session.region.layout.layers], tokens: tokenRange(run, this.#pageTokens),
      srcPages: source.pages, dstPages: [slotTable(run)],
      ...(source.rank === undefined ? {} : { srcRank: source.rank }),
    });
    return checksums;
  }

  #lease(session: Session, ids: readonly string[], blocks: readonly StoredBlock[], privateIds: readonly string[] = []): BlockLease {
    if (blocks.length === 0) return NO_LEASE;
    return new PoolLease(session, ids, blocks, () => this.#giveBack(session, blocks, privateIds));
  }

  /** Unpins; blocks under private names are forgotten, since nobody can ask for them again. */
  #giveBack(session: Session, blocks: readonly StoredBlock[], privateIds: readonly string[]): void {
    const send = async () => {
      if (privateIds.length > 0) await this.#call(session, '/evict', { ids: privateIds }, { bare: true });
      await this.#call(session, '/unpin', { slots: blocks.map(({ slot }) => slot) });
    };
    if (session.alive) send().catch((error) => this.#fail(session, error));
  }

  // ---------------------------------------------------------------- connection

  /** Runs `work` on the current session; without one, or when it fails, the answer is `otherwise`. */
  async #attempt<T>(otherwise: T, work: (session: Session) => Promise<T>): Promise<T> {
    const session = this.#session;
    if (!session) return otherwise;
    try {
      return await work(session);
    } catch (error) {
      this.#fail(session, error);
      return otherwise;
    }
  }

  #fail(session: Session, error: unknown): void {
    if (!session.alive) return;
    this.#options.log.warn({ pool: this.#options.address, reason: (error as Error).message }, 'kv-pool failed; going on without it');
    this.#disconnect(session, 'failed');
  }

  async #call<T>(session: Session, path: string, body: object, { bare = false } = {}): Promise<T> {
    return this.#http.json<T>('POST', path, bare ? body : { client: session.client, ...body }, { timeoutMs: RPC_TIMEOUT_MS });
  }

  /** Holds the mapping, and the channel that holds our slots, while a copy runs. */
  async #copying<T>(session: Session, copy: () => Promise<T>): Promise<T> {
    if (!session.alive) throw new TplaError('WORKER_FAILED', 'the connection to kv-pool has ended');
    session.copies++;
    try {
      return await copy();
    } finally {
      session.copies--;
      this.#releaseIfDead(session);
    }
  }

  #disconnect(session: Session, reason: string): void {
    if (!session.alive) return;
    session.alive = false;
    if (this.#session === session) this.#session = null;
    this.counters.disconnects++;
    this.#options.log.info({ pool: this.#options.address, reason }, 'disconnected from kv-pool');
    this.#releaseIfDead(session);
    this.#reconnectLater();
  }

  #releaseIfDead(session: Session): void {
    if (session.alive || session.copies > 0) return;
    session.channel.close();
    session.region.close();
  }

  #reconnectLater(): void {
    if (this.#closed) return;
    clearTimeout(this.#retry);
    this.#retry = setTimeout(() => { this.#connecting = this.#connect(); }, this.#retryMs);
    this.#retryMs = Math.min(this.#retryMs * 2, RETRY_MAX_MS);
  }

  async #connect(): Promise<void> {
    const { address, log } = this.#options;
    try {
      const { channel } = await this.#http.json<PoolState>('GET', '/state', undefined, { timeoutMs: RPC_TIMEOUT_MS });
      const session = await this.#greet(channel);
      if (this.#closed) return this.#disconnect(session, 'this worker closes');
      this.#session = session;
      this.#retryMs = RETRY_MIN_MS;
      this.#lastReason = '';
      log.info({ pool: address, slots: session.slots }, 'connected to kv-pool');
    } catch (error) {
      if (this.#closed) return;
      const reason = (error as Error).message;
      if (reason !== this.#lastReason) log.warn({ pool: address, reason }, 'no kv-pool; going on without it and trying again');
      this.#lastReason = reason;
      this.#reconnectLater();
    }
  }

  /** Says hello on the channel and maps the memory that comes back. */
  #greet(address: string): Promise<Session> {
    const { addon, layout, name } = this.#options;
    const target = parseAddress(address);
    if (target.kind !== 'unix') throw new TplaError('PROTOCOL', `kv-pool's channel is ${address}, not a Unix socket`);
    return new Promise((resolve, reject) => {
      let session: Session | undefined;
      let connected: Channel | undefined;
      const timer = setTimeout(() => { connected?.close(); reject(new TplaError('WORKER_FAILED', 'kv-pool does not answer on its channel')); }, RPC_TIMEOUT_MS);
      const settle = (act: () => void) => { clearTimeout(timer); act(); };
      addon.connectChannel(target.path, {
        onMessage: (channel, message, fds) => {
          try {
            session = this.#welcome(channel, JSON.parse(Buffer.from(message).toString()) as PoolAnswer, fds);
            settle(() => resolve(session!));
          } catch (error) {
            channel.close();
            settle(() => reject(error));
          } finally {
            fds.forEach((fd) => closeSync(fd));
          }
        },
        onClose: (_channel, reason) => {
          if (session) this.#disconnect(session, reason);
          else settle(() => reject(new TplaError('WORKER_FAILED', `kv-pool closed its channel: ${reason}`)));
        },
      }).then((channel) => {
        connected = channel;
        const hello: PoolHello = { type: 'hello', protocol: POOL_PROTOCOL, name, layout };
        channel.send(Buffer.from(JSON.stringify(hello)));
      }).catch((error) => settle(() => reject(error)));
    });
  }

  #welcome(channel: Channel, answer: PoolAnswer, fds: number[]): Session {
    if (answer.type === 'refused') throw new TplaError('HANDSHAKE_REFUSED', answer.message);
    if (answer.type !== 'welcome' || fds.length !== 1) throw new TplaError('PROTOCOL', 'kv-pool answered with something else than a welcome and its memory');
    const region = this.#options.addon.mapKvRegion(this.#options.layout, answer.slots, fds);
    return { client: answer.client, channel, region, slots: answer.slots, alive: true, copies: 0 };
  }
}

function privateId(): string {
  return randomBytes(16).toString('hex');
}
