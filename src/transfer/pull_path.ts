/**
 * The other direction: prefill lends its pages, decode reads them. Decode's memory is open to nobody, so that no gate is needed: what is cut off
 * is simply not read any more. Between processes of one host, both with their pages in host memory or both on GPUs.
 */
import { monotonicUs } from '../clock.js';
import { TplaError } from '../errors.js';
import { native } from '../native/loader.js';
import type { KvArena, KvLayout, KvPutResult, KvRegion } from '../native/types.js';
import { isOnGpu } from './cuda_path.js';
import type { Message, PathOffer } from './messages.js';
import type { Admission, Credit, Landing, Placed, Reach, Rectangle, Welcome } from './path.js';
import type { TransferPath } from './types.js';

type Loan = Omit<Extract<Message, { type: 'lend' }>, 'type'>;
type Ready = Pick<Extract<Message, { type: 'ready' }>, 'layers' | 'tokens' | 'pages'>;

/** Decode's side of a connection that lends. */
export class PullLanding implements Landing {
  readonly offer: PathOffer;
  readonly fds: number[] = [];
  readonly peerWrites = false;
  readonly #arena: KvArena;
  /** Reads under way by session slot; a slot is named once. */
  readonly #reading = new Map<number, number>();
  readonly #revoked = new Set<number>();
  #slots = 0;
  #lent: KvRegion | undefined;
  #isClosed = false;

  constructor(arena: KvArena) {
    this.#arena = arena;
    this.offer = { path: 'pull', devices: isOnGpu(arena) ? arena.devices : [] };
  }

  /** Maps prefill's pages. Throws PROTOCOL for a second loan, and where the memory cannot be read from here. */
  onLend({ path, pages, handles }: Loan, layout: KvLayout, fds: number[]): void {
    if (this.#lent) throw new TplaError('PROTOCOL', 'prefill lent its pages twice');
    const addon = native();
    if ((path === 'shm') === isOnGpu(this.#arena)) throw new TplaError('PROTOCOL', `prefill lends ${path}, which is not what decode's pages go together with`);
    this.#lent = path === 'shm'
      ? addon.mapKvRegion(layout, pages, fds)
      : addon.mapCudaKvRegion(layout, pages, path === 'cuda-ipc' ? handles : fds, isOnGpu(this.#arena) ? this.#arena.device : 0);
  }

  /** Reads a rectangle into decode's own pages; resolves with what its checksums must be. */
  async take(slot: number, { layers, tokens, pages }: Ready, target: Pick<Credit, 'pages' | 'rank'>): Promise<KvPutResult> {
    if (!this.#lent) throw new TplaError('PROTOCOL', 'prefill has pages ready and lent none');
    if (this.#revoked.has(slot)) throw new TplaError('CANCELLED', 'the hand-off is over');
    this.#reading.set(slot, (this.#reading.get(slot) ?? 0) + 1);
    try {
      return await native().kvPut({ src: this.#lent, dst: this.#arena, layers, tokens, srcPages: [pages], dstPages: target.pages, dstRank: target.rank });
    } finally {
      this.#reading.set(slot, this.#reading.get(slot)! - 1);
      this.#closeWhenIdle();
    }
  }

  admit(): Admission {
    if (this.#lent) native().expectKvPuts(this.#lent, this.#arena);
    return { slot: this.#slots++, epoch: 0 };
  }

  revoke(slot: number): boolean {
    this.#revoked.add(slot);
    return this.isDrained(slot);
  }

  isDrained(slot: number): boolean { return (this.#reading.get(slot) ?? 0) === 0; }

  release(slot: number): void {
    this.#reading.delete(slot);
    this.#revoked.delete(slot);
  }

  abandon(): void {}

  close(): void {
    this.#isClosed = true;
    this.#closeWhenIdle();
  }

  #closeWhenIdle(): void {
    if (!this.#isClosed || [...this.#reading.values()].some((count) => count > 0)) return;
    this.#lent?.close();
    this.#lent = undefined;
  }
}

/** Prefill's side: says what is ready, and waits until decode has it. */
export class PullReach implements Reach {
  readonly path: TransferPath;
  readonly loan: Loan;
  readonly fds: number[];
  readonly #ask: (session: string, rectangle: Ready) => Promise<number>;

  /** `ask` tells decode of a rectangle and resolves, with the bytes that decode keeps of it, once it was read. */
  constructor(source: KvArena, { offer }: Welcome, ask: (session: string, rectangle: Ready) => Promise<number>) {
    if (offer.path !== 'pull') throw new TplaError('INTERNAL', `a lending path was built from an offer of ${offer.path}`);
    this.#ask = ask;
    if (isOnGpu(source) !== offer.devices.length > 0) {
      throw new TplaError('HANDSHAKE_REFUSED', 'decode pulls, which needs the pages of both sides in host memory or of both on GPUs; let it take pushes instead');
    }
    const handles = isOnGpu(source) ? source.ipcHandles() : [];
    const path = !isOnGpu(source) ? 'shm' : handles.length > 0 ? 'cuda-ipc' : 'cuda-fd';
    this.loan = { path, pages: source.pages, handles };
    this.fds = handles.length > 0 ? [] : source.fds();
    this.path = isOnGpu(source) && source.devices.every((uuid) => offer.devices.every((other) => other === uuid)) ? 'same-gpu' : path;
  }

  async put(_source: KvArena, srcPages: Int32Array, credit: Credit, rectangle: Rectangle): Promise<Placed> {
    const bytes = await this.#ask(credit.session, { ...rectangle, pages: srcPages });
    return { bytes, wireBytes: bytes, placedAt: monotonicUs() };
  }

  close(): void {}
}
