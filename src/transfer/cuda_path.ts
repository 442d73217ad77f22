import { TplaError } from '../errors.js';
import { native } from '../native/loader.js';
import type { Channel, CudaKvArena, KvArena, KvPutResult, KvRegion, PreparedKvPut, WriteGate } from '../native/types.js';
import { GATE_SLOTS, GateSlots } from './gate_slots.js';
import type { PathOffer } from './messages.js';
import type { Admission, Credit, Landing, Reach, Rectangle, Welcome } from './path.js';
import type { TransferPath } from './types.js';

export function isOnGpu(arena: KvArena): arena is CudaKvArena {
  return 'devices' in arena;
}

/** Decode lends GPU memory, by VMM descriptors or IPC handles as the arena was made. */
export class CudaLanding implements Landing {
  readonly offer: PathOffer;
  readonly fds: number[];
  readonly peerWrites = true;
  readonly #slots = new GateSlots();

  constructor(arena: CudaKvArena) {
    const handles = arena.ipcHandles();
    this.offer = handles.length > 0
      ? { path: 'cuda-ipc', gateSlots: GATE_SLOTS, devices: arena.devices, handles }
      : { path: 'cuda-fd', gateSlots: GATE_SLOTS, devices: arena.devices };
    this.fds = [this.#slots.gate.fd, ...(handles.length > 0 ? [] : arena.fds())];
  }

  admit(): Admission { return this.#slots.admit(); }
  revoke(slot: number): boolean { return this.#slots.revoke(slot); }
  isDrained(slot: number): boolean { return this.#slots.isDrained(slot); }
  release(slot: number): void { this.#slots.release(slot); }
  abandon(): void {}
  close(): void { this.#slots.gate.close(); }
}

/**
 * A GPU of prefill writes into decode's memory: its own, a peer GPU's, or pinned host memory. Where only decode's memory is on a GPU,
 * prefill's pages are pinned and that GPU reads them.
 */
export class CudaReach implements Reach {
  readonly path: TransferPath;
  readonly #region: KvRegion;
  readonly #gate: WriteGate;
  /** Prefill's pages as the GPU sees them, where they are host memory. */
  readonly #pinnedSource: KvRegion | null;
  readonly #prepared = new WeakMap<Credit, PreparedKvPut>();

  constructor(source: KvArena, { layout, pages, offer, fds }: Welcome) {
    if (!('gateSlots' in offer)) throw new TplaError('INTERNAL', `a CUDA path was built from an offer of ${offer.path}`);
    if (fds.length === 0) throw new TplaError('PROTOCOL', `decode offered ${offer.path} and sent no write gate`);
    const addon = native();
    const device = isOnGpu(source) ? source.device : 0;
    this.#gate = addon.WriteGate.map(fds[0]!, offer.gateSlots);
    if (offer.path === 'shm') {
      const mapped = addon.mapKvRegion(layout, pages, fds.slice(1));
      this.#region = addon.pinKvRegion(mapped, device);
      mapped.close();
      this.path = 'pinned';
    } else {
      this.#region = addon.mapCudaKvRegion(layout, pages, offer.path === 'cuda-ipc' ? offer.handles : fds.slice(1), device);
      const own = addon.cudaDeviceUuid(device);
      this.path = !isOnGpu(source) ? 'pinned' : offer.devices.every((uuid) => uuid === own) ? 'same-gpu' : offer.path;
    }
    this.#pinnedSource = isOnGpu(source) ? null : addon.pinKvRegion(source, device);
  }

  expect(source: KvArena): void {
    native().expectKvPuts(this.#pinnedSource ?? source, this.#region);
  }

  prepare(source: KvArena, credit: Credit, channel: Channel): PreparedKvPut {
    const put = native().prepareKvPut({
      src: this.#pinnedSource ?? source, dst: this.#region, dstPages: credit.pages, dstRank: credit.rank,
      pass: { gate: this.#gate, slot: credit.slot, epoch: credit.epoch }, announce: { channel, session: credit.session },
    });
    this.#prepared.set(credit, put);
    return put;
  }

  put(source: KvArena, srcPages: Int32Array, credit: Credit, { layers, tokens }: Rectangle, channel: Channel): Promise<KvPutResult> {
    const put = this.#prepared.get(credit) ?? this.prepare(source, credit, channel);
    return put(srcPages, layers[0], layers[1], tokens[0], tokens[1]);
  }

  close(): void {
    this.#region.close();
    this.#pinnedSource?.close();
    this.#gate.close();
  }
}
