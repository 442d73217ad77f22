/**
 * Who takes part in the next decode step. Sequences are served in order of priority; one that needs a page when there is none takes it from
 * the least important one (preemption), or waits where that is not possible without losing work.
 */
import { isSafe, type PageClaim } from '../../kv/page_claims.js';
import type { PageCopy } from '../../kv/page_table.js';
import type { PageSpace } from '../../kv/page_space.js';
import type { Choice } from './choice.js';
import { comparePriority, type Job } from './job.js';

/**
 * - preempt: a sequence can be parked in the pool, so pages are given out as long as there are any
 * - avoid: nothing can be parked; a page is granted only if all live sequences can still end in some order
 */
export type PagePolicy = 'preempt' | 'avoid';

export interface BatchInput {
  space: PageSpace;
  policy: PagePolicy;
  running: readonly Choice[];
  /** Preempted, their pages come back soon. */
  leaving: readonly Choice[];
  /** Requests whose pages are granted to a prefill worker. */
  landing: readonly Job[];
  /** Rows of one step. */
  maxBatch: number;
}

export interface BatchRow {
  choice: Choice;
  /** Tokens fed to this choice in this step; more than one only while it catches up. */
  count: number;
}

export interface Batch {
  rows: BatchRow[];
  /** To be parked. */
  victims: Choice[];
  /** Pages to copy before the step. */
  copies: PageCopy[];
}

export function planBatch(input: BatchInput): Batch {
  const { space, policy } = input;
  const order = [...input.running].sort((a, b) => comparePriority(a.job, b.job) || a.index - b.index);
  const victims = new Set<Choice>();
  const ready: Choice[] = [];
  const copies: PageCopy[] = [];
  const stalled: Choice[] = [];
  for (const choice of order) {
    if (victims.has(choice)) continue;
    const lane = neededLane(choice);
    if (lane === null) {
      ready.push(choice);
      continue;
    }
    const granted = space.lanes[lane]!.available > 0 && (policy === 'preempt' || staysSafe(input, choice, lane));
    if (granted) {
      const copy = takePage(choice);
      if (copy) copies.push(copy);
      ready.push(choice);
    } else if (policy === 'preempt') {
      if (comesBack([...input.leaving, ...victims], lane)) continue;
      const victim = chooseVictim(order, choice, victims, lane);
      if (victim) victims.add(victim);
    } else stalled.push(choice);
  }
  // Pages that were given out while there was a pool need not be safe now that it is gone; somebody has to yield.
  if (ready.length === 0 && stalled.length > 0 && input.leaving.length === 0 && input.landing.length === 0) victims.add(stalled.at(-1)!);
  return { rows: fillRows(ready, input.maxBatch), victims: [...victims], copies };
}

/** One token each, then as many of the tokens that are to be caught up as the step has room for. */
function fillRows(ready: Choice[], maxBatch: number): BatchRow[] {
  const rows = ready.slice(0, maxBatch).map((choice) => ({ choice, count: 1 }));
  let room = maxBatch - rows.length;
  for (const row of rows) {
    const extra = Math.min(room, row.choice.pending - 1);
    row.count += extra;
    room -= extra;
  }
  return rows;
}

/** The lane in which this choice needs a page before it can write its next token, or null. */
function neededLane({ table, computed }: Choice): number | null {
  const index = Math.floor(computed / table.space.pageTokens);
  if (index < table.length && !table.isShared(index)) return null;
  return table.space.laneOf(index, table.home);
}

function takePage({ table, computed }: Choice): PageCopy | null {
  const index = Math.floor(computed / table.space.pageTokens);
  if (index < table.length) return table.unshare(index);
  table.append();
  return null;
}

function comesBack(leaving: Iterable<Choice>, lane: number): boolean {
  for (const { table } of leaving) if (table.exclusive()[lane]! > 0) return true;
  return false;
}

/** The least important sequence below `choice` that has a page in this lane; without one, `choice` itself. */
function chooseVictim(order: readonly Choice[], choice: Choice, victims: ReadonlySet<Choice>, lane: number): Choice {
  for (let i = order.length - 1; order[i] !== choice; i--) {
    const candidate = order[i]!;
    if (!victims.has(candidate) && candidate.table.exclusive()[lane]! > 0) return candidate;
  }
  return choice;
}

function staysSafe({ space, running, leaving, landing }: BatchInput, choice: Choice, lane: number): boolean {
  const available = space.available;
  available[lane]!--;
  const claims = [...running, ...leaving].map(choiceClaim);
  const own = claims[running.indexOf(choice)]!;
  own.held[lane]!++;
  own.need[lane] = Math.max(0, own.need[lane]! - 1);
  return isSafe(available, [...claims, ...landing.flatMap(landingClaims)]);
}

/** What a sequence holds alone, and may still need to reach its greatest length. */
export function choiceClaim({ table, maxLength, computed }: Choice): PageClaim {
  const { space, home } = table;
  const need = space.spread(table.length, Math.max(table.length, space.pagesFor(maxLength)), home);
  const next = Math.floor(computed / space.pageTokens);
  if (next < table.length && table.isShared(next)) need[space.laneOf(next, home)]!++;
  return { held: table.exclusive(), need };
}

/** The claims its choices will make: the first takes the prompt's pages over, the others share all but the last partial one. */
export function landingClaims({ table, request, maxLength }: Job): PageClaim[] {
  const { space, home } = table!;
  const last = space.pagesFor(maxLength);
  const full = Math.floor(request.tokens.length / space.pageTokens);
  const nothing = new Array<number>(space.lanes.length).fill(0);
  return Array.from({ length: request.n }, (_, index) => ({
    held: request.n === 1 ? table!.exclusive() : nothing,
    need: space.spread(index === 0 ? table!.length : full, last, home),
  }));
}
