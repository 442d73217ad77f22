// time limit: 200 s
// Over a stand-in library (test/support/nixl_stand_in.cpp): two real processes, one of whom reads the other's memory. NIXL itself is not here.
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { systemClock } from '../../src/clock.js';
import { native } from '../../src/native/loader.js';
import type { KvArena, KvLayout, Nixl } from '../../src/native/types.js';
import { describeNixl, findNixl, nixlVersion, openNixl } from '../../src/transfer/nixl.js';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import type { HandoffReceiver, HandoffTicket, TransferPath } from '../../src/transfer/types.js';
import { tpla } from '../support/cli.js';
import { endpoint, failure, fillCanonical, findDifference, LAYERS, newArena, pageRange, smallLayout, stats, until } from '../support/handoff.js';
import { cancelInTheMiddle, landPrompt, openFds, SOURCE_PAGES, TARGET_PAGES, threads, TOKENS, VIEWS } from '../support/handoff_exercises.js';
import { Peer } from '../support/handoff_child.js';
import { BIG, BIG_PAGES, BIG_TARGET, BIG_TOKENS } from '../support/handoff_fault_shapes.js';
import { buildLibrary, buildNixlStandIn } from '../support/nixl_library.js';

const test = suite('transfer/nixl');
const directory = mkdtempSync(join(tmpdir(), 'tpla-nixl-'));
const LIBRARY = buildNixlStandIn(directory);
test.after(() => rmSync(directory, { recursive: true }));

const ADDRESS = 'tcp://127.0.0.1:0';
const LINK = `nixl=${LIBRARY}`;
const open = async () => (await openNixl({ use: 'always', library: LIBRARY, backends: ['UCX'], options: {} }))!;

/** The library looks at each transfer. */
async function withFault<T>(fault: 'flip' | 'error' | 'hang', body: () => Promise<T>): Promise<T> {
  process.env['NIXL_STAND_IN_FAULT'] = fault;
  try {
    return await body();
  } finally {
    delete process.env['NIXL_STAND_IN_FAULT'];
  }
}

/** Two agents, as in two processes. */
async function pair(change: Partial<KvLayout> = { form: 'tpla', ranks: 2, pageTokens: 32 }) {
  const source = newArena(smallLayout(), 64);
  const target = newArena(smallLayout(change), 64);
  const [near, far] = [await open(), await open()];
  const receiver = await createHandoffReceiver(ADDRESS, { ...endpoint(target, systemClock), nixl: far });
  const newSender = () => createHandoffSender({ ...endpoint(source, systemClock), nixl: near, requirePath: 'nixl' });
  const sender = newSender();
  const close = async () => {
    await sender.close();
    await receiver.close();
    near.close();
    far.close();
    source.close();
    target.close();
  };
  return { source, target, receiver, sender, newSender, near, far, close };
}
const grant = (change: object = {}) => ({ tokens: TOKENS, pages: [TARGET_PAGES], leaseMs: 60_000, ...change });

for (const [name, change] of VIEWS) {
  test(`a prompt lands verified through NIXL: ${name}`, async () => {
    const ends = await pair(change);
    const { commit } = await landPrompt(ends, change, 'nixl', 60_000);
    assert.is(commit.path, 'nixl');
    await ends.close();
  });
}

// ---------------------------------------------------------------- two processes

const bigTarget = newArena(BIG_TARGET, BIG_PAGES);
test.after(() => bigTarget.close());
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

async function withReceiver(body: (receiver: HandoffReceiver) => Promise<void>): Promise<void> {
  const nixl = await open();
  const receiver = await createHandoffReceiver(ADDRESS, { ...endpoint(bigTarget, systemClock), nixl });
  try {
    await body(receiver);
  } finally {
    await receiver.close();
    nixl.close();
  }
}

test('two processes: a prompt of 42 MB lands, then a killed prefill is noticed and replaced', () => withReceiver(async (receiver) => {
  const doomed = new Peer(['prefill', receiver.address, 'pushing', LINK]);
  await doomed.line('ready');
  const lost = receiver.open(bigGrant());
  doomed.tell(lost.ticket);
  await doomed.line('pushing');
  doomed.child.kill('SIGKILL');
  const error = await failure(lost.committed);
  assert.is(error.code, 'HANDOFF_FAILED');
  assert.match(error.message, /prefill is gone/);
  poison(bigTarget);
  await doomed.ended;
  assert.ok(isPoisoned(bigTarget), 'nothing was written after the promise had settled');
  const heir = new Peer(['prefill', receiver.address, 'none', LINK]);
  await heir.line('ready');
  const { ticket, committed } = receiver.open(bigGrant());
  heir.tell(ticket);
  assert.is((await committed).path, 'nixl');
  assert.is(findDifference(bigTarget, bigPages, [0, 200], 1), null);
  assert.is(findDifference(bigTarget, bigPages, [BIG_TOKENS[1] - 100, BIG_TOKENS[1]], 1), null);
  await heir.kill();
  assert.equal([receiver.stats().open, receiver.stats().draining], [0, 0]);
}));

test('prefill stops in the middle: its lease runs out, no late byte lands, and once it goes on it is served again', () => withReceiver(async (receiver) => {
  const peer = new Peer(['prefill', receiver.address, 'pushing', LINK]);
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

test("decode is killed: prefill's session aborts", async () => {
  const nixl = await open();
  const source = newArena(BIG, BIG_PAGES);
  const pages = pageRange(0, BIG_PAGES);
  const sender = createHandoffSender({ ...endpoint(source, systemClock), nixl });
  const peer = new Peer(['decode', ADDRESS, '60000', LINK]);
  const session = await sender.open(JSON.parse((await peer.line('ticket')).slice('ticket '.length)) as HandoffTicket);
  assert.is(session.path, 'nixl');
  const pushes = Array.from({ length: BIG.layers }, (_, layer) => session.push([layer, layer + 1], BIG_TOKENS, pages));
  await peer.kill();
  await until(() => session.aborted.aborted, 'the abort', 5000);
  assert.is((session.aborted.reason as { code: string }).code, 'HANDOFF_FAILED');
  await Promise.allSettled(pushes);
  assert.is((await failure(session.push([0, 1], BIG_TOKENS, pages))).code, 'HANDOFF_FAILED');
  await sender.close();
  nixl.close();
  source.close();
});

// ---------------------------------------------------------------- transfers that go wrong

test('a byte that changed on the way is found before the page is used', async () => {
  const ends = await pair();
  fillCanonical(ends.source, SOURCE_PAGES, TOKENS, 1);
  const { ticket, committed } = ends.receiver.open(grant());
  committed.catch(() => {});
  await withFault('flip', async () => {
    const session = await ends.sender.open(ticket);
    await Promise.allSettled([session.push([0, LAYERS], TOKENS, SOURCE_PAGES)]);
    await session.commit({ firstTokens: [], prefill: stats(100) }).catch(() => {});
    assert.is((await failure(committed)).code, 'CHECKSUM_MISMATCH');
  });
  await landPrompt(ends, { form: 'tpla', ranks: 2, pageTokens: 32 }, 'nixl', 60_000);
  await ends.close();
});

test('a transfer that ends in an error ends the hand-off; the next one connects anew', async () => {
  const ends = await pair();
  const { ticket, committed } = ends.receiver.open(grant());
  committed.catch(() => {});
  await withFault('error', async () => {
    const session = await ends.sender.open(ticket);
    assert.match((await failure(session.push([0, LAYERS], TOKENS, SOURCE_PAGES))).message, /the receiver ended the link/);
    assert.is((await failure(committed)).code, 'HANDOFF_FAILED');
  });
  const next = ends.newSender();
  await landPrompt({ ...ends, sender: next }, { form: 'tpla', ranks: 2, pageTokens: 32 }, 'nixl', 60_000);
  await next.close();
  await ends.close();
});

test('a transfer that hangs: the cancelled hand-off keeps its pages until the library has done with them, and no longer', async () => {
  const ends = await pair();
  fillCanonical(ends.source, SOURCE_PAGES, TOKENS, 1);
  const { ticket, committed, failing } = ends.receiver.open(grant());
  let settled = false;
  const ending = failure(committed).finally(() => { settled = true; });
  await withFault('hang', async () => {
    const session = await ends.sender.open(ticket);
    const push = session.push([0, LAYERS], TOKENS, SOURCE_PAGES).catch(() => {});
    // Until the pieces are on their way.
    await new Promise((resolve) => setTimeout(resolve, 100));
    ends.receiver.cancel(ticket.session);
    await until(() => failing.aborted, 'the end of the hand-off to be known');
    await new Promise((resolve) => setTimeout(resolve, 100));
    assert.not(settled, 'the pages were given back while a transfer could still write into them');
    assert.is(ends.receiver.stats().draining, 1);
    void push;
  });
  assert.is((await ending).code, 'CANCELLED');
  assert.is(ends.receiver.stats().draining, 0);
  await landPrompt(ends, { form: 'tpla', ranks: 2, pageTokens: 32 }, 'nixl', 60_000);
  await ends.close();
});

test('decode cancels in the middle: no late write, the next hand-off on the same slot is whole', async () => {
  const ends = await pair();
  await cancelInTheMiddle(ends, 20, 60_000);
  await ends.close();
});

test('connections through NIXL leak no thread, no descriptor, and nothing inside the library', async () => {
  const ends = await pair();
  const run = async (sender: typeof ends.sender) => {
    const { ticket, committed } = ends.receiver.open(grant());
    const session = await sender.open(ticket);
    await session.push([0, LAYERS], TOKENS, SOURCE_PAGES);
    await session.commit({ firstTokens: [], prefill: stats(100) });
    await committed;
  };
  const runAnew = async () => {
    const sender = ends.newSender();
    await run(sender);
    await sender.close();
  };
  for (let i = 0; i < 3; i++) await runAnew();
  await run(ends.sender);
  const before = { threads: threads(), fds: openFds() };
  for (let i = 0; i < 10; i++) await runAnew();
  await until(() => threads() <= before.threads && openFds() <= before.fds, `threads and descriptors to end: ${threads()} ${openFds()} against ${JSON.stringify(before)}`);
  // The stand-in ends the process where an agent goes with transfers or memory left.
  await ends.close();
});

test('pieces that were not granted, or have another size, end the link; memory stays as it was', async () => {
  const target = newArena(smallLayout(), 64);
  const source = newArena(smallLayout(), 64);
  const [near, far] = [await open(), await open()];
  const receiver = await far.listen(target);
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
    const sender = await near.connect({ address: receiver.address, key, layout });
    assert.is((await failure(sender.put({ ...put, ...change }))).code, 'IO_FAILED');
    sender.close();
    receiver.disconnect(key);
  }
  assert.is((await failure(near.connect({ address: receiver.address, key: 'x'.repeat(32), layout: smallLayout() }))).code, 'IO_FAILED');
  assert.match((await failure(near.connect({ address: Buffer.from('not metadata'), key, layout: smallLayout() }))).message, /NIXL cannot use the peer's address/);
  for (let page = 0; page < 64; page++) for (let layer = 0; layer < LAYERS; layer++) assert.ok(target.page(0, layer, page).every((byte) => byte === 0x44), `page ${page}`);
  receiver.close();
  near.close();
  far.close();
  gate.close();
});

// ---------------------------------------------------------------- which path is taken

test('NIXL is passed over where one side lacks it, and nothing else is taken where it is required', async () => {
  const { receiver, source, near, close } = await pair();
  const open = async (options: { nixl?: Nixl | null; requirePath?: TransferPath }) => {
    const sender = createHandoffSender({ ...endpoint(source, systemClock), ...options });
    try {
      return (await sender.open(receiver.open(grant()).ticket)).path;
    } finally {
      await sender.close();
    }
  };
  assert.is(await open({ nixl: near }), 'nixl');
  assert.is(await open({}), 'tcp');
  assert.match((await failure(open({ requirePath: 'nixl' }))).message, /nixl and nothing else is required \(nixl: this side uses no NIXL/);
  assert.match((await failure(open({ nixl: { ...near, backends: [{ name: 'GDS', memories: ['VRAM'] }] }, requirePath: 'nixl' }))).message, /NIXL has GDS on this side and UCX on decode's/);
  const local = await createHandoffReceiver(`unix:${join(directory, 'local.sock')}`, endpoint(source, systemClock));
  const strict = createHandoffSender({ ...endpoint(source, systemClock), nixl: near, requirePath: 'nixl' });
  assert.match((await failure(strict.open(local.open(grant({ pages: [pageRange(10, 7)] })).ticket))).message, /the path to decode is shm, nixl and nothing else is required/);
  await strict.close();
  await local.close();
  await close();
});

// ---------------------------------------------------------------- what is installed

/** In a process that has loaded no NIXL yet. */
function load(file: string, backends = ['UCX'], env: Record<string, string> = {}): string {
  const script = `import { native } from ${JSON.stringify(join(import.meta.dirname, '../../src/native/loader.ts'))};
    native().openNixl(${JSON.stringify(file)}, ${JSON.stringify(backends)}).then((nixl) => { console.log('loaded', nixl.library); nixl.close(); }, (error) => console.log(error.code, error.message));`;
  return spawnSync(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script], { encoding: 'utf8', env: { ...process.env, ...env } }).stdout;
}

test('an absent library, one that is none, an old one, a stub, a missing plug-in: one clear error each', async () => {
  assert.is(await openNixl({ use: 'never', library: null, backends: ['UCX'], options: {} }), null);
  const missing = await failure(openNixl({ use: 'auto', library: '/nowhere/libnixl_capi.so', backends: ['UCX'], options: {} }));
  assert.is(missing.code, 'CONFIG_INVALID');
  assert.match(missing.message, /\/nowhere\/libnixl_capi\.so, which does not exist/);
  const declared = 'extern "C" __attribute__((visibility("default")))';
  assert.match(load(buildLibrary(directory, 'libnothing.so', `${declared} int nothing; int nothing;`)), /CONFIG_INVALID .*libnothing\.so has no nixl_capi_create_agent; tpla works with the libnixl_capi\.so of NIXL 0\.10\.1/);
  // Before 0.5 there was no metadata of single memories.
  assert.match(load(buildNixlStandIn(directory, 'libold.so', ['-Dnixl_capi_get_local_partial_md=nixl_capi_get_no_partial_md'])), /libold\.so has no nixl_capi_get_local_partial_md/);
  assert.match(load(buildNixlStandIn(directory, 'libstub.so', ['-DNIXL_STAND_IN_IS_STUB=true'])), /libstub\.so is a stub that was built without NIXL/);
  assert.match(load('libnixl_capi_of_nobody.so'), /CONFIG_INVALID NIXL cannot be loaded: libnixl_capi_of_nobody\.so/);
  assert.match(load(LIBRARY, ['Mooncake']), /CONFIG_INVALID NIXL has no plug-in Mooncake here, but GDS, UCX; see transfer\.nixl\.backends/);
  assert.match(load(LIBRARY, ['GDS']), /CONFIG_INVALID NIXL's backend GDS does not carry host memory/);
  assert.is(load('libnixl_capi.so', ['UCX'], { LD_LIBRARY_PATH: directory }).trim(), `loaded ${LIBRARY}`);
  const other = await failure(native().openNixl(join(directory, 'libstub.so'), []));
  assert.match(other.message, /is a stub/);
});

test('where NIXL may be absent its reason is told; where it is found, what it is', async () => {
  let reason = '';
  assert.is(await openNixl({ use: 'auto', library: join(directory, 'libnothing.so'), backends: ['UCX'], options: {} }, (text) => { reason = text; }), null);
  assert.match(reason, /has no nixl_capi_create_agent/);
  assert.is(findNixl([join(directory, 'absent.so'), LIBRARY]), LIBRARY);
  assert.is(findNixl([]), 'libnixl_capi.so');
  const nixl = await open();
  assert.is(describeNixl(nixl), 'version unknown: UCX (DRAM); plug-ins GDS, UCX');
  nixl.close();
  const wheel = join(directory, 'site-packages');
  mkdirSync(join(wheel, '.nixl_cu12.mesonpy.libs'), { recursive: true });
  mkdirSync(join(wheel, 'nixl_cu12-1.0.1.dist-info'));
  assert.is(nixlVersion(join(wheel, '.nixl_cu12.mesonpy.libs', 'libnixl_capi.so')), '1.0.1');
});

test('doctor says what it found; bench-transfer measures it through its table of paths', async () => {
  const env = { TPLA_NIXL_LIBRARY: LIBRARY };
  const found = JSON.parse((await tpla(['doctor', '--json'], { env })).stdout) as { libraries: { name: string; path: string | null; detail: string }[] };
  assert.equal(found.libraries.find(({ name }) => name === 'NIXL'), { name: 'NIXL', path: LIBRARY, detail: 'version unknown: UCX (DRAM); plug-ins GDS, UCX' });
  const { status, stdout, stderr } = await tpla(['bench-transfer', '--path', 'nixl', '--tokens', '256', '--layers', '4', '--iterations', '2', '--warmup', '1', '--json'], { env });
  assert.is(status, 0, stderr);
  const { rows } = JSON.parse(stdout) as { rows: { path: string; gb_per_s: number }[] };
  assert.equal(rows.map((row) => row.path), ['plain-sockets', 'nixl']);
  assert.ok(rows.every((row) => row.gb_per_s > 0));
});

test.run();
