import { closeSync } from 'node:fs';
import type { Logger } from 'pino';
import type { Clock } from '../clock.js';
import { TplaError, toTplaError } from '../errors.js';
import { parseAddress } from '../http/address.js';
import { native } from '../native/loader.js';
import type { Channel, KvArena, LinkMemory, SampledToken } from '../native/types.js';
import { checkPath, rankOffers } from './choose_path.js';
import { CudaReach, isOnGpu } from './cuda_path.js';
import { checkHandshake, describeLayout } from './handshake.js';
import { decodeMessage, encodeMessage, type Message, type PathOffer } from './messages.js';
import { nixlAbility, reachOverNixl } from './nixl_path.js';
import type { Credit, Reach, Rectangle, Welcome } from './path.js';
import { PullReach } from './pull_path.js';
import { Pulse } from './pulse.js';
import { ShmReach } from './shm_path.js';
import { reachOverTcp } from './tcp_path.js';
import type { Handshake, HandoffEndpointOptions, HandoffSender, HandoffSession, HandoffTicket, PrefillStats, TransferPath } from './types.js';
import { reachOverUcx } from './ucx_path.js';

const WELCOME_MS = 5000;

/** Connects to decode workers as tickets name them, one connection an address, kept as long as it lives. */
export function createHandoffSender(options: HandoffEndpointOptions & { log: Logger; clock: Clock }): HandoffSender {
  return new Sender(options);
}

class Sender implements HandoffSender {
  readonly #options: HandoffEndpointOptions & { log: Logger; clock: Clock };
  readonly #connections = new Map<string, Promise<Connection>>();
  readonly #pulse: Pulse;
  #isClosing = false;

  constructor(options: HandoffEndpointOptions & { log: Logger; clock: Clock }) {
    this.#options = options;
    this.#pulse = new Pulse(options.clock, (isLate) => void this.#beat(isLate));
  }

  async open(ticket: HandoffTicket): Promise<HandoffSession> {
    if (this.#isClosing) throw new TplaError('DRAINING', 'prefill is closing and opens no more hand-offs');
    const connection = await this.#connection(ticket.address);
    const session = await connection.openSession(ticket);
    void this.#followLeases();
    return session;
  }

  async close(): Promise<void> {
    this.#isClosing = true;
    this.#pulse.stop();
    const connections = await this.#live();
    await Promise.all(connections.map((connection) => connection.close(new TplaError('HANDOFF_FAILED', 'prefill is closing'))));
  }

  #connection(address: string): Promise<Connection> {
    const known = this.#connections.get(address);
    if (known) return known;
    const forget = () => {
      if (this.#connections.get(address) === opening) this.#connections.delete(address);
      void this.#followLeases();
    };
    const opening = this.#connect(address, forget);
    this.#connections.set(address, opening);
    opening.catch(forget);
    return opening;
  }

  async #connect(address: string, onGone: () => void): Promise<Connection> {
    const connection = new Connection(address, this.#options, onGone);
    await connection.dial(this.#options.handshake);
    const transports = connection.transports();
    const carriedBy = transports.length === 0 ? {} : { transports, memory: connection.memory };
    this.#options.log.info({ address, path: connection.path, ...carriedBy, peer: connection.peer }, `connected to decode (${describeLayout(connection.layout)})`);
    return connection;
  }

  /** Connections that are up; one that is being dialled or has failed is not. */
  async #live(): Promise<Connection[]> {
    const settled = await Promise.allSettled(this.#connections.values());
    return settled.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []));
  }

  async #followLeases(): Promise<void> {
    const connections = await this.#live();
    if (!this.#isClosing) this.#pulse.follow(connections.flatMap((connection) => connection.leases()));
  }

  async #beat(isLate: boolean): Promise<void> {
    for (const connection of await this.#live()) connection.beat(this.#options.clock.now(), isLate);
    await this.#followLeases();
  }
}

/** What rankOffers lets through is there. */
type Libraries = Required<Pick<HandoffEndpointOptions, 'ucx' | 'nixl'>>;

/** A connection to one decode worker. */
class Connection {
  readonly #address: string;
  readonly #arena: KvArena;
  readonly #clock: Clock;
  readonly #requirePath: TransferPath | undefined;
  readonly #libraries: Libraries;
  readonly #log: Logger;
  readonly #onGone: () => void;
  readonly #sessions = new Map<string, Session>();
  readonly #welcomed = deferred<void>();
  readonly #closed = deferred<void>();
  /** Puts on their way into the peer's memory. The socket stays open until they have ended: its end tells the peer that its pages are safe. */
  readonly #puts = new Set<Promise<unknown>>();
  /** Rectangles that decode is to read, by session and extent. */
  readonly #ready = new Map<string, Deferred<number>>();
  #channel: Channel | undefined;
  #handshake: Handshake | undefined;
  #peerHandshake: Handshake | undefined;
  #reach: Reach | undefined;
  #heard: number;
  #failure: TplaError | undefined;

  constructor(address: string, { arena, clock, log, requirePath, ucx = null, nixl = null }: HandoffEndpointOptions & { log: Logger; clock: Clock }, onGone: () => void) {
    this.#address = address;
    this.#arena = arena;
    this.#clock = clock;
    this.#requirePath = requirePath;
    this.#libraries = { ucx, nixl };
    this.#log = log;
    this.#onGone = onGone;
    this.#heard = clock.now();
    this.#welcomed.promise.catch(() => {});
  }

  get path(): TransferPath { return this.#reach!.path; }
  get memory(): LinkMemory | undefined { return this.#reach!.memory; }
  transports(): string[] { return this.#reach!.transports?.() ?? []; }
  get peer(): Channel['peer'] { return this.#channel!.peer; }
  get layout(): Handshake['layout'] { return this.#peerHandshake!.layout; }

  /** Resolves when decode has welcomed us. Throws HANDSHAKE_REFUSED, or HANDOFF_FAILED where nobody answers. */
  async dial(handshake: Handshake): Promise<void> {
    this.#handshake = handshake;
    const target = parseAddress(this.#address);
    try {
      this.#channel = await native().connectChannel(target.kind === 'unix' ? target.path : target, {
        onMessage: (_channel, bytes, fds) => this.#onMessage(bytes, fds),
        onClose: (_channel, reason) => this.#onClose(reason),
      });
    } catch (thrown) {
      this.#onGone();
      throw new TplaError('HANDOFF_FAILED', `decode cannot be reached for a hand-off: ${(thrown as Error).message}`, { cause: thrown });
    }
    this.send({ type: 'hello', handshake });
    const timer = setTimeout(() => this.#fail(new TplaError('HANDOFF_FAILED', `decode at ${this.#address} did not answer within ${WELCOME_MS} ms`)), WELCOME_MS);
    try {
      await this.#welcomed.promise;
    } finally {
      clearTimeout(timer);
    }
  }

  openSession(ticket: HandoffTicket): Promise<HandoffSession> {
    if (this.#failure) throw this.#failure;
    const session = new Session(this, ticket);
    this.#sessions.set(ticket.session, session);
    this.send({ type: 'open', session: ticket.session, path: this.path });
    this.#reach!.expect?.(this.#arena);
    return session.granted;
  }

  /** The session is over: decode reads no more of it. */
  forget(id: string, error: TplaError): void {
    this.#sessions.delete(id);
    for (const [rectangle, ready] of this.#ready) {
      if (!rectangle.startsWith(`${id} `)) continue;
      this.#ready.delete(rectangle);
      ready.reject(error);
    }
  }

  prepare(credit: Credit): void {
    this.#reach!.prepare?.(this.#arena, credit, this.#channel!);
  }

  put(srcPages: Int32Array, credit: Credit, rectangle: Rectangle): ReturnType<Reach['put']> {
    const put = this.#reach!.put(this.#arena, srcPages, credit, rectangle, this.#channel!);
    this.#puts.add(put);
    const done = () => { this.#puts.delete(put); };
    put.then(done, (thrown: unknown) => {
      done();
      const error = toTplaError(thrown);
      if (error.code === 'IO_FAILED') this.#fail(new TplaError('HANDOFF_FAILED', `KV cannot be sent to decode at ${this.#address}: ${error.message}`));
    });
    return put;
  }

  /** A closed channel takes no message; its end is on the way. */
  send(message: Message, fds: number[] = []): void {
    try {
      this.#channel!.send(encodeMessage(message), fds);
    } catch (thrown) {
      if (toTplaError(thrown).code !== 'IO_FAILED') throw thrown;
    }
  }

  leases(): number[] {
    return [...this.#sessions.values()].flatMap(({ leaseMs }) => (leaseMs === undefined ? [] : [leaseMs]));
  }

  beat(now: number, isLate: boolean): void {
    const leases = this.leases();
    if (leases.length === 0) return;
    this.send({ type: 'alive' });
    const silentMs = now - this.#heard;
    const lease = Math.min(...leases);
    if (!isLate && silentMs > lease) {
      this.#fail(new TplaError('LEASE_EXPIRED', `decode at ${this.#address} was silent for ${Math.round(silentMs)} ms, the lease is ${lease} ms`));
    }
  }

  async close(reason: TplaError): Promise<void> {
    this.#fail(reason);
    await this.#closed.promise;
  }

  #onMessage(bytes: Uint8Array, fds: number[]): void {
    this.#heard = this.#clock.now();
    try {
      this.#handle(decodeMessage(bytes), fds);
    } catch (thrown) {
      this.#fail(toTplaError(thrown));
    } finally {
      for (const fd of fds) closeSync(fd);
    }
  }

  #handle(message: Message, fds: number[]): void {
    switch (message.type) {
      case 'welcome': return this.#onWelcome(message, fds);
      case 'refused': throw new TplaError(message.code, message.message);
      case 'granted': return this.#sessions.get(message.session)?.onGranted(message);
      case 'taken': return this.#onTaken(message);
      case 'committed': return this.#sessions.get(message.session)?.onCommitted();
      case 'cancel': return this.#sessions.get(message.session)?.onCancelled(new TplaError(message.code, message.message));
      case 'alive': return;
      default: throw new TplaError('PROTOCOL', `"${message.type}" is not for prefill`);
    }
  }

  #onWelcome({ handshake, pages, offers }: Extract<Message, { type: 'welcome' }>, fds: number[]): void {
    if (this.#peerHandshake) throw new TplaError('PROTOCOL', 'decode welcomed twice');
    checkHandshake(this.#handshake!, handshake);
    this.#peerHandshake = handshake;
    this.#openBest({ address: this.#address, layout: handshake.layout, pages, fds }, offers).then((reach) => {
      if (this.#failure) return reach.close();
      this.#reach = reach;
      checkPath(reach.path, this.#requirePath);
      if (reach instanceof PullReach) this.send({ type: 'lend', ...reach.loan }, reach.fds);
      this.#welcomed.resolve();
    }).catch((thrown: unknown) => this.#fail(toTplaError(thrown)));
  }

  /** Builds the first of decode's paths that works; what was passed over is said, never silently. Descriptors are used before the first await. */
  async #openBest(welcome: Omit<Welcome, 'offer'>, offers: PathOffer[]): Promise<Reach> {
    const { ucx, nixl } = this.#libraries;
    const abilities = { onGpu: isOnGpu(this.#arena), ucxVersion: ucx?.version ?? null, nixl: nixl && nixlAbility(nixl) };
    const { usable, passedOver } = rankOffers(offers, abilities, this.#requirePath);
    for (const { path, reason } of passedOver) this.#log.info({ address: this.#address, path, reason }, 'a path to decode is not used');
    for (const [i, offer] of usable.entries()) {
      try {
        return await openReach(this.#arena, { ...welcome, offer }, this.#libraries, (session, rectangle) => this.#offerToRead(session, rectangle));
      } catch (error) {
        if (i === usable.length - 1) throw error;
        this.#log.warn({ address: this.#address, path: offer.path, reason: (error as Error).message }, `this path to decode failed, ${usable[i + 1]!.path} is tried`);
      }
    }
    throw new TplaError('INTERNAL', 'no path was left to try');
  }

  #offerToRead(session: string, { layers, tokens, pages }: Pick<Extract<Message, { type: 'ready' }>, 'layers' | 'tokens' | 'pages'>): Promise<number> {
    const taken = deferred<number>();
    this.#ready.set(rectangleKey(session, layers, tokens), taken);
    this.send({ type: 'ready', session, layers, tokens, pages });
    return taken.promise;
  }

  #onTaken({ session, layers, tokens, bytes }: Extract<Message, { type: 'taken' }>): void {
    const rectangle = rectangleKey(session, layers, tokens);
    this.#ready.get(rectangle)?.resolve(bytes);
    this.#ready.delete(rectangle);
  }

  #onClose(reason: string): void {
    this.#fail(new TplaError('HANDOFF_FAILED', `decode at ${this.#address} is gone: ${reason}`));
    this.#reach?.abandon?.();
    void this.#putsEnded().then(() => this.#reach?.close());
    this.#closed.resolve();
  }

  /** Ends every session and, when nothing is being written any more, the connection. */
  #fail(error: TplaError): void {
    if (this.#failure) return;
    this.#failure = error;
    this.#onGone();
    this.#welcomed.reject(error);
    for (const session of [...this.#sessions.values()]) {
      this.send({ type: 'fail', session: session.id, reason: error.message.slice(0, 4000) });
      session.onCancelled(error);
    }
    void this.#putsEnded().then(() => this.#channel?.close());
  }

  async #putsEnded(): Promise<void> {
    await Promise.allSettled(this.#puts);
  }
}

const rectangleKey = (session: string, layers: [number, number], tokens: [number, number]) => `${session} ${layers.join('-')} ${tokens.join('-')}`;

/** Descriptors are used before the first await. */
async function openReach(source: KvArena, welcome: Welcome, { ucx, nixl }: Libraries, offerToRead: ConstructorParameters<typeof PullReach>[2]): Promise<Reach> {
  switch (welcome.offer.path) {
    case 'cuda-fd':
    case 'cuda-ipc': return new CudaReach(source, welcome);
    case 'shm': return isOnGpu(source) ? new CudaReach(source, welcome) : new ShmReach(welcome);
    case 'nixl': return reachOverNixl(nixl!, source, welcome);
    case 'ucx': return reachOverUcx(ucx!, source, welcome);
    case 'tcp': return reachOverTcp(welcome);
    case 'pull': return new PullReach(source, welcome, offerToRead);
  }
}

class Session implements HandoffSession {
  readonly id: string;
  readonly granted: Promise<HandoffSession>;
  readonly aborted: AbortSignal;
  readonly sent = { bytes: 0, wireBytes: 0, placedAt: 0 };
  leaseMs: number | undefined;
  readonly #connection: Connection;
  readonly #tokens: [number, number];
  readonly #abort = new AbortController();
  readonly #grant = deferred<HandoffSession>();
  readonly #committed = deferred<void>();
  readonly #pushes: Promise<void>[] = [];
  #failedPush: TplaError | undefined;
  #credit: Credit | undefined;
  #error: TplaError | undefined;
  #firstPush: number | undefined;
  #isCommitting = false;

  constructor(connection: Connection, ticket: HandoffTicket) {
    this.id = ticket.session;
    this.#connection = connection;
    this.#tokens = ticket.tokens;
    this.aborted = this.#abort.signal;
    this.granted = this.#grant.promise;
    this.#committed.promise.catch(() => {});
  }

  get path(): TransferPath { return this.#connection.path; }
  get linkMemory(): LinkMemory | undefined { return this.#connection.memory; }
  linkTransports(): string[] { return this.#connection.transports(); }

  push(layers: [number, number], tokens: [number, number], srcPages: Int32Array): Promise<void> {
    const push = this.#push({ layers, tokens }, srcPages);
    this.#pushes.push(push);
    push.catch((thrown: unknown) => { this.#failedPush ??= toTplaError(thrown); });
    return push;
  }

  async #push(rectangle: Rectangle, srcPages: Int32Array): Promise<void> {
    this.#throwIfOver();
    if (this.#isCommitting) throw new TplaError('INTERNAL', 'nothing is pushed after the commit');
    const [begin, end] = this.#tokens;
    const { tokens } = rectangle;
    if (tokens[0] < begin || tokens[1] > end) {
      throw new TplaError('REQUEST_INVALID', `tokens [${tokens[0]}, ${tokens[1]}) are outside the grant [${begin}, ${end})`);
    }
    this.#firstPush ??= performance.now();
    try {
      const { bytes, wireBytes, placedAt } = await this.#connection.put(srcPages, this.#credit!, rectangle);
      this.sent.bytes += bytes;
      this.sent.wireBytes += wireBytes;
      this.sent.placedAt = Math.max(this.sent.placedAt, placedAt);
    } catch (thrown) {
      // Shut out at the gate: why is in the cancel message, which may still be on its way.
      throw this.#error ?? toTplaError(thrown);
    }
  }

  /** The message goes ahead of the last pushes: decode has it by the time they are verified, and accepts at once. */
  async commit({ firstTokens, prefill }: { firstTokens: SampledToken[]; prefill: PrefillStats }): Promise<void> {
    if (this.#isCommitting) throw new TplaError('INTERNAL', 'a hand-off is committed once');
    this.#isCommitting = true;
    this.#throwIfOver();
    if (this.#failedPush) throw this.#failedPush;
    const sinceMs = performance.now() - (this.#firstPush ?? performance.now());
    this.#connection.send({ type: 'commit', session: this.id, pushes: this.#pushes.length, sinceMs, firstTokens, prefill });
    try {
      await Promise.all(this.#pushes);
    } catch (thrown) {
      const error = toTplaError(thrown);
      this.fail(error.message);
      throw error;
    }
    await this.#committed.promise;
  }

  fail(reason: string): void {
    if (this.#error) return;
    this.#connection.send({ type: 'fail', session: this.id, reason: reason.slice(0, 4000) });
    this.#end(new TplaError('HANDOFF_FAILED', reason));
  }

  onGranted({ tokens, rank, leaseMs, slot, epoch, pages }: Extract<Message, { type: 'granted' }>): void {
    if (this.#credit || this.#error) throw new TplaError('PROTOCOL', 'decode granted a hand-off twice');
    if (tokens[0] !== this.#tokens[0] || tokens[1] !== this.#tokens[1]) {
      throw new TplaError('PROTOCOL', `decode granted tokens [${tokens.join(', ')}), the ticket says [${this.#tokens.join(', ')})`);
    }
    this.#credit = { session: this.id, tokens, rank, slot, epoch, pages };
    this.leaseMs = leaseMs;
    this.#connection.prepare(this.#credit);
    this.#grant.resolve(this);
  }

  onCommitted(): void {
    if (!this.#isCommitting) throw new TplaError('PROTOCOL', 'decode accepted a hand-off that was not committed');
    this.#error = new TplaError('INTERNAL', 'the hand-off is over');
    this.#connection.forget(this.id, this.#error);
    this.#committed.resolve();
  }

  onCancelled(error: TplaError): void {
    if (this.#error) return;
    this.#end(error);
    this.#abort.abort(error);
  }

  #end(error: TplaError): void {
    this.#error = error;
    this.#connection.forget(this.id, error);
    this.#grant.reject(error);
    this.#committed.reject(error);
  }

  #throwIfOver(): void {
    if (this.#error) throw this.#error;
  }
}

interface Deferred<T> {
  promise: Promise<T>;
  resolve: (value: T) => void;
  reject: (error: TplaError) => void;
}

function deferred<T>(): Deferred<T> {
  let resolve!: (value: T) => void;
  let reject!: (error: TplaError) => void;
  const promise = new Promise<T>((yes, no) => {
    resolve = yes;
    reject = no;
  });
  return { promise, resolve, reject };
}
