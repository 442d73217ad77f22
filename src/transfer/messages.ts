/**
 * Messages of the hand-off channel and their codec. A message is u32 length of a JSON head, the head, and a binary tail for page tables
 * and checksums; little-endian. Nothing of a message is believed before it passed here: types, ranges and the tail's length are checked,
 * unknown fields refused. `pushed` alone has no JSON: native code writes and reads it (native/transfer/push_message.h), so that what is on the
 * critical path of a hand-off waits for no event loop; this codec of it is for whoever takes a channel's messages as they are. What is left to the receiver of a message is meaning: whether a session exists, whether pages are its own.
 *
 *   prefill                                   decode
 *   hello     who it is              ──▶
 *                                    ◀──      welcome   who it is, paths offered, descriptors │ refused
 *   open      session                ──▶
 *                                    ◀──      granted   tokens, page tables (the credits)
 *   pushed    a rectangle is written ──▶                (verified while the next is written)
 * or, where decode pulls,
 *   lend      prefill's pages, descriptors ──▶          (once, after the welcome)
 *   ready     a rectangle is computed ──▶
 *                                    ◀──      taken     read (verified while the next is read)
 *   commit    results                ──▶
 *                                    ◀──      committed │ cancel
 *   fail      why nothing more comes ──▶
 *   alive                            ◀─▶      alive
 */
import { TplaError, ERRORS, type ErrorCode } from '../errors.js';
import { sharedWidths, type SharedWidths } from '../model/shared_widths.js';
import type { KvDType, KvForm, KvLayout, SampledToken } from '../native/types.js';
import { PATHS, PROTOCOL, type Handshake, type PrefillStats, type TransferPath } from './types.js';

/** How the receiver lets KV bytes in, best first in a welcome. */
export type PathOffer =
  /** Memory descriptors come with the welcome: the write gate, then one per memory of the layout. */
  | { path: 'shm'; gateSlots: number }
  /** GPU memory of this host; with the welcome come the write gate and, for cuda-fd, a descriptor per memory. `devices` are the GPUs' UUIDs. */
  | { path: 'cuda-fd'; gateSlots: number; devices: string[] }
  | { path: 'cuda-ipc'; gateSlots: number; devices: string[]; handles: string[] }
  /** UCX endpoints to the worker at `address`, each opened with `key`. */
  | { path: 'ucx'; version: string; address: Buffer; key: string }
  /** Messages to the NIXL agent whose metadata are `address`, each sender's first one with `key`; `backends` are those that it has started. */
  | { path: 'nixl'; backends: string[]; ucxVersion: string; address: Buffer; key: string }
  /** Data connections to `port` of the host the channel was dialled at, each opened with `key`. */
  | { path: 'tcp'; port: number; key: string }
  /** Decode reads what prefill lends. `devices` are the UUIDs of the GPUs that hold decode's pages; none where those are in host memory. */
  | { path: 'pull'; devices: string[] };

export type Message =
  | { type: 'hello'; handshake: Handshake }
  | { type: 'welcome'; handshake: Handshake; pages: number; offers: PathOffer[] }
  | { type: 'refused'; code: ErrorCode; message: string }
  | { type: 'open'; session: string; path: TransferPath }
  | { type: 'granted'; session: string; tokens: [number, number]; rank: number; leaseMs: number; slot: number; epoch: number; pages: Int32Array[] }
  | { type: 'pushed'; session: string; layers: [number, number]; tokens: [number, number]; checksums: BigUint64Array }
  /** Descriptors come along: one for each memory of the sender's layout, but for cuda-ipc. */
  | { type: 'lend'; path: 'shm' | 'cuda-fd' | 'cuda-ipc'; pages: number; handles: string[] }
  | { type: 'ready'; session: string; layers: [number, number]; tokens: [number, number]; pages: Int32Array }
  | { type: 'taken'; session: string; layers: [number, number]; tokens: [number, number]; bytes: number }
  /** Sent as soon as nothing more will be pushed: some of the `pushes` may still be on their way. The first began `sinceMs` before. */
  | { type: 'commit'; session: string; pushes: number; sinceMs: number; firstTokens: SampledToken[]; prefill: PrefillStats }
  | { type: 'committed'; session: string }
  | { type: 'fail'; session: string; reason: string }
  | { type: 'cancel'; session: string; code: ErrorCode; message: string }
  | { type: 'alive' };

const OFFERED = ['shm', 'cuda-fd', 'cuda-ipc', 'nixl', 'ucx', 'tcp', 'pull'] as const;
const LENT = ['shm', 'cuda-fd', 'cuda-ipc'] as const;
const FORMS: readonly KvForm[] = ['mla', 'tpla', 'dcp', 'dp'];
const DTYPES: readonly KvDType[] = ['f32', 'bf16', 'fp8'];

const MAX_HEAD_BYTES = 1 << 20;
const MAX_TEXT = 4096;
const MAX_SESSION_BYTES = 256;
/** An address of UCX or NIXL grows with the devices of the host. */
const MAX_BASE64 = 65_536;
const MAX_TOKENS = 2 ** 31 - 2 ** 15;
const MAX_CHOICES = 1024;
const MAX_TOP = 1024;
const MAX_RANKS = 64;
const MAX_LAYERS = 4096;
const MAX_BACKENDS = 64;

// ---------------------------------------------------------------- encoding

export function encodeMessage(message: Message): Uint8Array {
  if (message.type === 'pushed') return encodePushed(message);
  const tails: Uint8Array[] = [];
  let head: object = message;
  if (message.type === 'granted') {
    for (const table of message.pages) tails.push(bytesOf(table));
    head = { ...message, pages: message.pages.map((table) => table.length) };
  } else if (message.type === 'welcome') {
    head = { ...message, offers: message.offers.map(writeOffer) };
  } else if (message.type === 'ready') {
    tails.push(bytesOf(message.pages));
    head = { ...message, pages: message.pages.length };
  } else if (message.type === 'commit') {
    head = { ...message, firstTokens: message.firstTokens.map(writeSampled) };
  }
  const text = Buffer.from(JSON.stringify(head));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(text.length);
  return Buffer.concat([length, text, ...tails]);
}

/** u32 0, u32 bytes of the session, i32 layers and tokens, the session in ASCII, zeros up to a multiple of 8, u64 checksums. */
function encodePushed({ session, layers, tokens, checksums }: Extract<Message, { type: 'pushed' }>): Uint8Array {
  const name = Buffer.from(session);
  const head = Buffer.alloc(PUSHED_HEAD_BYTES + padded(name.length));
  [0, name.length, ...layers, ...tokens].forEach((value, i) => head.writeInt32LE(value, i * 4));
  name.copy(head, PUSHED_HEAD_BYTES);
  return Buffer.concat([head, bytesOf(checksums)]);
}

const PUSHED_HEAD_BYTES = 24;
const padded = (bytes: number) => Math.ceil(bytes / 8) * 8;

const bytesOf = (array: Int32Array | BigUint64Array) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

function writeOffer(offer: PathOffer): object {
  return 'address' in offer ? { ...offer, address: offer.address.toString('base64') } : offer;
}

/** JSON has no NaN, and a log-probability nobody asked for is one. */
function writeSampled({ token, logprob, top }: SampledToken): object {
  const finite = (value: number) => (Number.isFinite(value) ? value : null);
  return { token, logprob: finite(logprob), top: top.map((entry) => ({ token: entry.token, logprob: finite(entry.logprob) })) };
}

// ---------------------------------------------------------------- decoding

/** Throws PROTOCOL saying which field is wrong. */
export function decodeMessage(bytes: Uint8Array): Message {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (buffer.length < 4) throw malformed(`${buffer.length} bytes are no message`);
  const headBytes = buffer.readUInt32LE(0);
  if (headBytes === 0) return decodePushed(buffer);
  if (headBytes > MAX_HEAD_BYTES || headBytes > buffer.length - 4) throw malformed(`a head of ${headBytes} bytes in a message of ${buffer.length}`);
  const tail = new Tail(buffer.subarray(4 + headBytes));
  const message = readMessage(Fields.parse(buffer.subarray(4, 4 + headBytes)), tail);
  tail.end();
  return message;
}

function decodePushed(buffer: Buffer): Message {
  if (buffer.length < PUSHED_HEAD_BYTES) throw malformed(`${buffer.length} bytes are no push`);
  const sessionBytes = buffer.readUInt32LE(4);
  const sumsAt = PUSHED_HEAD_BYTES + padded(sessionBytes);
  if (sessionBytes > MAX_SESSION_BYTES || sumsAt > buffer.length) throw malformed(`a session's name of ${sessionBytes} bytes in a push of ${buffer.length}`);
  const session = buffer.toString('latin1', PUSHED_HEAD_BYTES, PUSHED_HEAD_BYTES + sessionBytes);
  if (!/^[\x20-\x7e]*$/.test(session)) throw malformed("a session's name that is not ASCII");
  const range = (field: string, at: number): [number, number] => {
    const [begin, end] = [buffer.readInt32LE(at), buffer.readInt32LE(at + 4)];
    if (begin < 0 || begin >= end) throw malformed(`${field} is [${begin},${end}], expected a range`);
    return [begin, end];
  };
  const tail = new Tail(buffer.subarray(sumsAt));
  const checksums = tail.uint64s(Math.floor((buffer.length - sumsAt) / 8));
  tail.end();
  return { type: 'pushed', session, layers: range('layers', 8), tokens: range('tokens', 16), checksums };
}

function readMessage(fields: Fields, tail: Tail): Message {
  const type = fields.text('type');
  const read = Object.hasOwn(READERS, type) ? READERS[type as keyof typeof READERS] : undefined;
  if (read === undefined) throw malformed(`type "${type.slice(0, 40)}" is unknown`);
  const message = read(fields, tail);
  fields.end();
  return message;
}

const READERS: { [T in Exclude<Message['type'], 'pushed'>]: (fields: Fields, tail: Tail) => Extract<Message, { type: T }> } = {
  hello: (f) => ({ type: 'hello', handshake: readHandshake(f.object('handshake')) }),
  welcome: (f) => ({
    type: 'welcome',
    handshake: readHandshake(f.object('handshake')),
    pages: f.integer('pages', 1, 2 ** 28),
    offers: f.objects('offers', PATHS.length).map(readOffer),
  }),
  refused: (f) => ({ type: 'refused', code: readCode(f), message: f.text('message') }),
  open: (f) => ({ type: 'open', session: f.text('session'), path: f.oneOf('path', PATHS) }),
  granted: (f, tail) => ({
    type: 'granted',
    session: f.text('session'),
    tokens: f.range('tokens', MAX_TOKENS),
    rank: f.integer('rank', 0, MAX_RANKS - 1),
    leaseMs: f.number('leaseMs', 1, 1e9),
    slot: f.integer('slot', 0, 2 ** 16),
    epoch: f.integer('epoch', 0, 2 ** 32 - 1),
    pages: f.integers('pages', MAX_RANKS, MAX_TOKENS).map((length) => tail.int32s(length)),
  }),
  lend: (f) => ({ type: 'lend', path: f.oneOf('path', LENT), pages: f.integer('pages', 1, 2 ** 28), handles: f.texts('handles', MAX_RANKS) }),
  ready: (f, tail) => ({
    type: 'ready',
    session: f.text('session'),
    layers: f.range('layers', 4096),
    tokens: f.range('tokens', MAX_TOKENS),
    pages: tail.int32s(f.integer('pages', 1, MAX_TOKENS)),
  }),
  taken: (f) => ({
    type: 'taken',
    session: f.text('session'),
    layers: f.range('layers', 4096),
    tokens: f.range('tokens', MAX_TOKENS),
    bytes: f.integer('bytes', 0, Number.MAX_SAFE_INTEGER),
  }),
  commit: (f) => ({
    type: 'commit',
    session: f.text('session'),
    pushes: f.integer('pushes', 0, 2 ** 31),
    sinceMs: f.number('sinceMs', 0, 1e12),
    firstTokens: f.objects('firstTokens', MAX_CHOICES).map(readSampled),
    prefill: readStats(f.object('prefill')),
  }),
  committed: (f) => ({ type: 'committed', session: f.text('session') }),
  fail: (f) => ({ type: 'fail', session: f.text('session'), reason: f.text('reason') }),
  cancel: (f) => ({ type: 'cancel', session: f.text('session'), code: readCode(f), message: f.text('message') }),
  alive: () => ({ type: 'alive' }),
};

function readCode(fields: Fields): ErrorCode {
  return fields.oneOf('code', Object.keys(ERRORS) as ErrorCode[]);
}

function readHandshake(fields: Fields): Handshake {
  const protocol = fields.integer('protocol', 0, 2 ** 31);
  if (protocol !== PROTOCOL) throw malformed(`protocol ${protocol}, this side speaks ${PROTOCOL}; run the same version of tpla on both`);
  const identity = fields.object('identity');
  const handshake: Handshake = {
    protocol: PROTOCOL,
    identity: { name: identity.text('name'), fingerprint: identity.text('fingerprint'), reparam: identity.text('reparam') },
    layout: readLayout(fields.object('layout')),
  };
  identity.end();
  fields.end();
  return handshake;
}

function readLayout(fields: Fields): KvLayout {
  const layout: KvLayout = {
    form: fields.oneOf('form', FORMS),
    ranks: fields.integer('ranks', 1, MAX_RANKS),
    layers: fields.integer('layers', 1, MAX_LAYERS),
    latent: fields.integer('latent', 1, 65536),
    rope: fields.integer('rope', 0, 65536),
    shared: readShared(fields),
    dtype: fields.oneOf('dtype', DTYPES),
    pageTokens: fields.integer('pageTokens', 16, 16384),
  };
  fields.end();
  return layout;
}

function readShared(fields: Fields): SharedWidths {
  return fields.isList('shared') ? sharedWidths(fields.integers('shared', MAX_LAYERS, 65536)) : fields.integer('shared', 0, 65536);
}

const readSlots = (fields: Fields) => fields.integer('gateSlots', 1, 2 ** 16);

function readOffer(fields: Fields): PathOffer {
  const path = fields.oneOf('path', OFFERED);
  let offer: PathOffer;
  switch (path) {
    case 'shm': offer = { path, gateSlots: readSlots(fields) }; break;
    case 'cuda-fd': offer = { path, gateSlots: readSlots(fields), devices: fields.texts('devices', MAX_RANKS) }; break;
    case 'cuda-ipc': offer = { path, gateSlots: readSlots(fields), devices: fields.texts('devices', MAX_RANKS), handles: fields.texts('handles', MAX_RANKS) }; break;
    case 'ucx': offer = { path, version: fields.text('version'), address: fields.base64('address'), key: fields.text('key') }; break;
    case 'nixl': offer = { path, backends: fields.texts('backends', MAX_BACKENDS), ucxVersion: fields.text('ucxVersion'), address: fields.base64('address'), key: fields.text('key') }; break;
    case 'pull': offer = { path, devices: fields.texts('devices', MAX_RANKS) }; break;
    case 'tcp': offer = { path, port: fields.integer('port', 1, 65535), key: fields.text('key') }; break;
  }
  fields.end();
  return offer;
}

function readSampled(fields: Fields): SampledToken {
  const sampled: SampledToken = {
    token: fields.integer('token', 0, 2 ** 31 - 1),
    logprob: fields.logprob('logprob'),
    top: fields.objects('top', MAX_TOP).map((entry) => {
      const alternative = { token: entry.integer('token', 0, 2 ** 31 - 1), logprob: entry.logprob('logprob') };
      entry.end();
      return alternative;
    }),
  };
  fields.end();
  return sampled;
}

function readStats(fields: Fields): PrefillStats {
  const stats: PrefillStats = {
    promptTokens: fields.integer('promptTokens', 0, MAX_TOKENS),
    pooledTokens: fields.integer('pooledTokens', 0, MAX_TOKENS),
    skippedTokens: fields.integer('skippedTokens', 0, MAX_TOKENS),
    computedTokens: fields.integer('computedTokens', 0, MAX_TOKENS),
    queueMs: fields.number('queueMs', 0, 1e12),
    computeMs: fields.number('computeMs', 0, 1e12),
  };
  fields.end();
  return stats;
}

const malformed = (what: string) => new TplaError('PROTOCOL', `malformed hand-off message: ${what}`);

/** An object of the head, each field read once and by type. */
class Fields {
  readonly #object: Record<string, unknown>;
  readonly #where: string;
  readonly #unread: Set<string>;

  private constructor(value: unknown, where: string) {
    if (typeof value !== 'object' || value === null || Array.isArray(value)) throw malformed(`${where === '' ? 'the head' : where} is not an object`);
    this.#object = value as Record<string, unknown>;
    this.#where = where;
    this.#unread = new Set(Object.keys(this.#object));
  }

  static parse(text: Buffer): Fields {
    let value: unknown;
    try {
      value = JSON.parse(text.toString('utf8'));
    } catch {
      throw malformed('the head is not JSON');
    }
    return new Fields(value, '');
  }

  text(field: string): string {
    const value = this.#take(field);
    if (typeof value !== 'string' || value.length > MAX_TEXT) throw this.#wrong(field, `text of at most ${MAX_TEXT} characters`);
    return value;
  }

  base64(field: string): Buffer {
    const value = this.#take(field);
    if (typeof value !== 'string' || value.length > MAX_BASE64 || !/^[A-Za-z0-9+/]+={0,2}$/.test(value)) throw this.#wrong(field, `base64 of at most ${MAX_BASE64} characters`);
    return Buffer.from(value, 'base64');
  }

  oneOf<T extends string>(field: string, allowed: readonly T[]): T {
    const value = this.text(field);
    if (!(allowed as readonly string[]).includes(value)) throw this.#wrong(field, `one of ${allowed.join(', ')}`);
    return value as T;
  }

  number(field: string, least: number, most: number): number {
    const value = this.#take(field);
    if (typeof value !== 'number' || !(value >= least && value <= most)) throw this.#wrong(field, `a number from ${least} to ${most}`);
    return value;
  }

  integer(field: string, least: number, most: number): number {
    const value = this.#take(field);
    if (!isInteger(value, least, most)) throw this.#wrong(field, `a whole number from ${least} to ${most}`);
    return value;
  }

  isList(field: string): boolean {
    return Array.isArray(this.#object[field]);
  }

  integers(field: string, mostEntries: number, most: number): number[] {
    const value = this.#take(field);
    if (!Array.isArray(value) || value.length > mostEntries || !value.every((entry) => isInteger(entry, 0, most))) {
      throw this.#wrong(field, `at most ${mostEntries} whole numbers up to ${most}`);
    }
    return value as number[];
  }

  texts(field: string, mostEntries: number): string[] {
    const value = this.#take(field);
    if (!Array.isArray(value) || value.length > mostEntries || !value.every((entry) => typeof entry === 'string' && entry.length <= MAX_TEXT)) {
      throw this.#wrong(field, `at most ${mostEntries} texts`);
    }
    return value as string[];
  }

  /** [begin, end) with 0 <= begin < end <= most. */
  range(field: string, most: number): [number, number] {
    const value = this.#take(field);
    if (!Array.isArray(value) || value.length !== 2 || !value.every((entry) => isInteger(entry, 0, most)) || value[0] >= value[1]) {
      throw this.#wrong(field, `a range [begin, end) up to ${most}`);
    }
    return [value[0], value[1]];
  }

  logprob(field: string): number {
    const value = this.#take(field);
    if (value === null) return NaN;
    if (typeof value !== 'number') throw this.#wrong(field, 'a number or null');
    return value;
  }

  object(field: string): Fields {
    return new Fields(this.#take(field), this.#path(field));
  }

  objects(field: string, most: number): Fields[] {
    const value = this.#take(field);
    if (!Array.isArray(value) || value.length > most) throw this.#wrong(field, `an array of at most ${most}`);
    return value.map((entry, i) => new Fields(entry, `${this.#path(field)}[${i}]`));
  }

  end(): void {
    const [field] = this.#unread;
    if (field !== undefined) throw malformed(`${this.#path(field.slice(0, 40))} is not a field of this message`);
  }

  #take(field: string): unknown {
    this.#unread.delete(field);
    return Object.hasOwn(this.#object, field) ? this.#object[field] : undefined;
  }

  #path(field: string): string {
    return this.#where === '' ? field : `${this.#where}.${field}`;
  }

  #wrong(field: string, expected: string): TplaError {
    const found = JSON.stringify(this.#object[field]) ?? 'nothing';
    return malformed(`${this.#path(field)} is ${found.slice(0, 60)}, expected ${expected}`);
  }
}

function isInteger(value: unknown, least: number, most: number): value is number {
  return typeof value === 'number' && Number.isInteger(value) && value >= least && value <= most;
}

/** The binary part, taken in order; all of it must be used. */
class Tail {
  readonly #bytes: Buffer;
  #at = 0;

  constructor(bytes: Buffer) {
    this.#bytes = bytes;
  }

  int32s(length: number): Int32Array {
    return new Int32Array(this.#take(length * 4));
  }

  uint64s(length: number): BigUint64Array {
    return new BigUint64Array(this.#take(length * 8));
  }

  end(): void {
    if (this.#at !== this.#bytes.length) throw malformed(`${this.#bytes.length - this.#at} bytes follow the message`);
  }

  #take(bytes: number): ArrayBuffer {
    if (bytes > this.#bytes.length - this.#at) throw malformed(`${this.#bytes.length} bytes of data, more were announced`);
    const copy = new Uint8Array(bytes);
    copy.set(this.#bytes.subarray(this.#at, this.#at + bytes));
    this.#at += bytes;
    return copy.buffer;
  }
}
