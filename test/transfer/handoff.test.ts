import { closeSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { connect as connectSocket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { native } from '../../src/native/loader.js';
import type { Channel, KvArena, KvLayout } from '../../src/native/types.js';
import { handshakeFingerprint } from '../../src/transfer/handshake.js';
import { decodeMessage, encodeMessage, type Message } from '../../src/transfer/messages.js';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import type { HandoffReceiver, HandoffSender } from '../../src/transfer/types.js';
import { endpoint, failure, fillCanonical, findDifference, handshake, LAYERS, newArena, pageRange, sampled, smallLayout, stats, until } from '../support/handoff.js';
import { xorshift } from '../native/kv_reference.js';

const directory = mkdtempSync(join(tmpdir(), 'tpla-handoff-'));
test.after(() => rmSync(directory, { recursive: true }));
let sockets = 0;
const freshAddress = () => `unix:${join(directory, `${sockets++}.sock`)}`;

/** Time that only a test moves. */
class ManualClock {
  #now = 1000;
  now(): number { return this.#now; }
  advance(ms: number): void { this.#now += ms; }
}

interface Pair { source: KvArena; target: KvArena; receiver: HandoffReceiver; sender: HandoffSender; clock: ManualClock; close(): Promise<void> }

async function pair(change: Partial<KvLayout> = { form: 'tpla', ranks: 2, pageTokens: 32 }, pages = 64): Promise<Pair> {
  const clock = new ManualClock();
  const source = newArena(smallLayout(), pages);
  const target = newArena(smallLayout(change), pages);
  const receiver = await createHandoffReceiver(freshAddress(), endpoint(target, clock));
  const sender = createHandoffSender(endpoint(source, clock));
  const close = async () => {
    await sender.close();
    await receiver.close();
    source.close();
    target.close();
  };
  return { source, target, receiver, sender, clock, close };
}

const TOKENS: [number, number] = [0, 100];
const SOURCE_PAGES = pageRange(3, 7);
const TARGET_PAGES = pageRange(10, 4);
const grant = (change: object = {}) => ({ tokens: TOKENS, pages: [TARGET_PAGES], leaseMs: 1000, ...change });

test('a prompt pushed layer by layer, in chunks, lands verified in the decode layout', async () => {
  const { source, target, receiver, sender, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const { ticket, committed } = receiver.open(grant());
  const session = await sender.open(ticket);
  assert.is(session.path, 'shm');
  const pushes: Promise<void>[] = [];
  for (const tokens of [[0, 40], [40, 100]] as [number, number][]) {
    for (let layer = 0; layer < LAYERS; layer++) pushes.push(session.push([layer, layer + 1], tokens, SOURCE_PAGES));
  }
  await Promise.all(pushes);
  await session.commit({ firstTokens: [sampled(42)], prefill: stats(100) });
  const commit = await committed;
  assert.is(findDifference(target, TARGET_PAGES, TOKENS, 1), null);
  assert.is(commit.path, 'shm');
  assert.is(commit.bytes, 100 * LAYERS * 2 * (32 + 16) * 2);
  assert.equal(commit.prefill, stats(100));
  assert.is(commit.firstTokens[0]!.token, 42);
  assert.not.ok(session.aborted.aborted);
  assert.equal(receiver.stats(), { open: 0, draining: 0, committed: 1, bytes: commit.bytes, failed: {} });
  await close();
});

test('only the tokens decode lacks are pushed', async () => {
  const { source, target, receiver, sender, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 2);
  const { ticket, committed } = receiver.open(grant({ tokens: [64, 100] }));
  const session = await sender.open(ticket);
  assert.is((await failure(session.push([0, LAYERS], [32, 100], SOURCE_PAGES))).code, 'REQUEST_INVALID');
  await session.push([0, LAYERS], [64, 100], SOURCE_PAGES).catch(() => assert.unreachable());
  // The refused push is remembered: a commit would lie about it.
  assert.is((await failure(session.commit({ firstTokens: [], prefill: stats(100) }))).code, 'REQUEST_INVALID');
  session.fail('gave up');
  assert.is((await failure(committed)).code, 'HANDOFF_FAILED');
  const again = receiver.open(grant({ tokens: [64, 100] }));
  const second = await sender.open(again.ticket);
  await second.push([0, LAYERS], [64, 100], SOURCE_PAGES);
  await second.commit({ firstTokens: [], prefill: stats(100) });
  await again.committed;
  assert.is(findDifference(target, TARGET_PAGES, [64, 100], 2), null);
  await close();
});

test('many sessions share one connection', async () => {
  const { source, target, receiver, sender, close } = await pair();
  const outcomes = await Promise.all(Array.from({ length: 12 }, async (_, i) => {
    const pages = pageRange(i * 4, 4);
    const from = pageRange(i * 5, 5);
    const tokens: [number, number] = [0, 70];
    fillCanonical(source, from, tokens, i);
    const { ticket, committed } = receiver.open({ tokens, pages: [pages], leaseMs: 1000 });
    const session = await sender.open(ticket);
    for (let layer = 0; layer < LAYERS; layer++) await session.push([layer, layer + 1], tokens, from);
    await session.commit({ firstTokens: [sampled(i)], prefill: stats(70) });
    return { commit: await committed, pages, tokens, i };
  }));
  for (const { commit, pages, tokens, i } of outcomes) {
    assert.is(commit.firstTokens[0]!.token, i);
    assert.is(findDifference(target, pages, tokens, i), null);
  }
  await close();
});

test('bytes that change on the way fail the hand-off as a checksum mismatch', async () => {
  const { source, target, receiver, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const peer = await rogue(receiver);
  const { ticket, committed } = receiver.open(grant());
  peer.say({ type: 'hello', handshake: handshake(source.layout) });
  peer.say({ type: 'open', session: ticket.session, path: 'shm' });
  await until(() => peer.heard.some(({ type }) => type === 'granted'), 'the grant');
  const { checksums } = await native().kvPut({ src: source, dst: target, layers: [0, LAYERS], tokens: TOKENS, srcPages: [SOURCE_PAGES], dstPages: [TARGET_PAGES] });
  // The fault: one bit.
  target.page(1, 1, TARGET_PAGES[2]!)[77]! ^= 4;
  peer.say({ type: 'pushed', session: ticket.session, layers: [0, LAYERS], tokens: TOKENS, checksums });
  const error = await failure(committed);
  assert.is(error.code, 'CHECKSUM_MISMATCH');
  assert.match(error.message, /nothing of it was used/);
  await until(() => peer.heard.some((message) => message.type === 'cancel' && message.code === 'CHECKSUM_MISMATCH'), 'the news at prefill');
  peer.channel.close();
  for (const fd of peer.fds) closeSync(fd);
  await close();
});

test('a commit that leaves something out is refused and says what', async () => {
  const { source, receiver, sender, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const { ticket, committed } = receiver.open(grant());
  const session = await sender.open(ticket);
  await session.push([0, 2], TOKENS, SOURCE_PAGES);
  await session.push([2, 3], [0, 64], SOURCE_PAGES);
  const [sent, received] = await Promise.all([failure(session.commit({ firstTokens: [], prefill: stats(100) })), failure(committed)]);
  assert.match(sent.message, /layer 2 lacks tokens \[64, 100\)/);
  assert.is(received.code, 'HANDOFF_FAILED');
  await close();
});

test('the same cells pushed twice are refused', async () => {
  const { source, receiver, sender, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const { ticket, committed } = receiver.open(grant());
  const session = await sender.open(ticket);
  await session.push([0, LAYERS], TOKENS, SOURCE_PAGES);
  await session.push([1, 2], [40, 50], SOURCE_PAGES).catch(() => {});
  assert.match((await failure(committed)).message, /came already/);
  await close();
});

test('decode cancels: prefill hears, the pages are decode\'s at once and stay untouched', async () => {
  const { source, target, receiver, sender, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const { ticket, committed, failing } = receiver.open(grant());
  const session = await sender.open(ticket);
  await session.push([0, 1], TOKENS, SOURCE_PAGES);
  receiver.cancel(ticket.session);
  assert.ok(failing.aborted);
  assert.is((await failure(committed)).code, 'CANCELLED');
  for (const page of TARGET_PAGES) for (const rank of [0, 1]) for (let layer = 0; layer < LAYERS; layer++) target.page(rank, layer, page).fill(0x11);
  // Prefill has not heard yet, or ignores it: the gate refuses.
  assert.is((await failure(session.push([1, 2], TOKENS, SOURCE_PAGES))).code, 'CANCELLED');
  await until(() => session.aborted.aborted, 'the cancel at prefill');
  for (const page of TARGET_PAGES) for (const rank of [0, 1]) for (let layer = 0; layer < LAYERS; layer++) assert.ok(target.page(rank, layer, page).every((byte) => byte === 0x11));
  receiver.cancel(ticket.session);
  receiver.cancel('no such session');
  await close();
});

test('prefill fails: decode hears why', async () => {
  const { receiver, sender, close } = await pair();
  const { ticket, committed } = receiver.open(grant());
  const session = await sender.open(ticket);
  session.fail('the engine ran out of memory');
  const error = await failure(committed);
  assert.is(error.code, 'HANDOFF_FAILED');
  assert.match(error.message, /the engine ran out of memory/);
  assert.is((await failure(session.push([0, 1], TOKENS, SOURCE_PAGES))).code, 'HANDOFF_FAILED');
  await close();
});

test('leases: nobody came, and a peer that falls silent', async () => {
  const { receiver, sender, clock, close } = await pair();
  const lonely = receiver.open(grant({ leaseMs: 200 }));
  const expired = failure(lonely.committed);
  await until(async () => { clock.advance(2); return lonely.failing.aborted; }, 'the lease to run out');
  assert.is((await expired).code, 'LEASE_EXPIRED');
  assert.match((await expired).message, /no prefill worker came/);
  assert.is((await failure(sender.open(lonely.ticket))).code, 'HANDOFF_FAILED');
  await close();
});

test('heartbeats keep a slow hand-off alive', async () => {
  const { source, receiver, sender, clock, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const { ticket, committed } = receiver.open(grant({ leaseMs: 400 }));
  const session = await sender.open(ticket);
  // Ten leases of silence from the engine, while both processes live. Time moves slower than the beats come.
  for (let i = 0; i < 40; i++) {
    clock.advance(100);
    await new Promise((resolve) => setTimeout(resolve, 105));
    assert.not.ok(session.aborted.aborted, String(session.aborted.reason));
  }
  await session.push([0, LAYERS], TOKENS, SOURCE_PAGES);
  await session.commit({ firstTokens: [], prefill: stats(100) });
  await committed;
  await close();
});

test('workers of different models refuse each other with both fingerprints', async () => {
  const { source, receiver, target, close } = await pair();
  const differences: [object, RegExp][] = [
    [{ fingerprint: 'beef' }, /model fingerprint "beef" against "f00d"/],
    [{ reparam: 'abc' }, /reparameterisation "abc" against "none"/],
    [{ name: 'other' }, /model "other" against "demo"/],
  ];
  for (const [identity, reason] of differences) {
    const mine = handshake(source.layout, identity);
    const stranger = createHandoffSender({ ...endpoint(source), handshake: mine });
    const { ticket } = receiver.open(grant());
    const error = await failure(stranger.open(ticket));
    assert.is(error.code, 'HANDSHAKE_REFUSED');
    assert.match(error.message, reason);
    assert.ok(error.message.includes(handshakeFingerprint(mine)) && error.message.includes(handshakeFingerprint(handshake(target.layout))));
    receiver.cancel(ticket.session);
    await stranger.close();
  }
  const other = newArena(smallLayout({ layers: 4 }), 8);
  const stranger = createHandoffSender(endpoint(other));
  assert.match((await failure(stranger.open(receiver.open(grant()).ticket))).message, /layers "4" against "3"/);
  await stranger.close();
  other.close();
  await close();
});

test('a session belongs to the connection that opened it, and its name cannot be guessed', async () => {
  const { source, receiver, sender, close } = await pair();
  const { ticket } = receiver.open(grant());
  const session = await sender.open(ticket);
  const thief = createHandoffSender(endpoint(source));
  assert.match((await failure(thief.open(ticket))).message, /belongs to another connection/);
  assert.match((await failure(thief.open({ ...ticket, session: 'AAAAAAAAAAAAAAAAAAAAAAAA' }))).message, /knows no such hand-off/);
  assert.ok(ticket.session.length >= 22);
  assert.not.ok(session.aborted.aborted);
  await thief.close();
  assert.not.ok(session.aborted.aborted, 'the rightful session goes on');
  await close();
});

test('decode restarts: old tickets fail, new ones connect again', async () => {
  const { source, target, receiver, sender } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const first = receiver.open(grant());
  const session = await sender.open(first.ticket);
  const lost = failure(first.committed);
  await receiver.close();
  assert.is((await lost).code, 'HANDOFF_FAILED');
  await until(() => session.aborted.aborted, 'the end of the old decode');
  // Decode's word that the session is over may come well before the end of its socket: until then the old connection is asked, and fails with it.
  await until(async () => /cannot be reached/.test((await failure(sender.open(first.ticket))).message), 'the old address to be tried anew');
  const restarted = await createHandoffReceiver(receiver.address, endpoint(target));
  assert.is((await failure(sender.open(first.ticket))).code, 'HANDOFF_FAILED');
  const { ticket, committed } = restarted.open(grant());
  const again = await sender.open(ticket);
  await again.push([0, LAYERS], TOKENS, SOURCE_PAGES);
  await again.commit({ firstTokens: [], prefill: stats(100) });
  await committed;
  assert.is(findDifference(target, TARGET_PAGES, TOKENS, 1), null);
  await sender.close();
  await restarted.close();
  source.close();
  target.close();
});

test('an address in use is refused, a leftover socket is replaced', async () => {
  const { target, receiver, close } = await pair();
  assert.is((await failure(createHandoffReceiver(receiver.address, endpoint(target)))).code, 'ADDRESS_IN_USE');
  const path = join(directory, 'file');
  writeFileSync(path, '');
  assert.is((await failure(createHandoffReceiver(`unix:${path}`, endpoint(target)))).code, 'ADDRESS_IN_USE');
  await close();
});

// ---------------------------------------------------------------- hostile peers

/** A peer that speaks messages but keeps no rules. */
async function rogue(receiver: HandoffReceiver): Promise<{ channel: Channel; heard: Message[]; closed: string[]; say(message: Message): void; fds: number[] }> {
  const heard: Message[] = [];
  const closed: string[] = [];
  const received: number[] = [];
  const channel = await native().connectChannel(receiver.address.slice('unix:'.length), {
    onMessage: (_channel, bytes, fds) => { heard.push(decodeMessage(bytes)); received.push(...fds); },
    onClose: (_channel, reason) => { closed.push(reason); },
  });
  return { channel, heard, closed, say: (message) => channel.send(encodeMessage(message)), fds: received };
}

/** One whose session is granted. */
async function grantedRogue(receiver: HandoffReceiver, source: KvArena) {
  const peer = await rogue(receiver);
  const { ticket, committed } = receiver.open(grant());
  peer.say({ type: 'hello', handshake: handshake(source.layout) });
  peer.say({ type: 'open', session: ticket.session, path: 'shm' });
  await until(() => peer.heard.some(({ type }) => type === 'granted'), 'the grant');
  const end = async () => {
    peer.channel.close();
    await until(() => peer.closed.length > 0, 'the close');
    for (const fd of peer.fds) closeSync(fd);
  };
  return { peer, ticket, committed, end };
}

test('a peer that breaks the protocol loses its connection and its sessions, nobody else\'s', async () => {
  const { source, target, receiver, sender, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const honest = receiver.open(grant());
  const session = await sender.open(honest.ticket);
  const hello: Message = { type: 'hello', handshake: handshake(source.layout) };
  const attacks: [string, (peer: Awaited<ReturnType<typeof rogue>>, id: string) => void, RegExp][] = [
    ['a push before hello', (peer) => peer.say({ type: 'alive' }), /came before hello/],
    ['garbage', (peer) => peer.channel.send(new Uint8Array([9, 9, 9, 9, 9])), /malformed/],
    ['decode\'s own messages', (peer) => { peer.say(hello); peer.say({ type: 'committed', session: 'x' }); }, /not for decode/],
    ['a path that was not offered', (peer, id) => { peer.say(hello); peer.say({ type: 'open', session: id, path: 'tcp' }); }, /not offered/],
    ['descriptors', (peer) => peer.channel.send(encodeMessage(hello), [0, 1]), /descriptors/],
  ];
  for (const [name, attack, reason] of attacks) {
    const peer = await rogue(receiver);
    const victim = receiver.open(grant({ pages: [pageRange(30, 4)] }));
    attack(peer, victim.ticket.session);
    await until(() => peer.closed.length > 0, `the end of ${name}`);
    const refusal = peer.heard.at(-1)!;
    assert.ok(refusal.type === 'refused' && reason.test(refusal.message), `${name}: ${JSON.stringify(refusal)}`);
    for (const fd of peer.fds) closeSync(fd);
    receiver.cancel(victim.ticket.session);
    await failure(victim.committed);
  }
  // Messages about a session that is not this connection's do nothing.
  const meddler = await rogue(receiver);
  meddler.say(hello);
  meddler.say({ type: 'fail', session: honest.ticket.session, reason: 'mischief' });
  meddler.say({ type: 'pushed', session: honest.ticket.session, layers: [0, LAYERS], tokens: TOKENS, checksums: new BigUint64Array(8) });
  meddler.say({ type: 'commit', session: honest.ticket.session, pushes: 1, sinceMs: 0, firstTokens: [], prefill: stats(1) });
  await until(() => meddler.heard.some(({ type }) => type === 'welcome'), 'the welcome');
  await session.push([0, LAYERS], TOKENS, SOURCE_PAGES);
  await session.commit({ firstTokens: [], prefill: stats(100) });
  await honest.committed;
  assert.is(findDifference(target, TARGET_PAGES, TOKENS, 1), null);
  meddler.channel.close();
  for (const fd of meddler.fds) closeSync(fd);
  await close();
});

test('pushes out of range, and checksums that do not fit, fail the session without touching memory', async () => {
  const { source, target, receiver, close } = await pair();
  const bad: [Partial<Extract<Message, { type: 'pushed' }>>, string, RegExp][] = [
    [{ layers: [0, 4] }, 'PROTOCOL', /outside the grant/],
    [{ tokens: [0, 101] }, 'PROTOCOL', /outside the grant/],
    [{ checksums: new BigUint64Array(3) }, 'CHECKSUM_MISMATCH', /3 checksums for 8 pages/],
    [{}, 'CHECKSUM_MISMATCH', /nothing of it was used/],
  ];
  for (const page of TARGET_PAGES) target.page(0, 0, page).fill(0x22);
  for (const [change, code, reason] of bad) {
    const { peer, ticket, committed, end } = await grantedRogue(receiver, source);
    peer.say({ type: 'pushed', session: ticket.session, layers: [0, LAYERS], tokens: TOKENS, checksums: new BigUint64Array(8), ...change });
    const error = await failure(committed);
    assert.is(error.code, code);
    assert.match(error.message, reason);
    await end();
  }
  for (const page of TARGET_PAGES) assert.ok(target.page(0, 0, page).every((byte) => byte === 0x22));
  await close();
});

test('a commit goes ahead of its pushes, and holds them to their number', async () => {
  const { source, target, receiver, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const whole = { layers: [0, LAYERS] as [number, number], tokens: TOKENS };
  const first = { layers: [0, 1] as [number, number], tokens: TOKENS };
  const cases: [number, { layers: [number, number]; tokens: [number, number] }[], string | null, RegExp][] = [
    [1, [whole], null, /./],
    [1, [first], 'HANDOFF_FAILED', /committed although layer 1 lacks tokens \[0, 100\)/],
    [1, [first, { layers: [1, LAYERS], tokens: TOKENS }], 'HANDOFF_FAILED', /committed although layer 1 lacks/],
    [0, [whole], 'HANDOFF_FAILED', /committed although layer 0 lacks/],
  ];
  for (const [pushes, rectangles, code, reason] of cases) {
    const { peer, ticket, committed, end } = await grantedRogue(receiver, source);
    peer.say({ type: 'commit', session: ticket.session, pushes, sinceMs: 0.5, firstTokens: [], prefill: stats(100) });
    for (const rectangle of rectangles) {
      const { checksums } = await native().kvPut({ src: source, dst: target, ...rectangle, srcPages: [SOURCE_PAGES], dstPages: [TARGET_PAGES] });
      peer.say({ type: 'pushed', session: ticket.session, ...rectangle, checksums });
    }
    if (code === null) {
      assert.ok((await committed).transferMs >= 0.5);
      await until(() => peer.heard.some(({ type }) => type === 'committed'), 'the word back');
    } else {
      const error = await failure(committed);
      assert.is(error.code, code);
      assert.match(error.message, reason);
    }
    await end();
  }
  await close();
});

test('random bytes on the socket disturb nothing', async () => {
  const { source, target, receiver, sender, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const random = xorshift(99);
  const samples: Message[] = [
    { type: 'hello', handshake: handshake(source.layout) }, { type: 'open', session: 'x', path: 'shm' },
    { type: 'pushed', session: 'x', layers: [0, 1], tokens: [0, 1], checksums: new BigUint64Array(1) }, { type: 'alive' },
  ];
  for (let round = 0; round < 150; round++) {
    const socket = connectSocket(receiver.address.slice('unix:'.length));
    socket.on('error', () => {});
    for (let count = random() % 5; count >= 0; count--) {
      const payload = Buffer.from(encodeMessage(samples[random() % samples.length]!));
      for (let edits = random() % 4; edits > 0; edits--) payload[random() % payload.length] = random() & 255;
      const header = Buffer.alloc(8);
      header.writeUInt32LE(random() % 10 === 0 ? random() : payload.length, 0);
      header.writeUInt32LE(random() % 10 === 0 ? random() % 70 : 0, 4);
      socket.write(Buffer.concat([header, payload]));
    }
    if (random() % 2 === 0) socket.end();
    else setTimeout(() => socket.destroy(), 2);
  }
  const { ticket, committed } = receiver.open(grant());
  const session = await sender.open(ticket);
  await session.push([0, LAYERS], TOKENS, SOURCE_PAGES);
  await session.commit({ firstTokens: [], prefill: stats(100) });
  await committed;
  assert.is(findDifference(target, TARGET_PAGES, TOKENS, 1), null);
  await close();
});

test.run();
