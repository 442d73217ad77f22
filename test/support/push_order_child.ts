/** Both ends of two hand-offs in a process of their own, the second in three pushes behind the first. Prints when puts ended and decode heard of it. */
import { systemClock } from '../../src/clock.js';
import { native } from '../../src/native/loader.js';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import { endpoint, newArena, pageRange, smallLayout, stats } from './handoff.js';

const LAYERS = 30;
const TOKENS: [number, number] = [0, 2000];
const layout = smallLayout({ latent: 512, rope: 64, layers: LAYERS, pageTokens: 64 });
const pages = [pageRange(0, 32), pageRange(32, 32)];
const source = newArena(layout, 64);
const target = newArena(layout, 64);
const receiver = await createHandoffReceiver(process.argv[2]!, endpoint(target, systemClock));
const sender = createHandoffSender(endpoint(source, systemClock));
const handoffs = pages.map((own) => receiver.open({ tokens: TOKENS, pages: [own], leaseMs: 30_000 }));
const [first, second] = await Promise.all(handoffs.map(({ ticket }) => sender.open(ticket)));

native().keepTimeline(true);
// The first keeps the thread that puts busy until the others have been asked for.
void first!.push([0, LAYERS], TOKENS, pages[0]!);
for (let layer = 0; layer < LAYERS; layer += 10) void second!.push([layer, layer + 10], TOKENS, pages[1]!);
const result = { firstTokens: [], prefill: stats(2000) };
await Promise.all([first!.commit(result), second!.commit(result)]);
await Promise.all(handoffs.map(({ committed }) => committed));
for (const { step } of native().takeTimeline()) if (['put in place', 'pushed received'].includes(step)) process.stdout.write(`${step}\n`);
await sender.close();
await receiver.close();
