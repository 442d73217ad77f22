import { randomBytes } from 'node:crypto';
import { TplaError } from '../errors.js';
import { parseAddress } from '../http/address.js';
import { native } from '../native/loader.js';
import type { KvArena, KvPutResult, KvStreamReceiver, KvStreamSender } from '../native/types.js';
import { GateSlots } from './gate_slots.js';
import type { PathOffer } from './messages.js';
import type { Admission, Credit, Landing, Reach, Reservation, Welcome } from './path.js';

/** Four fill 25 Gbit/s with one core each; more help only where a single TCP stream is held back by its window or its core. */
const DATA_CONNECTIONS = 4;

/** Decode reads KV from data connections into its pages; the gate is passed by our own threads. */
export class TcpLanding implements Landing {
  readonly offer: PathOffer;
  readonly fds: number[] = [];
  readonly peerWrites = false;
  readonly #server: KvStreamReceiver;
  readonly #key = randomBytes(16).toString('hex');
  readonly #slots = new GateSlots();

  constructor(server: KvStreamReceiver) {
    this.#server = server;
    this.#server.admit(this.#key, this.#slots.gate);
    this.offer = { path: 'tcp', port: server.port, key: this.#key };
  }

  admit({ tokens, pages, rank }: Reservation): Admission {
    const admission = this.#slots.admit();
    try {
      this.#server.grant(this.#key, admission.slot, admission.epoch, tokens, pages, rank);
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

  close(): void {
    this.#server.withdraw(this.#key);
    this.#slots.gate.close();
  }
}

/** Prefill makes rows in decode's layout and sends them over several connections. */
export class TcpReach implements Reach {
  readonly path = 'tcp';
  readonly #stream: KvStreamSender;

  private constructor(stream: KvStreamSender) {
    this.#stream = stream;
  }

  static async connect({ address, layout, offer }: Welcome, connections = DATA_CONNECTIONS): Promise<TcpReach> {
    const target = parseAddress(address);
    if (offer.path !== 'tcp' || target.kind !== 'tcp') throw new TplaError('INTERNAL', `a TCP path was built from an offer of ${offer.path} at ${address}`);
    return new TcpReach(await native().connectKvStream({ host: target.host, port: offer.port, key: offer.key, connections, layout }));
  }

  put(source: KvArena, srcPages: Int32Array, credit: Credit, layers: [number, number], tokens: [number, number]): Promise<KvPutResult> {
    return this.#stream.put({ src: source, layers, tokens, srcPages: [srcPages], slot: credit.slot, epoch: credit.epoch });
  }

  close(): void {
    this.#stream.close();
  }
}
