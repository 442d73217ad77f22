/** Prefill's end of a benchmark: it drives, and measures real hand-offs one at a time. */
import { closeSync } from 'node:fs';
import type { Logger } from 'pino';
import { systemClock } from '../../clock.js';
import { TplaError } from '../../errors.js';
import { native } from '../../native/loader.js';
import type { KvArena } from '../../native/types.js';
import { createHandoffSender } from '../../transfer/sender.js';
import type { HandoffSender, HandoffSession, PrefillStats, TransferPath } from '../../transfer/types.js';
import { openPlainCopy } from './baseline.js';
import { pagesFor, rectangles, scatteredPages, type BenchCase } from './cases.js';
import type { Control } from './control.js';
import { benchHandshake } from './handshake.js';
import { handoffPath, newArena, openLink, type HandoffPath } from './paths.js';
import { handoffRow, plainRow, type BenchRow, type HandoffSample } from './rows.js';

const SEED = 20251;
/** Pushes of one hand-off under way at a time, where it takes very many. */
const MAX_PUSHES = 64;

export interface HandoffOptions {
  iterations: number;
  warmup: number;
  verify: boolean;
  requirePath: TransferPath | undefined;
  log: Logger;
}

/** Two rows: the plain copy, then the hand-off. Each run of one is followed by a run of the other, so that both see the same machine. */
export async function benchHandoff(control: Control, what: BenchCase, options: HandoffOptions): Promise<BenchRow[]> {
  const path = handoffPath(what.path);
  const { answer, fds } = await control.ask({ op: 'setup', path: what.path, target: what.target, pages: pagesFor(what.target, what.tokens) });
  const source = await newSource(path, what);
  const link = await openLink(path);
  const sender = createHandoffSender({
    handshake: benchHandshake(what.source), arena: source.arena, log: options.log, clock: systemClock, ...link.options,
    ...(options.requirePath === undefined ? {} : { requirePath: options.requirePath }),
  });
  try {
    const plain = await openPlainCopy(path, control, what, source.arena, { ...answer, fds });
    const plainSeconds: number[] = [];
    const samples: HandoffSample[] = [];
    for (let i = -options.warmup; i < options.iterations; i++) {
      const seconds = await plain.run();
      const sample = await handOff(control, sender, what, source.pages);
      if (i < 0) continue;
      plainSeconds.push(seconds);
      samples.push(sample);
    }
    plain.close();
    if (options.verify) await verify(control, what);
    const copy = plainRow(what, path.baseline, plain.bytes, plainSeconds);
    return [copy, handoffRow(what, samples, copy, options.verify)];
  } finally {
    await sender.close();
    link.close();
    source.arena.close();
    fds.forEach((fd) => closeSync(fd));
  }
}

/** One request: reserve, push all of it, commit. */
async function handOff(control: Control, sender: HandoffSender, what: BenchCase, pages: Int32Array): Promise<HandoffSample> {
  const asked = performance.now();
  const { answer: { ticket } } = await control.ask({ op: 'open', tokens: what.tokens, seed: SEED });
  const session = await sender.open(ticket);
  const started = performance.now();
  const posted = await pushAll(session, what, pages);
  const put = performance.now();
  await session.commit({ firstTokens: [], prefill: noStats(what.tokens) });
  const committed = performance.now();
  return {
    path: session.path, ...session.sent,
    prepareUs: (started - asked) * 1e3, postUs: posted * 1e3, putUs: (put - started) * 1e3, latencyUs: (committed - started) * 1e3,
  };
}

/** Resolves when every byte is in place, with the milliseconds that handing over the pushes took. */
async function pushAll(session: HandoffSession, what: BenchCase, pages: Int32Array): Promise<number> {
  const underWay = new Set<Promise<void>>();
  let posted = 0;
  for (const { layers, tokens } of rectangles(what)) {
    if (underWay.size >= MAX_PUSHES) await Promise.race(underWay);
    const at = performance.now();
    const push: Promise<void> = session.push(layers, tokens, pages).finally(() => underWay.delete(push));
    underWay.add(push);
    posted += performance.now() - at;
  }
  await Promise.all(underWay);
  return posted;
}

const noStats = (tokens: number): PrefillStats => ({ promptTokens: tokens, pooledTokens: 0, skippedTokens: 0, computedTokens: tokens, queueMs: 0, computeMs: 0 });

async function verify(control: Control, { tokens, source }: BenchCase): Promise<void> {
  const { answer: { difference } } = await control.ask({ op: 'verify', tokens, seed: SEED, sourceDType: source.dtype });
  if (difference !== null) throw new TplaError('CHECKSUM_MISMATCH', `what landed is not what was sent: ${difference}`);
}

/** Prefill's canonical KV: made in host memory, and copied where it is to lie. */
async function newSource(path: HandoffPath, { source, tokens }: BenchCase): Promise<{ arena: KvArena; pages: Int32Array }> {
  const addon = native();
  const pages = scatteredPages(source, tokens, SEED + 1);
  const host = new addon.KvArena(source, pagesFor(source, tokens));
  await addon.kvFillPattern(host, pages, [0, tokens], 0, SEED);
  if (path.source.kind === 'host') return { arena: host, pages: pages[0]! };
  const arena = newArena(path.source, source, host.pages);
  const pinned = addon.pinKvRegion(host, 0);
  await addon.kvPut({ src: pinned, dst: arena, layers: [0, source.layers], tokens: [0, tokens], srcPages: pages, dstPages: pages });
  pinned.close();
  host.close();
  return { arena, pages: pages[0]! };
}
