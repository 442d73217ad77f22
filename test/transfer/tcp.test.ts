// time limit: 400 s
import { connect as connectSocket, type Socket } from 'node:net';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { systemClock } from '../../src/clock.js';
import { native } from '../../src/native/loader.js';
import type { KvLayout, WriteGate } from '../../src/native/types.js';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import { endpoint, failure, fillCanonical, findDifference, LAYERS, newArena, pageRange, smallLayout, stats, until } from '../support/handoff.js';
import { cancelInTheMiddle, landPrompt, openFds, SOURCE_PAGES, TARGET_PAGES, threads, TOKENS, VIEWS } from '../support/handoff_exercises.js';
import { xorshift } from '../native/kv_reference.js';

const { listenKvStream, connectKvStream, kvChecksum, WriteGate } = native();
const KEY = 'k'.repeat(32);

async function pair(change: Partial<KvLayout> = { form: 'tpla', ranks: 2, pageTokens: 32 }) {
  const source = newArena(smallLayout(), 64);
  const target = newArena(smallLayout(change), 64);
  const receiver = await createHandoffReceiver('tcp://127.0.0.1:0', endpoint(target, systemClock));
  const sender = createHandoffSender(endpoint(source, systemClock));
  const close = async () => {
    await sender.close();
    await receiver.close();
    source.close();
    target.close();
  };
  return { source, target, receiver, sender, close };
}
const grant = (change: object = {}) => ({ tokens: TOKENS, pages: [TARGET_PAGES], leaseMs: 60_000, ...change });

for (const [name, change] of VIEWS) {
  test(`a prompt lands verified over TCP: ${name}`, async () => {
    const ends = await pair(change);
    const { ticket, commit } = await landPrompt(ends, change, 'tcp', 60_000);
    assert.match(ticket.address, /^tcp:\/\/127\.0\.0\.1:\d+$/);
    assert.is(commit.path, 'tcp');
    await ends.close();
  });
}

test('decode cancels in the middle: what is on the way is read past, the next hand-off on the same slot is whole', async () => {
  const ends = await pair();
  await cancelInTheMiddle(ends, 20, 60_000);
  await ends.close();
});

test('an address that nobody can dial is refused', async () => {
  const target = newArena(smallLayout(), 8);
  assert.is((await failure(createHandoffReceiver('tcp://0.0.0.0:0', endpoint(target)))).code, 'CONFIG_INVALID');
  target.close();
});

test('hand-offs over TCP leak no thread and no descriptor', async () => {
  const { source, receiver, sender, close } = await pair();
  fillCanonical(source, SOURCE_PAGES, TOKENS, 1);
  const run = async (with_: typeof sender) => {
    const { ticket, committed } = receiver.open(grant());
    const session = await with_.open(ticket);
    await session.push([0, LAYERS], TOKENS, SOURCE_PAGES);
    await session.commit({ firstTokens: [], prefill: stats(100) });
    await committed;
  };
  await run(sender);
  const before = { threads: threads(), fds: openFds() };
  for (let i = 0; i < 10; i++) {
    const other = createHandoffSender(endpoint(source, systemClock));
    await run(other);
    await other.close();
  }
  await until(() => threads() <= before.threads && openFds() <= before.fds, `threads and descriptors to end: ${threads()} ${openFds()} against ${JSON.stringify(before)}`);
  await close();
});

// ---------------------------------------------------------------- the data connections themselves

interface Stream { gate: WriteGate; epoch: number; port: number; target: ReturnType<typeof newArena>; close(): void }

function stream(tokens: [number, number] = TOKENS): Stream {
  const target = newArena(smallLayout(), 64);
  const receiver = listenKvStream('127.0.0.1', target);
  const gate = WriteGate.create(4);
  receiver.admit(KEY, gate);
  const epoch = gate.open(1);
  receiver.grant(KEY, 1, epoch, tokens, [pageRange(10, 7)]);
  return { gate, epoch, port: receiver.port, target, close: () => { receiver.close(); gate.close(); target.close(); } };
}

for (const zeroCopy of ['never', 'auto', 'always'] as const) {
  test(`large puts over several connections, zero-copy ${zeroCopy}`, async () => {
    const big = { ...smallLayout({ latent: 512, rope: 64, layers: 4, pageTokens: 64 }) };
    const source = newArena(big, 40);
    const target = newArena({ ...big, pageTokens: 128 }, 20);
    const tokens: [number, number] = [0, 2300];
    fillCanonical(source, pageRange(0, 40), tokens, 3);
    const receiver = listenKvStream('127.0.0.1', target);
    const gate = WriteGate.create(4);
    receiver.admit(KEY, gate);
    const epoch = gate.open(0);
    receiver.grant(KEY, 0, epoch, tokens, [pageRange(1, 19)]);
    const sender = await connectKvStream({ host: '127.0.0.1', port: receiver.port, key: KEY, connections: 3, layout: target.layout, zeroCopy });
    for (let round = 0; round < 3; round++) {
      const result = await sender.put({ src: source, layers: [0, 4], tokens, srcPages: [pageRange(0, 40)], slot: 0, epoch });
      assert.is(result.bytes, 4 * 2300 * 1152);
      assert.equal(result.checksums, await kvChecksum(target, [0, 4], tokens, [pageRange(1, 19)]));
    }
    assert.is(findDifference(target, pageRange(1, 19), [0, 100], 3), null);
    assert.is(findDifference(target, pageRange(1, 19), [2200, 2300], 3), null);
    if (zeroCopy === 'never') assert.not.ok(sender.zeroCopy);
    gate.revoke(0);
    assert.is((await failure(sender.put({ src: source, layers: [0, 4], tokens, srcPages: [pageRange(0, 40)], slot: 0, epoch }))).code, 'CANCELLED');
    sender.close();
    assert.is((await failure(sender.put({ src: source, layers: [0, 1], tokens, srcPages: [pageRange(0, 40)], slot: 0, epoch }))).code, 'IO_FAILED');
    receiver.close();
    gate.close();
    source.close();
    target.close();
  });
}

test('zero-copy sends whose completions come out of order never stall', async () => {
  const big = smallLayout({ latent: 512, rope: 64, layers: 12, pageTokens: 64 });
  const tokens: [number, number] = [0, 4000];
  const source = newArena(big, 64);
  const target = newArena(big, 64);
  fillCanonical(source, pageRange(0, 63), [0, 64], 1);
  const receiver = listenKvStream('127.0.0.1', target);
  const gate = WriteGate.create(4);
  receiver.admit(KEY, gate);
  const epoch = gate.open(0);
  receiver.grant(KEY, 0, epoch, tokens, [pageRange(0, 63)]);
  for (let round = 0; round < 16; round++) {
    const sender = await connectKvStream({ host: '127.0.0.1', port: receiver.port, key: KEY, connections: 4, layout: big, zeroCopy: round % 2 === 0 ? 'auto' : 'always' });
    const put = () => sender.put({ src: source, layers: [0, 12], tokens, srcPages: [pageRange(0, 63)], slot: 0, epoch });
    let isOver = false;
    const puts = Promise.all([put(), put()]).then(() => { isOver = true; });
    await until(() => isOver, `round ${round}`);
    await puts;
    sender.close();
  }
  receiver.close();
  gate.close();
  source.close();
  target.close();
});

async function raw(port: number): Promise<Socket & { ended: Promise<void> }> {
  const socket = connectSocket(port, '127.0.0.1') as Socket & { ended: Promise<void> };
  socket.on('error', () => {});
  socket.resume();
  socket.ended = new Promise((resolve) => socket.once('close', () => resolve()));
  await new Promise((resolve) => socket.once('connect', resolve));
  return socket;
}

function frame(fields: { magic?: number; slot?: number; epoch?: number; layer?: number; begin?: number; end?: number }): Buffer {
  const bytes = Buffer.alloc(32);
  bytes.writeUInt32LE(fields.magic ?? 0x32564b54, 0);
  bytes.writeUInt32LE(fields.slot ?? 1, 4);
  bytes.writeUInt32LE(fields.epoch ?? 1, 8);
  bytes.writeUInt32LE(fields.layer ?? 0, 12);
  bytes.writeUInt32LE(fields.begin ?? 0, 16);
  bytes.writeUInt32LE(fields.end ?? 16, 20);
  return bytes;
}

test('a data connection without the key, or with frames outside the grant, ends; memory stays as it was', async () => {
  const at = stream([16, 100]);
  for (let page = 0; page < 64; page++) for (let layer = 0; layer < LAYERS; layer++) at.target.page(0, layer, page).fill(0x44);
  const bad: Buffer[] = [
    Buffer.from('GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n'),
    Buffer.alloc(32, 'x'),
    Buffer.concat([Buffer.from(KEY), frame({ magic: 1 })]),
    Buffer.concat([Buffer.from(KEY), frame({ slot: 2, begin: 16, end: 32 })]),
    Buffer.concat([Buffer.from(KEY), frame({ slot: 0xffffffff, begin: 16, end: 32 })]),
    Buffer.concat([Buffer.from(KEY), frame({ begin: 0, end: 32 })]),
    Buffer.concat([Buffer.from(KEY), frame({ begin: 90, end: 101 })]),
    Buffer.concat([Buffer.from(KEY), frame({ begin: 32, end: 32 })]),
    Buffer.concat([Buffer.from(KEY), frame({ begin: 16, end: 0xffffffff })]),
    Buffer.concat([Buffer.from(KEY), frame({ begin: 0x80000000, end: 0x80000010 })]),
    Buffer.concat([Buffer.from(KEY), frame({ layer: LAYERS, begin: 16, end: 32 })]),
  ];
  for (const bytes of bad) {
    const socket = await raw(at.port);
    socket.write(Buffer.concat([bytes, Buffer.alloc(4096, 0x99)]));
    await socket.ended;
  }
  const random = xorshift(5);
  for (let round = 0; round < 200; round++) {
    const socket = await raw(at.port);
    const bytes = Buffer.concat([Buffer.from(KEY), frame({ begin: 16, end: 32, layer: random() % 8 }), Buffer.alloc(random() % 3000)]);
    // The frame's position in the layer is left alone only where it lands outside the grant.
    for (let edits = 1 + random() % 3; edits > 0; edits--) bytes[32 + random() % 12] = random() & 255;
    if (bytes.readUInt32LE(32) === 0x32564b54 && bytes.readUInt32LE(36) === 1 && bytes.readUInt32LE(40) === at.epoch) bytes[32] = 0;
    socket.write(bytes);
    socket.end();
    await socket.ended;
  }
  for (let page = 0; page < 64; page++) for (let layer = 0; layer < LAYERS; layer++) assert.ok(at.target.page(0, layer, page).every((byte) => byte === 0x44), `page ${page}`);
  at.close();
});

test('what came before a question is in place when it is answered, and a shut gate answers unasked', async () => {
  const at = stream();
  const socket = await raw(at.port);
  const answers: Buffer[] = [];
  socket.on('data', (bytes: Buffer) => answers.push(bytes));
  const heard = () => Buffer.concat(answers);
  const rows = Buffer.alloc(16 * 160, 0x55);
  const named = (put: bigint, bytes: Buffer) => {
    bytes.writeBigUInt64LE(put, 24);
    return bytes;
  };
  socket.write(Buffer.concat([Buffer.from(KEY), named(7n, frame({})), rows, named(7n, frame({ begin: 0, end: 0 }))]));
  await until(() => heard().length === 8, 'the answer');
  assert.is(heard().readBigUInt64LE(0), 7n);
  assert.is(Buffer.compare(at.target.page(0, 0, 10).subarray(0, rows.length), rows), 0);
  at.gate.revoke(1);
  socket.write(Buffer.concat([named(8n, frame({})), rows, named(8n, frame({})), rows]));
  await until(() => heard().length === 16, 'the refusal');
  assert.is(heard().readBigUInt64LE(8), 8n | 1n << 63n);
  socket.destroy();
  at.close();
});

test('a peer that stalls in the middle of a frame cannot hold the gate', async () => {
  const at = stream();
  const socket = await raw(at.port);
  socket.write(Buffer.concat([Buffer.from(KEY), frame({}), Buffer.alloc(500, 0x55)]));
  await until(() => at.target.page(0, 0, 10)[499] === 0x55, 'the first bytes');
  assert.is(at.gate.revoke(1), 0);
  at.target.page(0, 0, 10).fill(0x66);
  socket.write(Buffer.alloc(2000, 0x55));
  await new Promise((resolve) => setTimeout(resolve, 50));
  assert.ok(at.target.page(0, 0, 10).every((byte) => byte === 0x66));
  socket.destroy();
  at.close();
});

test.run();
