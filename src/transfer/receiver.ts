import { randomBytes } from 'node:crypto';
import { closeSync } from 'node:fs';
import type { Logger } from 'pino';
import type { Clock } from '../clock.js';
import { TplaError, toTplaError, type ErrorCode } from '../errors.js';
import { formatAddress, parseAddress, type Address } from '../http/address.js';
import { removeStaleSocket } from '../http/server.js';
import { copiesOf, tokenBytes } from '../kv/layout.js';
import { native } from '../native/loader.js';
import type { Channel, ChannelServer, KvArena, KvLayout } from '../native/types.js';
import { Coverage } from './coverage.js';
import { checkHandshake, describeLayout, handshakeFingerprint } from './handshake.js';
import { decodeMessage, encodeMessage, type Message } from './messages.js';
import type { Admission, Landing, Rectangle } from './path.js';
import { PullLanding } from './pull_path.js';
import { Pulse } from './pulse.js';
import { openLandings, PATHS_OF, type Landings } from './landings.js';
import type { Handshake, HandoffCommit, HandoffDirection, HandoffGrant, HandoffReceiver, HandoffReceiverOptions, HandoffStats, HandoffTicket, OpenHandoff, TransferPath } from './types.js';

const HELLO_MS = 5000;
/** How often a session whose last writer is still inside is looked at. */
const DRAIN_POLL_MS = 2;
/** How long close() waits for writers of peers that do not answer. */
const CLOSE_DRAIN_MS = 1000;

/**
 * Listens for prefill workers. Sessions end in one of two ways: committed, with every cell of (layer, token) written once and every
 * checksum verified against this side's memory; or failed, and then only once no write can reach the pages any more (see
 * native/transfer/write_gate.h). Throws ADDRESS_IN_USE.
 */
export async function createHandoffReceiver(address: string, options: HandoffReceiverOptions & { log: Logger; clock: Clock }): Promise<HandoffReceiver> {
  const target = parseAddress(address);
  if (target.kind === 'unix') await removeStaleSocket(target.path);
  if (target.kind === 'tcp' && options.direction === 'pull') {
    throw new TplaError('CONFIG_INVALID', `decode pulls from processes of the same host: listen on a unix: address, not ${address}`);
  }
  if (target.kind === 'tcp' && ['0.0.0.0', '::'].includes(target.host)) {
    throw new TplaError('CONFIG_INVALID', `hand-offs cannot listen on ${address}: prefill workers are told this address; give the one of the interface they reach`);
  }
  const landings = await openLandings(target, options);
  try {
    return new Receiver(target, landings, options);
  } catch (error) {
    landings.close();
    throw error;
  }
}

class Receiver implements HandoffReceiver {
  readonly address: string;
  readonly #handshake: Handshake;
  readonly #arena: KvArena;
  /** Of the arena, which makes it anew each time it is asked. */
  readonly #layout: KvLayout;
  readonly #log: Logger;
  readonly #clock: Clock;
  readonly #server: ChannelServer;
  readonly #landings: Landings;
  readonly #direction: HandoffDirection;
  readonly #connections = new Map<Channel, Connection>();
  readonly #sessions = new Map<string, Session>();
  readonly #pulse: Pulse;
  readonly #stats: HandoffStats = { open: 0, draining: 0, committed: 0, bytes: 0, failed: {} };
  #isClosing = false;

  constructor(target: Address, landings: Landings, { handshake, arena, log, clock, direction = 'push' }: HandoffReceiverOptions & { log: Logger; clock: Clock }) {
    this.#handshake = handshake;
    this.#arena = arena;
    this.#layout = arena.layout;
    this.#log = log;
    this.#clock = clock;
    this.#direction = direction;
    this.#pulse = new Pulse(clock, (isLate) => this.#beat(isLate));
    this.#landings = landings;
    this.#server = native().listenChannel(target.kind === 'unix' ? target.path : target, (channel) => this.#onConnection(channel), {
      onMessage: (channel, bytes, fds) => this.#onMessage(channel, bytes, fds),
      onPushed: (channel, session, layers, tokens, problem) => this.#onPushed(channel, session, { layers, tokens }, problem),
      onClose: (channel, reason) => this.#onClose(channel, reason),
    });
    this.address = formatAddress(target.kind === 'unix' ? target : { ...target, port: this.#server.port });
    log.info({ address: this.address, fingerprint: handshakeFingerprint(handshake), layout: describeLayout(handshake.layout) }, 'ready for hand-offs');
  }

  // ---------------------------------------------------------------- what decode asks for

  open(grant: HandoffGrant): OpenHandoff {
    if (this.#isClosing) throw new TplaError('DRAINING', 'decode is closing and takes no more hand-offs');
    const session = new Session(randomBytes(18).toString('base64url'), grant, this.#layout.layers, this.#clock.now());
    this.#sessions.set(session.id, session);
    this.#followLeases();
    const ticket: HandoffTicket = { address: this.address, session: session.id, tokens: grant.tokens };
    return { ticket, committed: session.committed, failing: session.failing.signal };
  }

  cancel(id: string): void {
    const session = this.#sessions.get(id);
    if (session) this.#fail(session, new TplaError('CANCELLED', 'decode cancelled the hand-off'));
  }

  stats(): HandoffStats {
    const draining = [...this.#sessions.values()].filter((session) => session.failure !== undefined).length;
    return { ...this.#stats, failed: { ...this.#stats.failed }, open: this.#sessions.size - draining, draining };
  }

  async close(): Promise<void> {
    if (!this.#isClosing) {
      this.#isClosing = true;
      this.#server.close();
      for (const session of [...this.#sessions.values()]) this.#fail(session, new TplaError('HANDOFF_FAILED', 'decode is closing'));
    }
    const settled = Promise.allSettled([...this.#sessions.values()].map(({ committed }) => committed));
    await Promise.race([settled, new Promise((resolve) => setTimeout(resolve, CLOSE_DRAIN_MS))]);
    this.#pulse.stop();
    const connections = [...this.#connections.values()];
    for (const { channel } of connections) channel.close();
    await Promise.all(connections.map(({ closed }) => closed));
    this.#landings.close();
  }

  // ---------------------------------------------------------------- connections

  #onConnection(channel: Channel): void {
    const connection = new Connection(channel, this.#clock.now());
    this.#connections.set(channel, connection);
    connection.helloTimer = setTimeout(() => this.#drop(connection, new TplaError('PROTOCOL', `no hello within ${HELLO_MS} ms`)), HELLO_MS);
  }

  #onMessage(channel: Channel, bytes: Uint8Array, fds: number[]): void {
    const connection = this.#connections.get(channel);
    try {
      if (!connection || connection.isDropped) return;
      connection.heard = this.#clock.now();
      const message = decodeMessage(bytes);
      if (fds.length > 0 && message.type !== 'lend') throw new TplaError('PROTOCOL', `${fds.length} descriptors came with a message that takes none`);
      this.#handle(connection, message, fds);
    } catch (thrown) {
      this.#drop(connection!, toTplaError(thrown));
    } finally {
      // What was mapped stays mapped without them.
      for (const fd of fds) closeSync(fd);
    }
  }

  #handle(connection: Connection, message: Message, fds: number[]): void {
    if (connection.landings.length === 0) {
      if (message.type !== 'hello') throw new TplaError('PROTOCOL', `"${message.type}" came before hello`);
      return this.#welcome(connection, message.handshake);
    }
    switch (message.type) {
      case 'open': return this.#attach(connection, message);
      case 'lend': return pullLanding(connection).onLend(message, connection.layout!, fds);
      case 'ready': return this.#ready(connection, message);
      case 'commit': return this.#commit(connection, message);
      case 'fail': return this.#peerFailed(connection, message);
      case 'alive': return;
      default: throw new TplaError('PROTOCOL', `"${message.type}" is not for decode`);
    }
  }

  #welcome(connection: Connection, handshake: Handshake): void {
    checkHandshake(handshake, this.#handshake);
    clearTimeout(connection.helloTimer);
    connection.layout = handshake.layout;
    connection.landings = this.#landings.forConnection();
    const offers = connection.landings.map(({ offer }) => offer);
    connection.send({ type: 'welcome', handshake: this.#handshake, pages: this.#arena.pages, offers }, connection.landings.flatMap(({ fds }) => fds));
    this.#log.info({ peer: connection.channel.peer, offers: offers.map(({ path }) => path), layout: describeLayout(handshake.layout) }, 'prefill connected');
  }

  /** Ends a connection that broke the rules, telling why. */
  #drop(connection: Connection, error: TplaError): void {
    this.#log.warn({ peer: connection.channel.peer, code: error.code }, `hand-off connection refused: ${error.message}`);
    connection.isDropped = true;
    connection.send({ type: 'refused', code: error.code, message: error.message.slice(0, 4000) });
    for (const session of [...connection.sessions.values()]) this.#fail(session, error);
    connection.channel.close();
  }

  /** The peer's process is gone, or it closed the socket, which it does only when it writes nothing any more. */
  #onClose(channel: Channel, reason: string): void {
    const connection = this.#connections.get(channel);
    if (!connection) return;
    this.#connections.delete(channel);
    clearTimeout(connection.helloTimer);
    connection.isGone = true;
    connection.markClosed();
    connection.abandon();
    for (const session of [...connection.sessions.values()]) {
      this.#fail(session, new TplaError('HANDOFF_FAILED', `prefill is gone in the middle of a hand-off: ${reason}`));
    }
    connection.retire();
  }

  // ---------------------------------------------------------------- sessions

  #attach(connection: Connection, { session: id, path }: Extract<Message, { type: 'open' }>): void {
    const refuse = (code: ErrorCode, message: string) => connection.send({ type: 'cancel', session: id, code, message });
    const session = this.#sessions.get(id);
    if (!session || session.failure) return refuse('HANDOFF_FAILED', 'decode knows no such hand-off; it was cancelled, or decode has restarted');
    if (session.attachment) return refuse('PROTOCOL', 'the hand-off belongs to another connection');
    const landing = connection.landings.find(({ offer }) => PATHS_OF[offer.path].includes(path));
    if (!landing) throw new TplaError('PROTOCOL', `path ${path} was not offered`);
    const { tokens, pages, rank = 0, leaseMs } = session.grant;
    let admission: Admission;
    try {
      admission = landing.admit({ session: id, tokens, pages, rank });
    } catch (thrown) {
      const error = toTplaError(thrown);
      return refuse(error.code, error.message);
    }
    session.attachment = { connection, landing, slot: admission.slot, path };
    connection.sessions.set(id, session);
    connection.channel.expect(id, this.#arena, pages, rank);
    // A reader of prefill's pages shows its own to nobody.
    connection.send({ type: 'granted', session: id, tokens, rank, leaseMs, ...admission, pages: this.#direction === 'pull' ? [] : pages });
  }

  /** A push came and was verified, or found wrong. It may have crossed a cancel on the way. */
  #onPushed(channel: Channel, id: string, rectangle: Rectangle, problem: Error | null): void {
    const connection = this.#connections.get(channel);
    if (!connection || connection.isDropped) return;
    connection.heard = this.#clock.now();
    const session = connection.sessions.get(id);
    if (!session || session.failure) return;
    if (!this.#cover(session, rectangle)) {
      return this.#fail(session, new TplaError('PROTOCOL', `prefill pushed layers ${text(rectangle.layers)} of tokens ${text(rectangle.tokens)}, which is outside the grant or came already`));
    }
    if (problem) return this.#fail(session, toTplaError(problem));
    this.#verified(session, rectangle);
  }

  /** Counts a rectangle in; false where it leaves the grant, came already, or is more than was committed. */
  #cover(session: Session, { layers, tokens }: Rectangle): boolean {
    session.pushes++;
    return session.pushes <= (session.commit?.pushes ?? Infinity) && session.coverage.add(layers, tokens);
  }

  #verified(session: Session, { layers, tokens }: Rectangle): void {
    session.verified++;
    session.bytes += bytesOf(this.#layout, layers, tokens);
    session.lastVerified = performance.now();
    this.#finish(session);
  }

  /** Reads what prefill has ready, and verifies what came of it. */
  #ready(connection: Connection, message: Extract<Message, { type: 'ready' }>): void {
    const landing = pullLanding(connection);
    const { session: id, layers, tokens } = message;
    const session = connection.sessions.get(id);
    if (!session || session.failure) return;
    if (!this.#cover(session, { layers, tokens })) {
      return this.#fail(session, new TplaError('PROTOCOL', `prefill has layers ${text(layers)} of tokens ${text(tokens)} ready, which is outside the grant or came already`));
    }
    const { pages, rank = 0 } = session.grant;
    void landing.take(session.attachment!.slot, message, { pages, rank }).then(async ({ bytes, checksums }) => {
      if (!session.failure) connection.send({ type: 'taken', session: id, layers, tokens, bytes });
      await this.#verify(session, { layers, tokens }, checksums);
    }).catch((thrown: unknown) => this.#fail(session, toTplaError(thrown)));
  }

  /** What was read is what stands in prefill's memory: the same sums over decode's own. */
  async #verify(session: Session, { layers, tokens }: Rectangle, expected: BigUint64Array): Promise<void> {
    const found = await native().kvChecksum(this.#arena, layers, tokens, session.grant.pages, session.grant.rank);
    if (session.failure) return;
    const wrong = found.findIndex((sum, i) => sum !== expected[i]);
    if (wrong < 0) return this.#verified(session, { layers, tokens });
    this.#fail(session, new TplaError('CHECKSUM_MISMATCH', `KV of layers ${text(layers)}, tokens ${text(tokens)} does not match what prefill lent (entry ${wrong} of ${found.length}); nothing of it was used`));
  }

  #commit(connection: Connection, message: Extract<Message, { type: 'commit' }>): void {
    const session = connection.sessions.get(message.session);
    if (!session || session.failure) return;
    if (session.commit) return this.#fail(session, new TplaError('PROTOCOL', 'prefill committed twice'));
    if (session.pushes > message.pushes) return this.#fail(session, new TplaError('PROTOCOL', `prefill committed ${message.pushes} pushes and made more`));
    session.commit = message;
    session.committedAt = performance.now();
    this.#finish(session);
  }

  #peerFailed(connection: Connection, { session: id, reason }: Extract<Message, { type: 'fail' }>): void {
    const session = connection.sessions.get(id);
    if (session) this.#fail(session, new TplaError('HANDOFF_FAILED', `prefill gave up: ${reason}`), false);
  }

  /** Accepts a session once everything of it is verified and its writer is shut out. */
  #finish(session: Session): void {
    const { commit, attachment } = session;
    if (!commit || !attachment || session.verified < commit.pushes || session.failure || session.isSettled) return;
    if (!session.coverage.complete) {
      return this.#fail(session, new TplaError('HANDOFF_FAILED', `prefill committed although ${session.coverage.firstGap()}`));
    }
    if (!attachment.landing.revoke(attachment.slot)) {
      return this.#fail(session, new TplaError('PROTOCOL', 'prefill committed while it was still writing'));
    }
    const result: HandoffCommit = {
      firstTokens: commit.firstTokens, path: attachment.path, bytes: session.bytes, transferMs: commit.sinceMs + Math.max(0, session.lastVerified - session.committedAt), prefill: commit.prefill,
    };
    this.#stats.committed++;
    this.#stats.bytes += session.bytes;
    attachment.connection.send({ type: 'committed', session: session.id });
    this.#settle(session);
    session.resolve(result);
  }

  /** Ends a session; its promise settles when no write can reach the pages. */
  #fail(session: Session, error: TplaError, tellPeer = true): void {
    if (session.failure || session.isSettled) return;
    session.failure = error;
    this.#stats.failed[error.code] = (this.#stats.failed[error.code] ?? 0) + 1;
    const { attachment } = session;
    const isSafe = !attachment || attachment.landing.revoke(attachment.slot) || hasWriterGone(attachment);
    if (attachment && tellPeer) attachment.connection.send({ type: 'cancel', session: session.id, code: error.code, message: error.message.slice(0, 4000) });
    session.failing.abort(error);
    if (isSafe) this.#rejectSettled(session, error);
    else this.#awaitDrain(session, error);
  }

  #awaitDrain(session: Session, error: TplaError): void {
    const attachment = session.attachment!;
    const timer = setInterval(() => {
      if (!hasWriterGone(attachment) && !attachment.landing.isDrained(attachment.slot)) return;
      clearInterval(timer);
      this.#rejectSettled(session, error);
    }, DRAIN_POLL_MS);
  }

  #rejectSettled(session: Session, error: TplaError): void {
    this.#settle(session);
    session.reject(error);
  }

  #settle(session: Session): void {
    session.isSettled = true;
    this.#sessions.delete(session.id);
    if (session.attachment) {
      const { connection, landing, slot } = session.attachment;
      connection.sessions.delete(session.id);
      connection.channel.forget(session.id);
      if (connection.isGone) connection.retire();
      else landing.release(slot);
    }
    this.#followLeases();
  }

  // ---------------------------------------------------------------- leases

  #followLeases(): void {
    this.#pulse.follow([...this.#sessions.values()].map(({ grant }) => grant.leaseMs));
  }

  #beat(isLate: boolean): void {
    for (const connection of this.#connections.values()) if (connection.sessions.size > 0) connection.send({ type: 'alive' });
    if (isLate) return;
    const now = this.#clock.now();
    for (const session of [...this.#sessions.values()]) {
      const silentMs = now - (session.attachment?.connection.heard ?? session.opened);
      if (silentMs <= session.grant.leaseMs) continue;
      const who = session.attachment ? 'prefill was silent' : 'no prefill worker came';
      session.attachment?.connection.abandon();
      this.#fail(session, new TplaError('LEASE_EXPIRED', `${who} for ${Math.round(silentMs)} ms, the lease is ${session.grant.leaseMs} ms`));
    }
  }
}

/** A connected prefill worker. */
class Connection {
  readonly channel: Channel;
  readonly sessions = new Map<string, Session>();
  readonly closed: Promise<void>;
  /** Best first; none before the hello. */
  landings: Landing[] = [];
  /** Of the peer's pages. */
  layout: KvLayout | undefined;
  heard: number;
  helloTimer: NodeJS.Timeout | undefined;
  isDropped = false;
  isGone = false;
  markClosed!: () => void;

  constructor(channel: Channel, now: number) {
    this.channel = channel;
    this.heard = now;
    this.closed = new Promise((resolve) => { this.markClosed = resolve; });
  }

  /** Gives the landing up once nobody is there to write, and no session waits for its last writer. */
  retire(): void {
    if (this.sessions.size > 0) return;
    for (const landing of this.landings) landing.close();
    this.landings = [];
  }

  /** Ends what is still being taken in from a peer that is gone or silent. */
  abandon(): void {
    for (const landing of this.landings) landing.abandon();
  }

  /** A closed channel takes no message; its end is on the way. */
  send(message: Message, fds: number[] = []): void {
    if (this.isGone) return;
    try {
      this.channel.send(encodeMessage(message), fds);
    } catch (thrown) {
      if (toTplaError(thrown).code !== 'IO_FAILED') throw thrown;
    }
  }
}

interface Attachment {
  connection: Connection;
  landing: Landing;
  slot: number;
  path: TransferPath;
}

/** Throws PROTOCOL where decode does not pull. */
function pullLanding({ landings: [landing] }: Connection): PullLanding {
  if (landing instanceof PullLanding) return landing;
  throw new TplaError('PROTOCOL', 'prefill lends its pages, which decode did not offer to read');
}

/** The process that writes has ended, and the kernel closed its socket after its last write. */
const hasWriterGone = ({ connection, landing }: Attachment) => connection.isGone && landing.peerWrites;

class Session {
  readonly id: string;
  readonly grant: HandoffGrant;
  readonly opened: number;
  readonly coverage: Coverage;
  readonly committed: Promise<HandoffCommit>;
  readonly failing = new AbortController();
  attachment: Attachment | undefined;
  commit: Extract<Message, { type: 'commit' }> | undefined;
  failure: TplaError | undefined;
  /** Rectangles that came, and of them those that are verified. */
  pushes = 0;
  verified = 0;
  bytes = 0;
  /** By performance.now(). */
  lastVerified = 0;
  committedAt = 0;
  isSettled = false;
  resolve!: (commit: HandoffCommit) => void;
  reject!: (error: TplaError) => void;

  constructor(id: string, grant: HandoffGrant, layers: number, now: number) {
    this.id = id;
    this.grant = grant;
    this.opened = now;
    this.coverage = new Coverage(layers, grant.tokens);
    this.committed = new Promise((resolve, reject) => {
      this.resolve = resolve;
      this.reject = reject;
    });
    // A caller that only listens to `failing` must not bring the process down.
    this.committed.catch(() => {});
  }
}

const text = ([begin, end]: [number, number]) => `[${begin}, ${end})`;

/** Bytes the arena keeps for a rectangle, over all copies. */
function bytesOf(layout: KvLayout, layers: [number, number], tokens: [number, number]): number {
  return tokenBytes(layout, layers) * copiesOf(layout) * (tokens[1] - tokens[0]);
}
