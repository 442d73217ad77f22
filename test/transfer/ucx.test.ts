// time limit: 300 s
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { systemClock } from '../../src/clock.js';
import { native } from '../../src/native/loader.js';
import type { KvArena, KvLayout, Ucx } from '../../src/native/types.js';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import type { HandoffReceiver, HandoffTicket } from '../../src/transfer/types.js';
import { findUcx, openUcx } from '../../src/transfer/ucx.js';
import { endpoint, failure, findDifference, LAYERS, newArena, pageRange, smallLayout, stats, until } from '../support/handoff.js';
import { cancelInTheMiddle, landPrompt, openFds, SOURCE_PAGES, TARGET_PAGES, threads, TOKENS, VIEWS } from '../support/handoff_exercises.js';
import { Peer } from '../support/handoff_child.js';
import { BIG, BIG_PAGES, BIG_TARGET, BIG_TOKENS } from '../support/handoff_fault_shapes.js';

const LIBRARY = findUcx();
const all = suite('transfer/ucx');
const test = LIBRARY === null ? all.skip : all;
const directory = mkdtempSync(join(tmpdir(), 'tpla-ucx-'));
all.after(() => rmSync(directory, { recursive: true }));

const ADDRESS = 'tcp://127.0.0.1:0';

/** Peer failures are what is tested here: UCX's own lines about them say nothing. */
const quiet = { UCX_LOG_LEVEL: 'fatal', UCX_TLS: 'all' };
const open = (options: Record<string, string> = {}) => openUcx({ use: 'always', library: null, options: { ...quiet, ...options } }) as Promise<Ucx>;

async function pair(change: Partial<KvLayout> = { form: 'tpla', ranks: 2, pageTokens: 32 }) {
  const source = newArena(smallLayout(), 64);
  const target = newArena(smallLayout(change), 64);
  const ucx = await open();
  const receiver = await createHandoffReceiver(ADDRESS, { ...endpoint(target, systemClock), ucx });
  const sender = createHandoffSender({ ...endpoint(source, systemClock), ucx, requirePath: 'ucx' });
  const close = async () => {
    await sender.close();
    await receiver.close();
    ucx.close();
    source.close();
    target.close();
  };
  return { source, target, receiver, sender, ucx, close };
}
const grant = (change: object = {}) => ({ tokens: TOKENS, pages: [TARGET_PAGES], leaseMs: 60_000, ...change });

for (const [name, change] of VIEWS) {
  test(`a prompt lands verified over UCX: ${name}`, async () => {
    const ends = await pair(change);
    const { commit } = await landPrompt(ends, change, 'ucx', 60_000);
    assert.is(commit.path, 'ucx');
    await ends.close();
  });
}

// ---------------------------------------------------------------- two processes

const bigTarget = newArena(BIG_TARGET, BIG_PAGES);
const bigPages = pageRange(0, BIG_PAGES / 2);
const bigGrant = (leaseMs = 60_000) => ({ tokens: BIG_TOKENS, pages: [bigPages], leaseMs });

function poison(arena: KvArena): void {
  for (const rank of [0, 1]) for (let layer = 0; layer < BIG.layers; layer++) for (const page of bigPages) arena.page(rank, layer, page).fill(0x5a);
}

function isPoisoned(arena: KvArena): boolean {
  const expected = Buffer.alloc(arena.page(0, 0, 0).length, 0x5a);
  for (const rank of [0, 1]) for (let layer = 0; layer < BIG.layers; layer++) for (const page of bigPages) if (expected.compare(arena.page(rank, layer, page)) !== 0) return false;
  return true;
}

async function withReceiver(transports: string, body: (receiver: HandoffReceiver, env: Record<string, string>) => Promise<void>): Promise<void> {
  const env = { ...quiet, UCX_TLS: transports };
  const ucx = await open(env);
  const receiver = await createHandoffReceiver(ADDRESS, { ...endpoint(bigTarget, systemClock), ucx });
  try {
    await body(receiver, env);
  } finally {
    await receiver.close();
    ucx.close();
  }
}

for (const transports of ['tcp', 'all']) {
  test(`two processes over UCX_TLS=${transports}: a prompt of 42 MB lands, then a killed prefill is noticed and replaced`, () => withReceiver(transports, async (receiver, env) => {
    const doomed = new Peer(['prefill', receiver.address, 'pushing', 'ucx'], [], env);
    await doomed.line('ready');
    const lost = receiver.open(bigGrant());
    doomed.tell(lost.ticket);
    await doomed.line('pushing');
    const killedAt = performance.now();
    doomed.child.kill('SIGKILL');
    const error = await failure(lost.committed);
    assert.is(error.code, 'HANDOFF_FAILED');
    assert.match(error.message, /prefill is gone/);
    assert.ok(performance.now() - killedAt < 5000, 'within the lease');
    poison(bigTarget);
    await doomed.ended;
    assert.ok(isPoisoned(bigTarget), 'nothing was written after the promise had settled');
    const heir = new Peer(['prefill', receiver.address, 'none', 'ucx'], [], env);
    await heir.line('ready');
    const { ticket, committed } = receiver.open(bigGrant());
    heir.tell(ticket);
    assert.is((await committed).path, 'ucx');
    assert.is(findDifference(bigTarget, bigPages, [0, 200], 1), null);
    assert.is(findDifference(bigTarget, bigPages, [BIG_TOKENS[1] - 100, BIG_TOKENS[1]], 1), null);
    await heir.kill();
    assert.equal([receiver.stats().open, receiver.stats().draining], [0, 0]);
  }));

  test(`prefill stops in the middle over UCX_TLS=${transports}: its lease runs out, decode has its pages back while it is stopped, no late byte lands`, () => withReceiver(transports, async (receiver, env) => {
    const peer = new Peer(['prefill', receiver.address, 'pushing', 'ucx'], [], env);
    await peer.line('ready');
    const { ticket, committed } = receiver.open(bigGrant(2000));
    peer.tell(ticket);
    await peer.line('pushing');
    peer.child.kill('SIGSTOP');
    assert.is((await failure(committed)).code, 'LEASE_EXPIRED');
    poison(bigTarget);
    peer.child.kill('SIGCONT');
    await new Promise((resolve) => setTimeout(resolve, 200));
    assert.ok(isPoisoned(bigTarget), 'a late write landed');
    await peer.kill();
  }));

  test(`decode is killed over UCX_TLS=${transports}: prefill's session aborts`, async () => {
    const env = { ...quiet, UCX_TLS: transports };
    const ucx = await open(env);
    const source = newArena(BIG, BIG_PAGES);
    const pages = pageRange(0, BIG_PAGES);
    const sender = createHandoffSender({ ...endpoint(source, systemClock), ucx });
    const peer = new Peer(['decode', ADDRESS, '60000', 'ucx'], [], env);
    const session = await sender.open(JSON.parse((await peer.line('ticket')).slice('ticket '.length)) as HandoffTicket);
    assert.is(session.path, 'ucx');
    const pushes = Array.from({ length: BIG.layers }, (_, layer) => session.push([layer, layer + 1], BIG_TOKENS, pages));
    await peer.kill();
    await until(() => session.aborted.aborted, 'the abort', 5000);
    assert.is((session.aborted.reason as { code: string }).code, 'HANDOFF_FAILED');
    await Promise.allSettled(pushes);
    assert.is((await failure(session.push([0, 1], BIG_TOKENS, pages))).code, 'HANDOFF_FAILED');
    await sender.close();
    ucx.close();
    source.close();
  });
}

test('transports that cannot tell of a dead peer are not used: over shared memory alone UCX is passed over, or refused where it is required', () => withReceiver('sm', async (receiver) => {
  const source = newArena(BIG, BIG_PAGES);
  const ucx = await open({ UCX_TLS: 'sm' });
  const flexible = createHandoffSender({ ...endpoint(source, systemClock), ucx });
  assert.is((await flexible.open(receiver.open(bigGrant()).ticket)).path, 'tcp');
  const strict = createHandoffSender({ ...endpoint(source, systemClock), ucx, requirePath: 'ucx' });
  assert.match((await failure(strict.open(receiver.open(bigGrant()).ticket))).message, /UCX cannot reach the peer: destination is unreachable/);
  await flexible.close();
  await strict.close();
  ucx.close();
  source.close();
}));

// ---------------------------------------------------------------- cancel, leaks, hostile pieces

test('decode cancels in the middle: no late write, the next hand-off on the same slot is whole', async () => {
  const ends = await pair();
  await cancelInTheMiddle(ends, 20, 60_000);
  await ends.close();
});

test('connections over UCX leak no thread and no descriptor', async () => {
  const { source, receiver, sender, ucx, close } = await pair();
  const run = async (with_: typeof sender) => {
    const { ticket, committed } = receiver.open(grant());
    const session = await with_.open(ticket);
    await session.push([0, LAYERS], TOKENS, SOURCE_PAGES);
    await session.commit({ firstTokens: [], prefill: stats(100) });
    await committed;
  };
  for (let i = 0; i < 3; i++) {
    const other = createHandoffSender({ ...endpoint(source, systemClock), ucx });
    await run(other);
    await other.close();
  }
  await run(sender);
  const before = { threads: threads(), fds: openFds() };
  for (let i = 0; i < 10; i++) {
    const other = createHandoffSender({ ...endpoint(source, systemClock), ucx });
    await run(other);
    await other.close();
  }
  await until(() => threads() <= before.threads && openFds() <= before.fds, `threads and descriptors to end: ${threads()} ${openFds()} against ${JSON.stringify(before)}`);
  await close();
});

test('pieces that were not granted, or have another size, end the link; memory stays as it was', async () => {
  const target = newArena(smallLayout(), 64);
  const source = newArena(smallLayout(), 64);
  const ucx = await open();
  const receiver = await ucx.listen(target);
  const gate = native().WriteGate.create(4);
  const key = 'k'.repeat(32);
  receiver.admit(key, gate);
  const epoch = gate.open(1);
  receiver.grant(key, 1, epoch, [16, 100], [pageRange(10, 7)]);
  for (let page = 0; page < 64; page++) for (let layer = 0; layer < LAYERS; layer++) target.page(0, layer, page).fill(0x44);
  const put = { src: source, layers: [0, 1] as [number, number], tokens: [16, 32] as [number, number], srcPages: [pageRange(0, 8)], slot: 1, epoch };
  for (const [layout, change] of [
    [smallLayout(), { tokens: [0, 32] }],
    [smallLayout(), { tokens: [96, 101] }],
    [smallLayout(), { slot: 2 }],
    [smallLayout({ pageTokens: 32 }), { tokens: [32, 64] }],
    [smallLayout({ dtype: 'f32' }), {}],
    [smallLayout({ form: 'tpla', ranks: 2 }), {}],
  ] as [KvLayout, object][]) {
    const sender = await ucx.connect({ address: receiver.address, key, layout });
    assert.is((await failure(sender.put({ ...put, ...change }))).code, 'IO_FAILED');
    sender.close();
    receiver.disconnect(key);
  }
  assert.is((await failure(ucx.connect({ address: receiver.address, key: 'x'.repeat(32), layout: smallLayout() }))).code, 'IO_FAILED');
  for (let page = 0; page < 64; page++) for (let layer = 0; layer < LAYERS; layer++) assert.ok(target.page(0, layer, page).every((byte) => byte === 0x44), `page ${page}`);
  receiver.close();
  ucx.close();
  gate.close();
});

// ---------------------------------------------------------------- what is installed

test('another release series is passed over, or refused with both versions where UCX is required', async () => {
  const { receiver, source, ucx, close } = await pair();
  const other: Ucx = { ...ucx, version: '1.17.0' };
  const flexible = createHandoffSender({ ...endpoint(source, systemClock), ucx: other });
  assert.is((await flexible.open(receiver.open(grant()).ticket)).path, 'tcp');
  const strict = createHandoffSender({ ...endpoint(source, systemClock), ucx: other, requirePath: 'ucx' });
  const error = await failure(strict.open(receiver.open(grant()).ticket));
  assert.is(error.code, 'HANDSHAKE_REFUSED');
  assert.match(error.message, `UCX 1.17.0 on this side and ${ucx.version} on decode's`);
  const without = createHandoffSender({ ...endpoint(source, systemClock), requirePath: 'ucx' });
  assert.match((await failure(without.open(receiver.open(grant()).ticket))).message, /this side uses no UCX/);
  for (const sender of [flexible, strict, without]) await sender.close();
  await close();
});

all('an absent library, one that is none, one that is too old: one clear error each', async () => {
  assert.is(await openUcx({ use: 'never', library: null, options: {} }), null);
  const missing = await failure(openUcx({ use: 'always', library: '/nowhere/libucp.so.0', options: {} }));
  assert.is(missing.code, 'CONFIG_INVALID');
  assert.match(missing.message, /\/nowhere\/libucp\.so\.0, which does not exist/);
  const build = (name: string, code: string) => {
    const file = join(directory, name);
    writeFileSync(`${file}.cpp`, `extern "C" { ${code} }`);
    assert.is(spawnSync('g++', ['-shared', '-fPIC', '-o', file, `${file}.cpp`]).status, 0);
    return file;
  };
  // In a process that has loaded no UCX yet.
  const load = (file: string) => {
    const script = `import { native } from ${JSON.stringify(join(import.meta.dirname, '../../src/native/loader.ts'))};
      native().openUcx(${JSON.stringify(file)}).then(() => console.log('loaded'), (error) => console.log(error.code, error.message));`;
    return spawnSync(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script], { encoding: 'utf8' }).stdout;
  };
  assert.match(load(build('libnothing.so', 'int nothing;')), /CONFIG_INVALID .*libnothing\.so has no ucp_get_version/);
  const old = 'void ucp_get_version(unsigned* a, unsigned* b, unsigned* c) { *a = 1; *b = 12; *c = 0; } const char* ucp_get_version_string() { return "1.12.0"; }';
  assert.match(load(build('libold.so', old)), /CONFIG_INVALID UCX 1\.12\.0 at .*libold\.so is not supported; tpla works with UCX 1\.13/);
});

test('a setting that UCX cannot meet is refused', async () => {
  const error = await failure(open({ UCX_TLS: 'bogus' }));
  assert.is(error.code, 'CONFIG_INVALID');
  assert.match(error.message, /cannot be started: no such device; check UCX_TLS/);
  await open({ UCX_TLS: 'all' }).then((ucx) => ucx.close());
});

all.after(() => bigTarget.close());
all.run();
