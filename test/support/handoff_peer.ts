/**
 * One end of a hand-off as a process of its own, to be killed. Prints one line a step and stops at the step it is told to.
 *
 *   prefill ADDRESS STOP   reads tickets, one JSON a line, from stdin; steps: ready, opened, pushing, pushed, committing, committed
 *                          (`pushing` never commits, so that a kill comes first however fast it is; `pushing-on` goes through)
 *   decode ADDRESS LEASE   prints `ticket JSON`; then `committed` or `failed CODE`
 *
 * With a fourth argument `ucx=FILE` or `nixl=FILE` KV goes through the library at FILE, under the UCX_… and NIXL_… variables it was started with.
 */
import { createInterface } from 'node:readline';
import { systemClock } from '../../src/clock.js';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import type { HandoffTicket } from '../../src/transfer/types.js';
import { openNixl } from '../../src/transfer/nixl.js';
import { openUcx } from '../../src/transfer/ucx.js';
import { endpoint, fillCanonical, findDifference, newArena, pageRange, sampled, stats } from './handoff.js';
import { BIG, BIG_TARGET, BIG_PAGES, BIG_TOKENS } from './handoff_fault_shapes.js';

const say = (line: string) => process.stdout.write(`${line}\n`);
const forever = () => new Promise<never>(() => { setInterval(() => {}, 1000); });
const [role, address, argument, link] = process.argv.slice(2) as [string, string, string, string?];
const [library, file] = (link ?? '').split('=') as [string, string?];
const ucx = library === 'ucx' ? await openUcx({ use: 'always', library: file!, options: {} }) : null;
const nixl = library === 'nixl' ? await openNixl({ use: 'always', library: file!, backends: ['UCX'], options: {} }) : null;

if (role === 'prefill') await prefill();
else await decode();

async function prefill(): Promise<void> {
  const arena = newArena(BIG, BIG_PAGES);
  const pages = pageRange(0, BIG_PAGES);
  fillCanonical(arena, pages, BIG_TOKENS, 1);
  const sender = createHandoffSender({ ...endpoint(arena, systemClock), ucx, nixl });
  const at = async (step: string) => {
    say(step);
    if (step === argument) await forever();
  };
  await at('ready');
  for await (const line of createInterface({ input: process.stdin })) {
    try {
      const session = await sender.open(JSON.parse(line) as HandoffTicket);
      await at('opened');
      const pushes: Promise<void>[] = [];
      for (let layer = 0; layer < BIG.layers; layer++) pushes.push(session.push([layer, layer + 1], BIG_TOKENS, pages));
      if (argument.startsWith('pushing')) {
        await pushes[0];
        say('pushing');
      }
      await Promise.all(pushes);
      if (argument === 'pushing') await forever();
      await at('pushed');
      const committing = session.commit({ firstTokens: [sampled(1)], prefill: stats(BIG_TOKENS[1]) });
      await at('committing');
      await committing;
      await at('committed');
    } catch (error) {
      say(`failed ${(error as { code: string }).code} ${(error as Error).message}`);
    }
  }
  await sender.close();
}

async function decode(): Promise<void> {
  const arena = newArena(BIG_TARGET, BIG_PAGES);
  const receiver = await createHandoffReceiver(address, { ...endpoint(arena, systemClock), ucx, nixl });
  const pages = pageRange(0, BIG_PAGES / 2);
  const { ticket, committed } = receiver.open({ tokens: BIG_TOKENS, pages: [pages], leaseMs: Number(argument) });
  say(`ticket ${JSON.stringify(ticket)}`);
  committed.then(
    () => say(`committed ${findDifference(arena, pages, [0, 64], 1) ?? 'and equal'}`),
    (error: { code: string }) => say(`failed ${error.code}`));
  await forever();
}
