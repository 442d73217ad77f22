/** Both ends of zero-copy puts over loopback TCP, as a process of its own that can be loaded with late_completions.cpp. Prints `done`. */
import { native } from '../../src/native/loader.js';
import { fillCanonical, findDifference, newArena, pageRange, smallLayout } from './handoff.js';

const KEY = 'k'.repeat(32);
const layout = smallLayout({ latent: 512, rope: 64, layers: 8, pageTokens: 64 });
const tokens: [number, number] = [0, 2000];
const pages = pageRange(0, 32);
const { WriteGate, listenKvStream, connectKvStream } = native();
const source = newArena(layout, 32);
const target = newArena(layout, 32);
fillCanonical(source, pages, tokens, 1);
const receiver = listenKvStream('127.0.0.1', target);
const gate = WriteGate.create(1);
receiver.admit(KEY, gate);
const epoch = gate.open(0);
receiver.grant(KEY, 0, epoch, tokens, [pages]);
const sender = await connectKvStream({ host: '127.0.0.1', port: receiver.port, key: KEY, connections: 2, layout, zeroCopy: 'always' });
for (let round = 0; round < 4; round++) {
  await sender.put({ src: source, layers: [0, 8], tokens, srcPages: [pages], slot: 0, epoch });
}
const difference = findDifference(target, pages, tokens, 1);
process.stdout.write(`${difference ?? 'done'}\n`);
sender.close();
receiver.close();
gate.close();
