/** What every path of a hand-off has to do, for the tests of each: small arenas, prompts of 100 tokens. Assertions of one path stay in its test. */
import { readdirSync, readFileSync } from 'node:fs';
import * as assert from 'uvu/assert';
import type { KvArena, KvLayout } from '../../src/native/types.js';
import type { HandoffCommit, HandoffReceiver, HandoffSender, HandoffTicket } from '../../src/transfer/types.js';
import { failure, fillCanonical, findDifference, LAYERS, pageRange, sampled, stats } from './handoff.js';

export const TOKENS: [number, number] = [0, 100];
export const SOURCE_PAGES = pageRange(3, 7);
export const TARGET_PAGES = pageRange(10, 4);

export const threads = () => Number(/^Threads:\s+(\d+)/m.exec(readFileSync('/proc/self/status', 'utf8'))![1]);
export const openFds = () => readdirSync('/proc/self/fd').length;

export interface Ends {
  source: KvArena;
  target: KvArena;
  receiver: HandoffReceiver;
  sender: HandoffSender;
}

/** Decode layouts that a prompt lands in. */
export const VIEWS: [string, Partial<KvLayout>][] = [
  ['tpla', { form: 'tpla', ranks: 2, pageTokens: 32 }],
  ['tpla, a width for every layer', { form: 'tpla', ranks: 2, pageTokens: 32, shared: [16, 64, 0] }],
  ['mla', {}],
  ['fp8', { dtype: 'fp8', pageTokens: 32 }],
  ['dcp', { form: 'dcp', ranks: 2, pageTokens: 32 }],
];

/** A prompt in two chunks, pushed layer by layer. Checks path, commit and, in bf16 views that are easily predicted, contents. */
export async function landPrompt({ source, target, receiver, sender }: Ends, change: Partial<KvLayout>, path: string, leaseMs: number):
    Promise<{ ticket: HandoffTicket; commit: HandoffCommit; sentBytes: number }> {
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const pages = change.form === 'dcp' ? [pageRange(0, 2), pageRange(5, 2)] : [change.pageTokens ? TARGET_PAGES : pageRange(10, 7)];
  const { ticket, committed } = receiver.open({ tokens: TOKENS, pages, leaseMs });
  const session = await sender.open(ticket);
  assert.is(session.path, path);
  const pushes: Promise<void>[] = [];
  for (const tokens of [[0, 41], [41, 100]] as [number, number][]) {
    for (let layer = 0; layer < LAYERS; layer++) pushes.push(session.push([layer, layer + 1], tokens, SOURCE_PAGES));
  }
  await Promise.all(pushes);
  const sentBytes = session.sent.bytes;
  await session.commit({ firstTokens: [sampled(42)], prefill: stats(100) });
  const commit = await committed;
  if (change.form === 'tpla' || Object.keys(change).length === 0) assert.is(findDifference(target, pages[0]!, TOKENS, 1), null);
  return { ticket, commit, sentBytes };
}

/**
 * Decode cancels hand-offs under way, half of them before any byte can be: nothing is written after `receiver.cancel`, and the next
 * hand-off is whole. `ended` gets how each round's pushes ended.
 */
export async function cancelInTheMiddle({ source, target, receiver, sender }: Ends, rounds: number, leaseMs: number,
    ended: (pushes: PromiseSettledResult<void>[], round: number) => void = () => {}): Promise<void> {
  const grant = { tokens: TOKENS, pages: [TARGET_PAGES], leaseMs };
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  for (let round = 0; round < rounds; round++) {
    const { ticket, committed } = receiver.open(grant);
    const session = await sender.open(ticket);
    const pushes = Array.from({ length: LAYERS }, (_, layer) => session.push([layer, layer + 1], TOKENS, SOURCE_PAGES));
    if (round % 2 === 0) await new Promise((resolve) => setImmediate(resolve));
    receiver.cancel(ticket.session);
    assert.is((await failure(committed)).code, 'CANCELLED');
    for (const page of TARGET_PAGES) for (const rank of [0, 1]) target.page(rank, 0, page).fill(0x33);
    ended(await Promise.allSettled(pushes), round);
    for (const page of TARGET_PAGES) for (const rank of [0, 1]) assert.ok(target.page(rank, 0, page).every((byte) => byte === 0x33), 'a late write');
  }
  const { ticket, committed } = receiver.open(grant);
  const session = await sender.open(ticket);
  await session.push([0, LAYERS], TOKENS, SOURCE_PAGES);
  await session.commit({ firstTokens: [], prefill: stats(100) });
  await committed;
  assert.is(findDifference(target, TARGET_PAGES, TOKENS, 1), null);
}
