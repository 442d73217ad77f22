import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { native } from '../../src/native/loader.js';
import type { Channel, KvLayout } from '../../src/native/types.js';
import { decodeMessage, encodeMessage, type Message } from '../../src/transfer/messages.js';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import { endpoint, failure, fillCanonical, handshake, LAYERS, newArena, smallLayout, until } from '../support/handoff.js';
import { cancelInTheMiddle, landPrompt, SOURCE_PAGES, TARGET_PAGES, TOKENS, VIEWS } from '../support/handoff_exercises.js';

const directory = mkdtempSync(join(tmpdir(), 'tpla-pull-'));
test.after(() => rmSync(directory, { recursive: true }));
let sockets = 0;
const freshAddress = () => `unix:${join(directory, `${sockets++}.sock`)}`;

const grant = (change: object = {}) => ({ tokens: TOKENS, pages: [TARGET_PAGES], leaseMs: 10_000, ...change });

async function pair(change: Partial<KvLayout> = { form: 'tpla', ranks: 2, pageTokens: 32 }) {
  const source = newArena(smallLayout(), 64);
  const target = newArena(smallLayout(change), 64);
  const address = freshAddress();
  const receiver = await createHandoffReceiver(address, { ...endpoint(target), direction: 'pull' });
  const sender = createHandoffSender(endpoint(source));
  const close = async () => {
    await sender.close();
    await receiver.close();
    source.close();
    target.close();
  };
  return { source, target, address, receiver, sender, close };
}

for (const [name, change] of VIEWS) {
  test(`decode reads a prompt that prefill lends: ${name}`, async () => {
    const ends = await pair(change);
    const { commit, sentBytes } = await landPrompt(ends, change, 'shm', 10_000);
    assert.ok(sentBytes > 0);
    assert.is(commit.firstTokens[0]!.token, 42);
    assert.is(commit.bytes, sentBytes);
    await ends.close();
  });
}

test('after a cancel nothing more is read, and the next hand-off is whole', async () => {
  const ends = await pair();
  await cancelInTheMiddle(ends, 30, 10_000, (pushes, round) => assert.ok(pushes.some(({ status }) => status === 'rejected') || round % 2 === 0));
  await ends.close();
});

/** A prefill worker that says what a test wants. */
async function impostor(address: string, layout: KvLayout) {
  const heard: Message[] = [];
  let closed = false;
  const channel: Channel = await native().connectChannel(address.slice('unix:'.length), {
    onMessage: (_channel, bytes) => { heard.push(decodeMessage(bytes)); },
    onClose: () => { closed = true; },
  });
  const say = (message: Message, fds: number[] = []) => channel.send(encodeMessage(message), fds);
  const hear = async <T extends Message['type']>(type: T): Promise<Extract<Message, { type: T }>> => {
    await until(() => heard.some((message) => message.type === type), type);
    return heard.find((message) => message.type === type) as Extract<Message, { type: T }>;
  };
  say({ type: 'hello', handshake: handshake(layout) });
  const { offers } = await hear('welcome');
  return { say, hear, offers, close: () => channel.close(), isClosed: () => closed };
}

test('grants of a decode worker that pulls show none of its pages', async () => {
  const { source, address, receiver, close } = await pair();
  const { ticket } = receiver.open(grant());
  const peer = await impostor(address, source.layout);
  assert.equal(peer.offers, [{ path: 'pull', devices: [] }]);
  peer.say({ type: 'lend', path: 'shm', pages: source.pages, handles: [] }, source.fds());
  peer.say({ type: 'open', session: ticket.session, path: 'shm' });
  assert.equal((await peer.hear('granted')).pages, []);
  peer.close();
  await close();
});

test('page ids outside what was lent fail the hand-off and touch nothing', async () => {
  const { source, target, address, receiver, close } = await pair();
  for (const page of TARGET_PAGES) target.page(0, 0, page).fill(0x33);
  for (const pages of [Int32Array.of(0, 1, 2, 3, 4, 5, 64), Int32Array.of(-1, 1, 2, 3, 4, 5, 6), Int32Array.of(1)]) {
    const { ticket, committed } = receiver.open(grant());
    const peer = await impostor(address, source.layout);
    peer.say({ type: 'lend', path: 'shm', pages: source.pages, handles: [] }, source.fds());
    peer.say({ type: 'open', session: ticket.session, path: 'shm' });
    await peer.hear('granted');
    peer.say({ type: 'ready', session: ticket.session, layers: [0, LAYERS], tokens: TOKENS, pages });
    assert.is((await failure(committed)).code, 'REQUEST_INVALID');
    assert.is((await peer.hear('cancel')).code, 'REQUEST_INVALID');
    peer.close();
  }
  for (const page of TARGET_PAGES) assert.ok(target.page(0, 0, page).every((byte) => byte === 0x33));
  await close();
});

test('loans that were not asked for, come twice, or are smaller than they say are refused', async () => {
  const { source, address, receiver, close } = await pair();
  const refusals: [(peer: Awaited<ReturnType<typeof impostor>>) => void, RegExp][] = [
    [(peer) => { for (let i = 0; i < 2; i++) peer.say({ type: 'lend', path: 'shm', pages: source.pages, handles: [] }, source.fds()); }, /twice/],
    [(peer) => peer.say({ type: 'lend', path: 'shm', pages: source.pages * 2, handles: [] }, source.fds()), /bytes/],
    [(peer) => peer.say({ type: 'lend', path: 'shm', pages: source.pages, handles: [] }), /descriptor/],
    [(peer) => peer.say({ type: 'lend', path: 'cuda-ipc', pages: source.pages, handles: ['00'] }), /cuda-ipc/],
  ];
  for (const [act, message] of refusals) {
    const peer = await impostor(address, source.layout);
    act(peer);
    assert.match((await peer.hear('refused')).message, message);
    await until(() => peer.isClosed(), 'the connection to end');
  }
  assert.is(receiver.stats().open, 0);
  await close();

  const target = newArena(smallLayout(), 8);
  const pushed = freshAddress();
  const other = await createHandoffReceiver(pushed, endpoint(target));
  const peer = await impostor(pushed, target.layout);
  peer.say({ type: 'lend', path: 'shm', pages: 8, handles: [] }, target.fds());
  assert.match((await peer.hear('refused')).message, /did not offer to read/);
  await other.close();
  target.close();
});

test('a prefill worker that goes away fails its hand-offs, and what it lent is let go', async () => {
  const { source, receiver, sender, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const mappings = () => readFileSync('/proc/self/maps', 'utf8').split('\n').filter((line) => line.includes('memfd:tpla')).length;
  const fds = () => readdirSync('/proc/self/fd').length;
  const before = { mappings: mappings(), fds: fds() };
  for (let round = 0; round < 20; round++) {
    const other = createHandoffSender(endpoint(source));
    const { ticket, committed } = receiver.open(grant());
    const session = await other.open(ticket);
    const push = session.push([0, LAYERS], TOKENS, SOURCE_PAGES);
    if (round % 3 !== 0) await push;
    await other.close();
    await push.catch(() => {});
    assert.is((await failure(committed)).code, 'HANDOFF_FAILED');
  }
  await until(() => mappings() <= before.mappings && fds() <= before.fds, `what was mapped to be let go: ${mappings()} ${fds()} against ${JSON.stringify(before)}`);
  assert.equal([receiver.stats().open, receiver.stats().draining], [0, 0]);
  await sender.close();
  await close();
});

test('decode cannot pull over TCP', async () => {
  const target = newArena(smallLayout(), 8);
  const error = await failure(createHandoffReceiver('tcp://127.0.0.1:0', { ...endpoint(target), direction: 'pull' }));
  assert.is(error.code, 'CONFIG_INVALID');
  assert.match(error.message, /unix: address/);
  target.close();
});

test.run();
