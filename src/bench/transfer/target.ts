/** Decode's end of a benchmark: arenas and receivers as the driving end asks for them. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Logger } from 'pino';
import { monotonicUs, systemClock } from '../../clock.js';
import { TplaError } from '../../errors.js';
import { parseAddress } from '../../http/address.js';
import { native } from '../../native/loader.js';
import type { ChannelServer, KvArena, TimelineMark } from '../../native/types.js';
import { isOnGpu } from '../../transfer/cuda_path.js';
import { createHandoffReceiver } from '../../transfer/receiver.js';
import type { HandoffReceiver, HandoffTicket } from '../../transfer/types.js';
import { scatteredPages } from './cases.js';
import { benchHandshake } from './handshake.js';
import { serveControl, type Request } from './control.js';
import { newArena } from './memory.js';
import type { OpenLink } from './path.js';
import { handoffPath, openLink } from './paths.js';
import { differenceFromPattern } from './pattern.js';

const LEASE_MS = 30_000;

/** Listens for driving ends. Resolves when it listens; `onLeave` is told when one has gone. */
export async function serveTarget(address: string, log: Logger, onLeave: () => void): Promise<ChannelServer> {
  const target = new Target(address, log);
  return serveControl(address, {
    handle: (request) => target.handle(request),
    leave: async () => {
      await target.close();
      onLeave();
    },
  });
}

class Target {
  readonly #control: string;
  readonly #log: Logger;
  #directory: string | undefined;
  #arena: KvArena | undefined;
  #link: OpenLink | undefined;
  #receiver: HandoffReceiver | undefined;
  #sink: ChannelServer | undefined;
  /** When the last hand-off of each request was accepted. */
  readonly #accepted = new Map<number, Promise<number>>();

  constructor(control: string, log: Logger) {
    this.#control = control;
    this.#log = log;
  }

  async handle(request: Request): Promise<{ answer: object; fds?: number[] }> {
    switch (request.op) {
      case 'setup': return this.#setup(request);
      case 'open': return { answer: { ticket: this.#open(request) } };
      case 'verify': return { answer: { difference: await differenceFromPattern(this.#ready().arena, request) } };
      case 'accepted': return { answer: { at: await this.#accepted.get(request.request) } };
      case 'timeline': return { answer: { marks: takeTimeline(request.keep) } };
      case 'sink': return { answer: { port: this.#listenSink() } };
    }
  }

  async close(): Promise<void> {
    await this.#receiver?.close();
    this.#receiver = undefined;
    this.#link?.close();
    this.#link = undefined;
    this.#arena?.close();
    this.#arena = undefined;
    this.#sink?.close();
    this.#sink = undefined;
    if (this.#directory !== undefined) rmSync(this.#directory, { recursive: true, force: true });
    this.#directory = undefined;
  }

  async #setup({ path: name, direction, target: layout, pages }: Extract<Request, { op: 'setup' }>): Promise<{ answer: object; fds: number[] }> {
    await this.close();
    const path = handoffPath(name);
    this.#directory = mkdtempSync(join(tmpdir(), 'tpla-bench-'));
    this.#arena = newArena(path.target, layout, pages);
    const address = path.channel === 'tcp' ? `tcp://${this.#host()}:0` : `unix:${join(this.#directory, 'handoff.sock')}`;
    this.#link = await openLink(path);
    this.#receiver = await createHandoffReceiver(address, { handshake: benchHandshake(layout), arena: this.#arena, log: this.#log, clock: systemClock, direction, ...this.#link.options });
    const handles = isOnGpu(this.#arena) ? this.#arena.ipcHandles() : [];
    return { answer: { address: this.#receiver.address, handles }, fds: handles.length > 0 ? [] : this.#arena.fds() };
  }

  #open({ request, tokens, seed }: Extract<Request, { op: 'open' }>): HandoffTicket {
    const { receiver, arena } = this.#ready();
    const { ticket, committed } = receiver.open({ tokens: [0, tokens], pages: scatteredPages(arena.layout, tokens, seed, request), leaseMs: LEASE_MS });
    const accepted = committed.then(monotonicUs);
    accepted.catch(() => {});
    this.#accepted.set(request, accepted);
    return ticket;
  }

  #listenSink(): number {
    this.#sink ??= native().listenSink(this.#host());
    return this.#sink.port;
  }

  #host(): string {
    const control = parseAddress(this.#control);
    return control.kind === 'tcp' ? control.host : '127.0.0.1';
  }

  #ready(): { arena: KvArena; receiver: HandoffReceiver } {
    if (!this.#arena || !this.#receiver) throw new TplaError('REQUEST_INVALID', 'nothing is set up');
    return { arena: this.#arena, receiver: this.#receiver };
  }
}

function takeTimeline(keep: boolean): TimelineMark[] {
  const marks = native().takeTimeline();
  native().keepTimeline(keep);
  return marks;
}
