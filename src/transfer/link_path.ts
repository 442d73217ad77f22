/** Paths between processes that share no memory: what TCP, UCX and NIXL have in common. */
import { randomBytes } from 'node:crypto';
import type { Channel, KvArena, KvLinkReceiver, KvLinkSender, KvMessageSender, KvPutResult, LinkMemory } from '../native/types.js';
import { isOnGpu } from './cuda_path.js';
import { GateSlots } from './gate_slots.js';
import type { PathOffer } from './messages.js';
import type { Admission, Credit, Landing, Reach, Rectangle, Reservation } from './path.js';
import type { TransferPath } from './types.js';

/** Decode takes KV from a link into its pages; the gate is passed by our own threads. */
export class LinkLanding implements Landing {
  readonly offer: PathOffer;
  readonly fds: number[] = [];
  readonly peerWrites = false;
  readonly #receiver: KvLinkReceiver;
  readonly #key = randomBytes(16).toString('hex');
  readonly #slots = new GateSlots();

  constructor(receiver: KvLinkReceiver, offer: (key: string) => PathOffer) {
    this.#receiver = receiver;
    this.#receiver.admit(this.#key, this.#slots.gate);
    this.offer = offer(this.#key);
  }

  admit({ tokens, pages, rank }: Reservation): Admission {
    const admission = this.#slots.admit();
    try {
      this.#receiver.grant(this.#key, admission.slot, admission.epoch, tokens, pages, rank);
    } catch (error) {
      this.revoke(admission.slot);
      this.release(admission.slot);
      throw error;
    }
    return admission;
  }

  revoke(slot: number): boolean { return this.#slots.revoke(slot); }
  isDrained(slot: number): boolean { return this.#slots.isDrained(slot); }
  release(slot: number): void { this.#slots.release(slot); }
  abandon(): void { this.#receiver.disconnect(this.#key); }

  close(): void {
    this.#receiver.withdraw(this.#key);
    this.#slots.gate.close();
  }
}

/** For a link by messages, which rows leave from. */
export const deviceOf = (source: KvArena) => (isOnGpu(source) ? { device: source.device } : {});

/** Prefill makes rows in decode's layout and sends them. */
export class LinkReach implements Reach {
  readonly path: TransferPath;
  readonly memory: LinkMemory;
  readonly #sender: KvLinkSender & Partial<KvMessageSender>;

  constructor(path: TransferPath, sender: KvLinkSender & Partial<KvMessageSender>) {
    this.path = path;
    this.memory = sender.memory ?? 'host';
    this.#sender = sender;
  }

  /** UCX keeps transports between GPUs ready, too; they take no part in what leaves from host memory. */
  transports(): string[] {
    const found = this.#sender.transports?.() ?? [];
    return this.memory === 'gpu' ? found : found.filter((transport) => !transport.startsWith('cuda_'));
  }

  put(source: KvArena, srcPages: Int32Array, credit: Credit, rectangle: Rectangle, channel: Channel): Promise<KvPutResult> {
    return this.#sender.put({
      src: source, ...rectangle, srcPages: [srcPages], slot: credit.slot, epoch: credit.epoch, announce: { channel, session: credit.session },
    });
  }

  abandon(): void {
    this.#sender.close();
  }

  close(): void {
    this.#sender.close();
  }
}
