/** What every library that carries KV between hosts has to do, in one process and in two. Assertions of one library stay in its test. */
import * as assert from 'uvu/assert';
import { systemClock } from '../../src/clock.js';
import { native } from '../../src/native/loader.js';
import type { KvArena, KvLayout, Nixl, Ucx } from '../../src/native/types.js';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import type { HandoffReceiver, HandoffSender, HandoffTicket } from '../../src/transfer/types.js';
import { endpoint, failure, findDifference, LAYERS, newArena, pageRange, smallLayout, stats, until } from './handoff.js';
import { Peer } from './handoff_child.js';
import { cancelInTheMiddle, type Ends, landPrompt, openFds, SOURCE_PAGES, TARGET_PAGES, threads, TOKENS, VIEWS } from './handoff_exercises.js';
import { BIG, BIG_PAGES, BIG_TARGET, BIG_TARGET_PAGES, BIG_TOKENS, bigGrant, isPoisoned, poison } from './handoff_fault_shapes.js';

export type OpenedLibrary = { ucx: Ucx; nixl?: never } | { nixl: Nixl; ucx?: never };

/** The library under test, and how a peer process is told to use it. */
export interface LibraryUnderTest {
  path: 'ucx' | 'nixl';
  open(): Promise<OpenedLibrary>;
  /** Last argument of `handoff_peer.ts`. */
  link: string;
  env?: Record<string, string>;
  /** A read that is under way cannot be called off, so pages are held until it ends: once prefill goes on or is gone. */
  holdsPages?: boolean;
}

export const ANY_TCP = 'tcp://127.0.0.1:0';
const TWO_RANKS: Partial<KvLayout> = { form: 'tpla', ranks: 2, pageTokens: 32 };
const LEASE_MS = 60_000;

/** What decode promises for a prompt of TOKENS. */
export const grantOf = (change: object = {}) => ({ tokens: TOKENS, pages: [TARGET_PAGES], leaseMs: LEASE_MS, ...change });

/** Both ends in one process, each with a library of its own as two processes have. */
export interface Pair extends Ends {
  near: OpenedLibrary;
  far: OpenedLibrary;
  newSender(): HandoffSender;
  /** A whole hand-off, verified. */
  land(by?: HandoffSender): ReturnType<typeof landPrompt>;
  close(): Promise<void>;
}

export async function openPair(library: LibraryUnderTest, change: Partial<KvLayout> = TWO_RANKS): Promise<Pair> {
  const source = newArena(smallLayout(), 64);
  const target = newArena(smallLayout(change), 64);
  const [near, far] = [await library.open(), await library.open()];
  const receiver = await createHandoffReceiver(ANY_TCP, { ...endpoint(target, systemClock), ...far });
  const newSender = () => createHandoffSender({ ...endpoint(source, systemClock), ...near, requirePath: library.path });
  const sender = newSender();
  const land = (by = sender) => landPrompt({ source, target, receiver, sender: by }, change, library.path, LEASE_MS);
  const close = async () => {
    await sender.close();
    await receiver.close();
    closeLibrary(near);
    closeLibrary(far);
    source.close();
    target.close();
  };
  return { source, target, receiver, sender, near, far, newSender, land, close };
}

type Register = (name: string, body: () => Promise<void>) => void;

/** Within one process: every view, cancels, leaks, pieces that were not granted. */
export function testInOneProcess(test: Register, library: LibraryUnderTest): void {
  for (const [name, change] of VIEWS) {
    test(`a prompt lands verified: ${name}`, async () => {
      const ends = await openPair(library, change);
      assert.is((await ends.land()).commit.path, library.path);
      await ends.close();
    });
  }
  test('decode cancels in the middle: no late write, the next hand-off on the same slot is whole', async () => {
    const ends = await openPair(library);
    await cancelInTheMiddle(ends, 20, LEASE_MS);
    await ends.close();
  });
  test('connections leak no thread and no descriptor', async () => {
    const ends = await openPair(library);
    await leakNothing(ends);
    await ends.close();
  });
  test('pieces that were not granted, or have another size, end the link; memory stays as it was', () => refuseUngrantedPieces(library));
}

/** Between two processes: each of them killed, and prefill stopped, while 42 MB travel. */
export function testBetweenProcesses(test: Register, library: LibraryUnderTest): void {
  const withTarget = async (body: (target: KvArena, receiver: HandoffReceiver) => Promise<void>) => {
    const target = newArena(BIG_TARGET, BIG_PAGES);
    await withReceiver(library, target, (receiver) => body(target, receiver));
    target.close();
  };
  test('two processes: a prompt of 42 MB is under way when prefill is killed; that is noticed, and another lands one',
    () => withTarget((target, receiver) => replaceKilledPrefill(library, target, receiver)));
  test(`prefill stops in the middle: its lease runs out, decode has its pages back ${library.holdsPages ? 'when it goes on' : 'while it is stopped'}, no late byte lands`,
    () => withTarget((target, receiver) => cutOffStoppedPrefill(library, target, receiver)));
  test("decode is killed: prefill's session aborts", () => abortWithKilledDecode(library));
}

/** A receiver of this process that owns `target`. */
export async function withReceiver(library: LibraryUnderTest, target: KvArena, body: (receiver: HandoffReceiver) => Promise<void>): Promise<void> {
  const opened = await library.open();
  const receiver = await createHandoffReceiver(ANY_TCP, { ...endpoint(target, systemClock), ...opened });
  try {
    await body(receiver);
  } finally {
    await receiver.close();
    closeLibrary(opened);
  }
}

export const libraryIn = (opened: OpenedLibrary): Ucx | Nixl => opened.ucx ?? opened.nixl;
export const closeLibrary = (opened: OpenedLibrary): void => libraryIn(opened).close();

/** Prefill is killed while it pushes 42 MB: decode knows, nothing lands late, and another prefill's hand-off is whole. */
async function replaceKilledPrefill({ path, link, env }: LibraryUnderTest, target: KvArena, receiver: HandoffReceiver): Promise<void> {
  const doomed = new Peer(['prefill', receiver.address, 'pushing', link], [], env);
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
  poison(target);
  await doomed.ended;
  assert.ok(isPoisoned(target), 'nothing was written after the promise had settled');
  const heir = new Peer(['prefill', receiver.address, 'none', link], [], env);
  await heir.line('ready');
  const { ticket, committed } = receiver.open(bigGrant());
  heir.tell(ticket);
  assert.is((await committed).path, path);
  assert.is(findDifference(target, BIG_TARGET_PAGES, [0, 200], 1), null);
  assert.is(findDifference(target, BIG_TARGET_PAGES, [BIG_TOKENS[1] - 100, BIG_TOKENS[1]], 1), null);
  await heir.kill();
  assert.equal([receiver.stats().open, receiver.stats().draining], [0, 0]);
}

/** Prefill is stopped while it pushes: its lease runs out, decode has its pages back, and no byte lands once it goes on. */
async function cutOffStoppedPrefill({ link, env, holdsPages }: LibraryUnderTest, target: KvArena, receiver: HandoffReceiver): Promise<void> {
  const peer = new Peer(['prefill', receiver.address, 'pushing', link], [], env);
  await peer.line('ready');
  const { ticket, committed, failing } = receiver.open(bigGrant(2000));
  const ending = failure(committed);
  peer.tell(ticket);
  await peer.line('pushing');
  peer.child.kill('SIGSTOP');
  await until(() => failing.aborted, 'the end of the lease', 5000);
  if (holdsPages) peer.child.kill('SIGCONT');
  assert.is((await ending).code, 'LEASE_EXPIRED');
  poison(target);
  peer.child.kill('SIGCONT');
  await new Promise((resolve) => setTimeout(resolve, 200));
  assert.ok(isPoisoned(target), 'a late write landed');
  await peer.kill();
}

/** Decode is killed while this process pushes: its session aborts, and takes no more. */
async function abortWithKilledDecode(library: LibraryUnderTest): Promise<void> {
  const opened = await library.open();
  const source = newArena(BIG, BIG_PAGES);
  const pages = pageRange(0, BIG_PAGES);
  const sender = createHandoffSender({ ...endpoint(source, systemClock), ...opened });
  const peer = new Peer(['decode', ANY_TCP, '60000', library.link], [], library.env);
  const session = await sender.open(JSON.parse((await peer.line('ticket')).slice('ticket '.length)) as HandoffTicket);
  assert.is(session.path, library.path);
  const pushes = Array.from({ length: BIG.layers }, (_, layer) => session.push([layer, layer + 1], BIG_TOKENS, pages));
  await peer.kill();
  await until(() => session.aborted.aborted, 'the abort', 5000);
  assert.is((session.aborted.reason as { code: string }).code, 'HANDOFF_FAILED');
  await Promise.allSettled(pushes);
  assert.is((await failure(session.push([0, 1], BIG_TOKENS, pages))).code, 'HANDOFF_FAILED');
  await sender.close();
  closeLibrary(opened);
  source.close();
}

/** Ten senders come and go beside one that stays: no thread and no descriptor is left of them. */
async function leakNothing({ receiver, sender: staying, newSender }: Pair): Promise<void> {
  const run = async (sender: HandoffSender) => {
    const { ticket, committed } = receiver.open(grantOf());
    const session = await sender.open(ticket);
    await session.push([0, LAYERS], TOKENS, SOURCE_PAGES);
    await session.commit({ firstTokens: [], prefill: stats(100) });
    await committed;
  };
  const runAnew = async () => {
    const sender = newSender();
    await run(sender);
    await sender.close();
  };
  for (let i = 0; i < 3; i++) await runAnew();
  await run(staying);
  const before = { threads: threads(), fds: openFds() };
  for (let i = 0; i < 10; i++) await runAnew();
  await until(() => threads() <= before.threads && openFds() <= before.fds, `threads and descriptors to end: ${threads()} ${openFds()} against ${JSON.stringify(before)}`);
}

/** Puts of tokens, slots and layouts that were not granted end the link; decode's memory stays as it was. */
async function refuseUngrantedPieces(library: LibraryUnderTest): Promise<void> {
  const [near, far] = [libraryIn(await library.open()), libraryIn(await library.open())];
  const target = newArena(smallLayout(), 64);
  const source = newArena(smallLayout(), 64);
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
  for (let page = 0; page < 64; page++) for (let layer = 0; layer < LAYERS; layer++) assert.ok(target.page(0, layer, page).every((byte) => byte === 0x44), `page ${page}`);
  receiver.close();
  near.close();
  far.close();
  gate.close();
  source.close();
  target.close();
}
