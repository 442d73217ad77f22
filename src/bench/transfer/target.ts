/** Decode's end of a benchmark: arenas and receivers as the driving end asks for them. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Logger } from 'pino';
import { systemClock } from '../../clock.js';
import { TplaError } from '../../errors.js';
import { parseAddress } from '../../http/address.js';
import { native } from '../../native/loader.js';
import type { ChannelServer, KvArena, KvDType, KvLayout, TimelineMark } from '../../native/types.js';
import { isOnGpu } from '../../transfer/cuda_path.js';
import { createHandoffReceiver } from '../../transfer/receiver.js';
import type { HandoffReceiver, HandoffTicket } from '../../transfer/types.js';
import { rowBytes } from '../../kv/layout.js';
import { sharedIn } from '../../model/shared_widths.js';
import { canonical, pagesFor, scatteredPages } from './cases.js';
import { benchHandshake } from './handshake.js';
import { serveControl, type Request } from './control.js';
import { monotonicUs } from './timeline.js';
import { handoffPath, newArena, openLink, type OpenLink } from './paths.js';

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
  /** When the last hand-off was accepted. */
  #accepted: Promise<number> = Promise.resolve(0);

  constructor(control: string, log: Logger) {
    this.#control = control;
    this.#log = log;
  }

  async handle(request: Request): Promise<{ answer: object; fds?: number[] }> {
    switch (request.op) {
      case 'setup': return this.#setup(request);
      case 'open': return { answer: { ticket: this.#open(request.tokens, request.seed) } };
      case 'verify': return { answer: { difference: await this.#verify(request.tokens, request.seed, request.sourceDType) } };
      case 'accepted': return { answer: { at: await this.#accepted } };
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

  #open(tokens: number, seed: number): HandoffTicket {
    const { receiver, arena } = this.#ready();
    const { ticket, committed } = receiver.open({ tokens: [0, tokens], pages: scatteredPages(arena.layout, tokens, seed), leaseMs: LEASE_MS });
    this.#accepted = committed.then(monotonicUs);
    this.#accepted.catch(() => {});
    return ticket;
  }

  /** Compares every row with what the same values, converted here, must look like: layer by layer, through memory of our own. */
  async #verify(tokens: number, seed: number, sourceDType: KvDType): Promise<string | null> {
    const { arena } = this.#ready();
    const addon = native();
    const made = canonical({ ...arena.layout, layers: 1 }, sourceDType, arena.layout.pageTokens);
    const source = new addon.KvArena(made, pagesFor(made, tokens));
    const sourcePages = scatteredPages(made, tokens, seed + 1);
    const pages = scatteredPages(arena.layout, tokens, seed);
    let expected: KvArena | undefined;
    try {
      for (let layer = 0; layer < arena.layout.layers; layer++) {
        const target: KvLayout = { ...arena.layout, layers: 1, shared: sharedIn(arena.layout.shared, layer) };
        if (expected?.layout.shared !== target.shared) {
          expected?.close();
          expected = new addon.KvArena(target, pagesFor(target, tokens));
        }
        await addon.kvFillPattern(source, sourcePages, [0, tokens], layer, seed);
        await addon.kvPut({ src: source, dst: expected, layers: [0, 1], tokens: [0, tokens], srcPages: sourcePages, dstPages: pages });
        const difference = compareLayer(arena, layer, expected, pages, tokens);
        if (difference !== null) return difference;
      }
      return null;
    } finally {
      source.close();
      expected?.close();
    }
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

/** Where layer `layer` of the arena differs from the only layer of `expected`; null for nowhere. */
function compareLayer(arena: KvArena, layer: number, expected: KvArena, pages: Int32Array[], tokens: number): string | null {
  const { form, ranks, pageTokens } = arena.layout;
  const bytes = rowBytes(arena.layout, layer);
  for (let page = 0; page * pageTokens < tokens; page++) {
    const holders = form === 'tpla' ? Array.from({ length: ranks }, (_, rank) => rank) : [form === 'dcp' ? page % ranks : 0];
    const id = form === 'dcp' ? pages[page % ranks]![Math.floor(page / ranks)]! : pages[0]![page]!;
    const used = Math.min(pageTokens, tokens - page * pageTokens) * bytes;
    for (const rank of holders) {
      const found = arena.page(rank, layer, id).subarray(0, used);
      const wanted = expected.page(rank, 0, id).subarray(0, used);
      if (Buffer.compare(found, wanted) !== 0) return `layer ${layer}, rank ${rank}, page ${page} of the sequence`;
    }
  }
  return null;
}
