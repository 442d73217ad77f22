/** Prefill's end of a benchmark: it drives, and measures real hand-offs, so many at a time as the case says. */
import { closeSync } from 'node:fs';
import type { Logger } from 'pino';
import { monotonicUs, systemClock } from '../../clock.js';
import { TplaError } from '../../errors.js';
import { native } from '../../native/loader.js';
import type { KvArena, LinkMemory } from '../../native/types.js';
import type { Rectangle } from '../../transfer/path.js';
import { createHandoffSender } from '../../transfer/sender.js';
import type { HandoffSender, HandoffSession, PrefillStats, TransferPath } from '../../transfer/types.js';
import { openPlainCopy, type TargetMemory } from './baseline.js';
import { rectangles, targetPages, type BenchCase } from './cases.js';
import type { Control } from './control.js';
import { benchHandshake } from './handshake.js';
import type { HandoffPath, OpenLink } from './path.js';
import { handoffPath, openLink } from './paths.js';
import { patternArena } from './pattern.js';
import type { HandoffTimeline } from './timeline.js';
import { handoffRow, plainRow, type BenchRow, type HandoffRound, type HandoffSample } from './rows.js';

const SEED = 20251;
/** Pushes of one hand-off under way at a time, where it takes very many. */
const MAX_PUSHES = 64;

const LEAVES_FROM: Record<LinkMemory, string> = {
  host: 'rows leave from host memory', gpu: "rows leave from the GPU's own memory", staged: 'rows of the GPU leave through pinned memory',
};

export interface HandoffOptions {
  iterations: number;
  warmup: number;
  verify: boolean;
  requirePath: TransferPath | undefined;
  /** Told where the time of a case's hand-offs went. */
  onTimeline?: (what: BenchCase, handoffs: HandoffTimeline[]) => void;
  log: Logger;
}

/** Two rows: the plain copy, then the hand-off. Each run of one is followed by a run of the other, so that both see the same machine. */
export async function benchHandoff(control: Control, what: BenchCase, options: HandoffOptions): Promise<BenchRow[]> {
  const ends = await Ends.open(control, what, options);
  try {
    const plain = await openPlainCopy(ends.path, control, what, ends.source, ends.target);
    const plainSeconds: number[] = [];
    const rounds: HandoffRound[] = [];
    const timelines: HandoffTimeline[] = [];
    for (let i = -options.warmup; i < options.iterations; i++) {
      const seconds = await plain.run();
      if (options.onTimeline) await ends.takeTimeline();
      const { started, ...round } = await handOff(ends);
      if (options.onTimeline && i >= 0) timelines.push({ started, ...await ends.takeTimeline() });
      if (i < 0) continue;
      plainSeconds.push(seconds);
      rounds.push(round);
    }
    plain.close();
    options.onTimeline?.(what, timelines);
    if (options.verify) await ends.verify();
    const copy = plainRow(what, ends.path.baseline, plain.bytes, plainSeconds);
    return [copy, { ...handoffRow(what, rounds, copy, options.verify), ...ends.carriedBy() }];
  } finally {
    await ends.close();
  }
}

/** Both ends of a case, set up: prefill's here, decode's behind the control channel. */
export class Ends {
  readonly what: BenchCase;
  readonly path: HandoffPath;
  readonly source: KvArena;
  readonly pages: Int32Array;
  /** What each push covers. */
  readonly rectangles: Rectangle[];
  readonly target: TargetMemory;
  readonly #control: Control;
  readonly #sender: HandoffSender;
  readonly #link: OpenLink;
  #linkMemory: LinkMemory | undefined;
  #linkTransports: string[] = [];

  private constructor(control: Control, what: BenchCase, source: { arena: KvArena; pages: Int32Array }, target: TargetMemory, sender: HandoffSender, link: OpenLink) {
    this.#control = control;
    this.what = what;
    this.path = handoffPath(what.path);
    this.source = source.arena;
    this.pages = source.pages;
    this.rectangles = rectangles(what);
    this.target = target;
    this.#sender = sender;
    this.#link = link;
  }

  static async open(control: Control, what: BenchCase, { log, requirePath }: HandoffOptions): Promise<Ends> {
    const path = handoffPath(what.path);
    if (path.channel === 'unix' && !control.isSameHost) {
      throw new TplaError('USAGE', `path ${what.path} is between two processes of one host: have the other end --listen at a unix: address and --connect there, or take a path between hosts (tcp, ucx, nixl)`);
    }
    const { answer, fds } = await control.ask({ op: 'setup', path: what.path, direction: what.direction, target: what.target, pages: targetPages(what) });
    const source = await patternArena(path.source, what.source, what.tokens, SEED);
    const link = await openLink(path);
    const sender = createHandoffSender({
      handshake: benchHandshake(what.source), arena: source.arena, log, clock: systemClock, ...link.options, ...(requirePath === undefined ? {} : { requirePath }),
    });
    return new Ends(control, what, source, { ...answer, fds }, sender, link);
  }

  /** Pages reserved, credits granted. */
  async openSession(request = 0): Promise<HandoffSession> {
    const { answer: { ticket } } = await this.#control.ask({ op: 'open', request, tokens: this.what.tokens, seed: SEED });
    const session = await this.#sender.open(ticket);
    this.#linkMemory = session.linkMemory;
    this.#linkTransports = session.linkTransports?.() ?? [];
    return session;
  }

  /** When decode accepted the request's last hand-off, by this process's clock; null where that of another host says so. */
  async acceptedAt(request = 0): Promise<number | null> {
    if (!this.#control.isSameHost) return null;
    return (await this.#control.ask({ op: 'accepted', request })).answer.at;
  }

  /** Steps in both processes since the last call. */
  async takeTimeline(): Promise<Omit<HandoffTimeline, 'started'>> {
    const prefill = native().takeTimeline();
    native().keepTimeline(true);
    const { answer: { marks } } = await this.#control.ask({ op: 'timeline', keep: true });
    return { prefill, decode: marks };
  }

  /** Nothing where no library was opened for it. */
  carriedBy(): { carried_by?: string } {
    const { carrier } = this.#link;
    if (carrier === undefined) return {};
    const over = this.#linkTransports.length === 0 ? '; it does not tell over which transport' : ` over ${this.#linkTransports.join(' and ')}`;
    return { carried_by: `${carrier}; ${LEAVES_FROM[this.#linkMemory ?? 'host']}${over}` };
  }

  /** Throws CHECKSUM_MISMATCH where decode's pages do not hold what was sent. */
  async verify(): Promise<void> {
    const { tokens, source, inFlight } = this.what;
    for (let request = 0; request < inFlight; request++) {
      const { answer: { difference } } = await this.#control.ask({ op: 'verify', request, tokens, seed: SEED, sourceDType: source.dtype });
      if (difference !== null) throw new TplaError('CHECKSUM_MISMATCH', `what landed is not what was sent: ${difference}`);
    }
  }

  async close(): Promise<void> {
    await this.#sender.close();
    this.#link.close();
    this.source.close();
    this.target.fds.forEach((fd) => closeSync(fd));
  }
}

/** Requests under way together: reserve for each, then push all of each and commit, as prefill does: the commit waits for no push. */
async function handOff(ends: Ends): Promise<HandoffRound & { started: number }> {
  const opened: { session: HandoffSession; prepareUs: number }[] = [];
  for (let request = 0; request < ends.what.inFlight; request++) {
    const asked = monotonicUs();
    opened.push({ session: await ends.openSession(request), prepareUs: monotonicUs() - asked });
  }
  const started = monotonicUs();
  const ended = await Promise.all(opened.map(async ({ session, prepareUs }) => {
    const pushing = monotonicUs();
    const { posted, placed } = await pushAll(session, ends.rectangles, ends.pages);
    const [committed] = await Promise.all([session.commit(nothingComputed(ends.what)).then(monotonicUs), placed]);
    return { session, prepareUs, postUs: posted, pushing, committed };
  }));
  const samples: HandoffSample[] = [];
  for (const [request, { session, pushing, committed, prepareUs, postUs }] of ended.entries()) {
    const accepted = await ends.acceptedAt(request);
    const { bytes, wireBytes } = session.sent;
    samples.push({ path: session.path, bytes, wireBytes, prepareUs, postUs, latencyUs: committed - pushing, acceptedUs: accepted === null ? null : accepted - pushing });
  }
  return { started, samples, putUs: Math.max(...ended.map(({ session }) => session.sent.placedAt)) - started };
}

/** Resolves when all pushes are handed over, with the microseconds that this took; `placed` when prefill knows that every byte is in place. */
async function pushAll(session: HandoffSession, rectangles: Rectangle[], pages: Int32Array): Promise<{ posted: number; placed: Promise<unknown> }> {
  const underWay = new Set<Promise<void>>();
  let posted = 0;
  for (const { layers, tokens } of rectangles) {
    if (underWay.size >= MAX_PUSHES) await Promise.race(underWay);
    const at = monotonicUs();
    const push: Promise<void> = session.push(layers, tokens, pages).finally(() => underWay.delete(push));
    underWay.add(push);
    posted += monotonicUs() - at;
  }
  return { posted, placed: Promise.all(underWay) };
}

export const nothingComputed = ({ tokens }: BenchCase): { firstTokens: []; prefill: PrefillStats } => ({
  firstTokens: [], prefill: { promptTokens: tokens, pooledTokens: 0, skippedTokens: 0, computedTokens: tokens, queueMs: 0, computeMs: 0 },
});
