import { spawn, type ChildProcess } from 'node:child_process';
import { closeSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { connect as connectSocket, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { native } from '../../src/native/loader.js';
import type { Channel, ChannelServer } from '../../src/native/types.js';

const directory = mkdtempSync(join(tmpdir(), 'tpla-channel-'));
const { listenChannel, connectChannel, SharedMemory } = native();
test.after(() => rmSync(directory, { recursive: true }));

let sockets = 0;
const freshPath = () => join(directory, `${sockets++}.sock`);

/** Everything one end hears, and a way to wait for it. */
class Ear {
  readonly messages: { channel: Channel; message: Uint8Array; fds: number[] }[] = [];
  readonly closed: { channel: Channel; reason: string }[] = [];
  readonly accepted: Channel[] = [];
  readonly #waiting = new Set<() => void>();

  onMessage = (channel: Channel, message: Uint8Array, fds: number[]) => { this.messages.push({ channel, message, fds }); this.#wake(); };
  onClose = (channel: Channel, reason: string) => { this.closed.push({ channel, reason }); this.#wake(); };
  onConnection = (channel: Channel) => { this.accepted.push(channel); this.#wake(); };

  async until(condition: () => boolean, what: string): Promise<void> {
    const deadline = performance.now() + 20_000;
    while (!condition()) {
      if (performance.now() > deadline) throw new Error(`still waiting for ${what}`);
      await new Promise<void>((resolve) => {
        const wake = () => { clearTimeout(timer); this.#waiting.delete(wake); resolve(); };
        const timer = setTimeout(wake, 200);
        this.#waiting.add(wake);
      });
    }
  }

  #wake() { for (const wake of [...this.#waiting]) wake(); }
}

async function pair(address: string | { host: string; port: number } = freshPath()): Promise<{ server: ChannelServer; here: Ear; there: Ear; a: Channel; b: Channel }> {
  const here = new Ear();
  const there = new Ear();
  const server = listenChannel(address, there.onConnection, there);
  const a = await connectChannel(typeof address === 'string' ? address : { ...address, port: server.port }, here);
  await there.until(() => there.accepted.length === 1, 'the connection');
  return { server, here, there, a, b: there.accepted[0]! };
}

const pattern = (bytes: number, seed: number) => Uint8Array.from({ length: bytes }, (_, i) => (i * 31 + seed * 17 + (i >> 8)) & 0xff);
const openFds = () => readdirSync('/proc/self/fd').length;

for (const address of ['unix', 'tcp'] as const) {
  test(`${address}: messages of any size arrive whole and in order, both ways`, async () => {
    const { server, here, there, a, b } = await pair(address === 'unix' ? freshPath() : { host: '127.0.0.1', port: 0 });
    const sizes = [0, 1, 7, 65536, 3, 1 << 20, 16 << 20, 0, 12];
    sizes.forEach((bytes, i) => a.send(pattern(bytes, i)));
    sizes.forEach((bytes, i) => b.send(pattern(bytes, i + 50)));
    await there.until(() => there.messages.length === sizes.length, 'messages at the server');
    await here.until(() => here.messages.length === sizes.length, 'messages at the client');
    sizes.forEach((bytes, i) => {
      assert.is(Buffer.compare(there.messages[i]!.message, pattern(bytes, i)), 0, `message ${i} at the server`);
      assert.is(Buffer.compare(here.messages[i]!.message, pattern(bytes, i + 50)), 0, `message ${i} at the client`);
      assert.is(there.messages[i]!.channel, b);
    });
    a.close();
    await there.until(() => there.closed.length === 1, 'the close');
    await here.until(() => here.closed.length === 1, 'the own close');
    assert.is(there.closed[0]!.reason, 'the peer closed the connection');
    assert.is(here.closed[0]!.reason, 'closed');
    assert.throws(() => a.send(new Uint8Array(1)), (error: { code: string }) => error.code === 'IO_FAILED');
    server.close();
  });
}

test('what was queued before close() still arrives', async () => {
  const { server, there, a } = await pair();
  for (let i = 0; i < 3; i++) a.send(pattern(10 << 20, i));
  a.close();
  await there.until(() => there.closed.length === 1, 'the close');
  assert.equal(there.messages.map(({ message }) => message.length), [10 << 20, 10 << 20, 10 << 20]);
  server.close();
});

test('descriptors travel with their own message, and the memory behind them is shared', async () => {
  const { server, there, a } = await pair();
  const before = openFds();
  const memories = [1, 2, 3].map((i) => SharedMemory.create(4096 * i, `test-${i}`));
  a.send(pattern(5, 0));
  a.send(pattern(6, 1), [memories[0]!.fd]);
  a.send(pattern(100_000, 2), [memories[1]!.fd, memories[2]!.fd]);
  a.send(pattern(7, 3));
  await there.until(() => there.messages.length === 4, 'messages');
  assert.equal(there.messages.map(({ fds }) => fds.length), [0, 1, 2, 0]);
  const fds = there.messages.flatMap(({ fds }) => fds);
  const mapped = fds.map((fd, i) => SharedMemory.map(fd, 4096 * (i + 1)));
  fds.forEach((fd) => closeSync(fd));
  new Uint8Array(memories[2]!.buffer)[12_287] = 77;
  new Uint8Array(mapped[0]!.buffer)[0] = 78;
  assert.is(new Uint8Array(mapped[2]!.buffer)[12_287], 77);
  assert.is(new Uint8Array(memories[0]!.buffer)[0], 78);
  const view = mapped[0]!.buffer;
  [...memories, ...mapped].forEach((memory) => memory.close());
  assert.is(view.byteLength, 0, 'close() detaches the view');
  assert.is(openFds(), before);
  assert.not.match(readFileSync('/proc/self/maps', 'utf8'), /memfd:test-/);
  a.close();
  server.close();
});

test('a mapping that could shrink or is too short is refused', () => {
  const memory = SharedMemory.create(4096, 'short');
  assert.throws(() => SharedMemory.map(memory.fd, 8192), (error: { code: string }) => error.code === 'PROTOCOL');
  assert.throws(() => SharedMemory.map(0, 1), (error: { code: string }) => error.code === 'PROTOCOL');
  assert.throws(() => SharedMemory.create(0, 'none'), (error: { code: string }) => error.code === 'REQUEST_INVALID');
  assert.throws(() => SharedMemory.create(1.5, 'part'), (error: { code: string }) => error.code === 'REQUEST_INVALID');
  memory.close();
});

test('the peer is named by the kernel', async () => {
  const { server, a, b } = await pair();
  assert.equal(a.peer, { pid: process.pid, uid: process.getuid!() });
  assert.equal(b.peer, { pid: process.pid, uid: process.getuid!() });
  a.close();
  server.close();
});

test('a connect that nobody answers and a taken path are coded errors', async () => {
  const nobody = await connectChannel(freshPath(), new Ear()).then(() => null, (error: { code: string; message: string }) => error);
  assert.is(nobody?.code, 'IO_FAILED');
  const path = freshPath();
  const server = listenChannel(path, () => {}, new Ear());
  assert.throws(() => listenChannel(path, () => {}, new Ear()), (error: { code: string }) => error.code === 'ADDRESS_IN_USE');
  server.close();
  assert.not.ok(existsSync(path));
  assert.throws(() => listenChannel(`/${'x'.repeat(200)}`, () => {}, new Ear()), /File name too long/);
});

test('messages beyond the bounds are refused where they are sent', async () => {
  const { server, a } = await pair();
  const refused = (error: { code: string }) => error.code === 'REQUEST_INVALID';
  assert.throws(() => a.send(new Uint8Array((16 << 20) + 1)), refused);
  assert.throws(() => a.send(new Uint8Array(1), Array.from({ length: 65 }, () => 0)), refused);
  assert.throws(() => a.send('text' as never), refused);
  assert.throws(() => a.send(new Uint8Array(1), [9999]), (error: { code: string }) => error.code === 'IO_FAILED');
  a.close();
  server.close();
});

/** A raw client of the socket, to say what no channel would. */
async function raw(path: string): Promise<Socket> {
  const socket = connectSocket(path);
  socket.on('error', () => {});
  await new Promise((resolve) => socket.once('connect', resolve));
  return socket;
}

const header = (bytes: number, fds: number) => { const frame = Buffer.alloc(8); frame.writeUInt32LE(bytes, 0); frame.writeUInt32LE(fds, 4); return frame; };

test('hostile frames end their own connection and no other', async () => {
  const path = freshPath();
  const there = new Ear();
  const server = listenChannel(path, there.onConnection, there);
  const honest = await connectChannel(path, new Ear());
  const attacks: [Buffer, RegExp][] = [
    [header(0xffffffff, 0), /announced a message of 4294967295 bytes, at most 16777216/],
    [header(4, 65), /announced 65 descriptors/],
    [Buffer.concat([header(4, 1), Buffer.alloc(4)]), /announced 1 descriptors and sent 0/],
    [Buffer.from('GET / HTTP/1.1\r\nHost: localhost\r\n\r\n'), /announced a message of/],
  ];
  for (const [bytes, reason] of attacks) {
    const known = there.closed.length;
    const socket = await raw(path);
    socket.write(bytes);
    await there.until(() => there.closed.length > known, String(reason));
    assert.match(there.closed.at(-1)!.reason, reason);
    socket.destroy();
  }
  const known = there.closed.length;
  const cut = await raw(path);
  cut.write(Buffer.concat([header(100, 0), Buffer.alloc(50)]));
  await new Promise<void>((resolve) => cut.end(() => resolve()));
  await there.until(() => there.closed.length > known, 'the cut message');
  assert.match(there.closed.at(-1)!.reason, /in the middle of a message/);
  assert.is(there.messages.length, 0);
  honest.send(pattern(9, 9));
  await there.until(() => there.messages.length === 1, 'the honest message');
  honest.close();
  server.close();
});

test('a peer that does not read is given up instead of filling memory', async () => {
  const path = freshPath();
  const there = new Ear();
  const server = listenChannel(path, there.onConnection, there);
  const socket = await raw(path);
  socket.pause();
  await there.until(() => there.accepted.length === 1, 'the connection');
  for (let i = 0; i < 6; i++) there.accepted[0]!.send(new Uint8Array(16 << 20));
  await there.until(() => there.closed.length === 1, 'the close');
  assert.match(there.closed[0]!.reason, /does not read/);
  socket.destroy();
  server.close();
});

function node(script: string, ...args: string[]): ChildProcess {
  const loader = join(import.meta.dirname, '../../src/native/loader.ts');
  const source = `import { native } from ${JSON.stringify(loader)}; const { listenChannel, connectChannel, SharedMemory } = native(); const [path] = process.argv.slice(1);\n${script}`;
  return spawn(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', source, ...args], { stdio: ['ignore', 'pipe', 'inherit'] });
}

test('kill -9 of a peer in the middle of a message is seen at once, with what it said before', async () => {
  const path = freshPath();
  const there = new Ear();
  const server = listenChannel(path, there.onConnection, there);
  const child = node(`
    const channel = await connectChannel(path, { onMessage() {}, onClose() {} });
    channel.send(new Uint8Array([1, 2, 3]));
    setInterval(() => {}, 1000);`, path);
  await there.until(() => there.messages.length === 1, 'the first message');
  assert.is(there.accepted[0]!.peer.pid, child.pid);
  const killed = performance.now();
  child.kill('SIGKILL');
  await there.until(() => there.closed.length === 1, 'news of the death');
  assert.ok(performance.now() - killed < 5000);
  assert.match(there.closed[0]!.reason, /closed the connection|connection lost/);
  server.close();
});

test('closed channels and listeners do not keep a process alive; open ones do', async () => {
  const child = node(`
    let left = 2;
    const done = () => { if (--left === 0) { server.close(); process.stdout.write('closed'); } };
    const server = listenChannel(path, (channel) => {}, { onMessage(channel) { channel.close(); }, onClose: done });
    const channel = await connectChannel(path, { onMessage() {}, onClose: done });
    setTimeout(() => channel.send(new Uint8Array(1)), 50).unref();
    setTimeout(() => {}, 100);`, freshPath());
  let output = '';
  child.stdout!.on('data', (chunk) => { output += chunk; });
  const status = await new Promise((resolve) => child.on('exit', (code, signal) => resolve(signal ?? code)));
  assert.is(status, 0);
  assert.is(output, 'closed');
});

test('process.exit with open channels and traffic is clean', async () => {
  const child = node(`
    const handlers = { onMessage(channel, message) { channel.send(message); }, onClose() {} };
    listenChannel(path, () => {}, handlers);
    for (let i = 0; i < 8; i++) (await connectChannel(path, handlers)).send(new Uint8Array(1000));
    setTimeout(() => process.exit(7), 100);`, freshPath());
  const status = await new Promise((resolve) => child.on('exit', (code, signal) => resolve(signal ?? code)));
  assert.is(status, 7);
});

test('many short connections leak no descriptor', async () => {
  const path = freshPath();
  const there = new Ear();
  const server = listenChannel(path, there.onConnection, there);
  const before = openFds();
  const memory = SharedMemory.create(4096, 'leak');
  for (let round = 0; round < 10; round++) {
    const here = new Ear();
    const channels = await Promise.all(Array.from({ length: 20 }, () => connectChannel(path, here)));
    channels.forEach((channel, i) => { channel.send(pattern(i, i), i % 2 === 0 ? [memory.fd] : []); channel.close(); });
    await here.until(() => here.closed.length === 20, 'closes');
  }
  await there.until(() => there.closed.length === 200, 'closes at the server');
  assert.is(there.messages.length, 200);
  there.messages.forEach(({ fds }) => fds.forEach((fd) => closeSync(fd)));
  memory.close();
  assert.is(openFds(), before);
  server.close();
});

test.run();
