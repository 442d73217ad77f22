// time limit: 400 s
import { spawnSync } from 'node:child_process';
import { closeSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { systemClock } from '../../src/clock.js';
import { native } from '../../src/native/loader.js';
import { decodeMessage, encodeMessage, type Message } from '../../src/transfer/messages.js';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import type { HandoffReceiver, HandoffTicket } from '../../src/transfer/types.js';
import { Peer } from '../support/handoff_child.js';
import { BIG, BIG_PAGES, BIG_TARGET, BIG_TARGET_PAGES, BIG_TOKENS, bigGrant, isPoisoned, poison } from '../support/handoff_fault_shapes.js';
import { endpoint, failure, fillCanonical, findDifference, handshake, LAYERS, newArena, pageRange, sampled, smallLayout, stats, until } from '../support/handoff.js';
import { openFds } from '../support/handoff_exercises.js';

const directory = mkdtempSync(join(tmpdir(), 'tpla-faults-'));
test.after(() => rmSync(directory, { recursive: true }));
let sockets = 0;
const freshAddress = () => `unix:${join(directory, `${sockets++}.sock`)}`;

const target = newArena(BIG_TARGET, BIG_PAGES);

async function withReceiver(body: (receiver: HandoffReceiver) => Promise<void>): Promise<void> {
  const receiver = await createHandoffReceiver(freshAddress(), endpoint(target, systemClock));
  try {
    await body(receiver);
  } finally {
    await receiver.close();
  }
}

for (const step of ['opened', 'pushing', 'pushed', 'committing']) {
  test(`prefill is killed when ${step}: decode knows at once, and its pages are its own again`, () => withReceiver(async (receiver) => {
    const fds = openFds();
    const peer = new Peer(['prefill', receiver.address, step]);
    await peer.line('ready');
    const { ticket, committed, failing } = receiver.open(bigGrant());
    let failedAt = 0;
    failing.addEventListener('abort', () => { failedAt = performance.now(); });
    peer.tell(ticket);
    await peer.line(step);
    if (step === 'committing') {
      // Either side of the race is right: what was committed before the kill stays committed.
      await peer.kill();
      const outcome = await committed.then(() => 'committed', (error: { code: string }) => error.code);
      assert.ok(['committed', 'HANDOFF_FAILED'].includes(outcome), outcome);
      if (outcome === 'committed') assert.is(findDifference(target, BIG_TARGET_PAGES, [0, 64], 1), null);
    } else {
      const killedAt = performance.now();
      peer.child.kill('SIGKILL');
      const error = await failure(committed);
      assert.is(error.code, 'HANDOFF_FAILED');
      assert.match(error.message, /prefill is gone/);
      assert.ok(failedAt - killedAt < 5000, `${failedAt - killedAt} ms`);
      poison(target);
      await peer.ended;
      assert.ok(isPoisoned(target), 'nothing was written after the promise had settled');
    }
    await until(() => openFds() <= fds + 1, 'descriptors of the dead peer to be closed');
    assert.equal([receiver.stats().open, receiver.stats().draining], [0, 0]);
  }));
}

test('a killed prefill is replaced by another one on the same receiver', () => withReceiver(async (receiver) => {
  const doomed = new Peer(['prefill', receiver.address, 'pushing']);
  await doomed.line('ready');
  const lost = receiver.open(bigGrant());
  doomed.tell(lost.ticket);
  await doomed.line('pushing');
  await doomed.kill();
  await failure(lost.committed);
  const heir = new Peer(['prefill', receiver.address, 'none']);
  await heir.line('ready');
  const { ticket, committed } = receiver.open(bigGrant());
  heir.tell(ticket);
  const commit = await committed;
  assert.is(commit.bytes, BIG_TOKENS[1] * BIG.layers * 2 * 640);
  assert.is(findDifference(target, BIG_TARGET_PAGES, [0, 200], 1), null);
  assert.is(findDifference(target, BIG_TARGET_PAGES, [BIG_TOKENS[1] - 100, BIG_TOKENS[1]], 1), null);
  await heir.kill();
}));

test('prefill is stopped in the middle of writing: its lease runs out, and not one late byte lands in pages given back', () => withReceiver(async (receiver) => {
  const peer = new Peer(['prefill', receiver.address, 'pushing-on']);
  await peer.line('ready');
  let caught = 0;
  for (let round = 0; round < 30 && caught < 4; round++) {
    const { ticket, committed, failing } = receiver.open(bigGrant(250));
    let outcome = '';
    void committed.then(() => { outcome = 'committed'; }, (error: { code: string }) => { outcome = error.code; });
    peer.lines.length = 0;
    peer.tell(ticket);
    await peer.line('pushing');
    peer.child.kill('SIGSTOP');
    await until(() => failing.aborted || outcome !== '', 'the lease to run out');
    if (outcome === 'committed') {
      // It was through before the signal came.
      peer.child.kill('SIGCONT');
      await peer.line('committed');
      continue;
    }
    caught++;
    assert.is((failing.reason as { code: string }).code, 'LEASE_EXPIRED');
    await new Promise((resolve) => setTimeout(resolve, 20));
    // Stopped inside a piece, the pages stay with the session until it has left; stopped outside, they are free already.
    assert.is(receiver.stats().draining, outcome === '' ? 1 : 0);
    if (outcome === '') peer.child.kill('SIGCONT');
    await until(() => outcome !== '', 'the pages to come back');
    assert.is(outcome, 'LEASE_EXPIRED');
    poison(target);
    peer.child.kill('SIGCONT');
    await peer.line('failed');
    assert.ok(isPoisoned(target), 'a late write landed');
  }
  assert.ok(caught > 0);
  await peer.kill();
}));

test('decode is killed: prefill\'s session aborts at once', async () => {
  const source = newArena(BIG, BIG_PAGES);
  const pages = pageRange(0, BIG_PAGES);
  fillCanonical(source, pages, [0, 64], 1);
  const sender = createHandoffSender(endpoint(source, systemClock));
  for (const step of ['opened', 'pushing', 'pushed', 'committing']) {
    const address = freshAddress();
    const peer = new Peer(['decode', address, '60000']);
    const ticket = JSON.parse((await peer.line('ticket')).slice('ticket '.length)) as HandoffTicket;
    const session = await sender.open(ticket);
    const pushes = step === 'opened' ? [] : Array.from({ length: BIG.layers }, (_, layer) => session.push([layer, layer + 1], BIG_TOKENS, pages));
    if (step === 'pushed' || step === 'committing') await Promise.all(pushes);
    if (step === 'committing') peer.child.kill('SIGSTOP');
    const committing = step === 'committing' ? failure(session.commit({ firstTokens: [sampled(1)], prefill: stats(1) })) : null;
    await peer.kill();
    await until(() => session.aborted.aborted, 'the abort', 5000);
    assert.is((session.aborted.reason as { code: string }).code, 'HANDOFF_FAILED');
    assert.match((session.aborted.reason as Error).message, /decode at .* is gone/);
    await Promise.allSettled(pushes);
    if (committing) assert.is((await committing).code, 'HANDOFF_FAILED');
    assert.is((await failure(session.push([0, 1], BIG_TOKENS, pages))).code, 'HANDOFF_FAILED');
  }
  await sender.close();
  source.close();
});

test('decode is stopped: prefill\'s lease on it runs out', async () => {
  const source = newArena(BIG, BIG_PAGES);
  const sender = createHandoffSender(endpoint(source, systemClock));
  const peer = new Peer(['decode', freshAddress(), '300']);
  const session = await sender.open(JSON.parse((await peer.line('ticket')).slice('ticket '.length)) as HandoffTicket);
  peer.child.kill('SIGSTOP');
  await until(() => session.aborted.aborted, 'the abort');
  assert.is((session.aborted.reason as { code: string }).code, 'LEASE_EXPIRED');
  await peer.kill();
  await sender.close();
  source.close();
});

const NAMESPACES = ['unshare', '--user', '--map-root-user', '--net', '--pid', '--fork', '--kill-child'];
const hasNamespaces = spawnSync(NAMESPACES[0]!, [...NAMESPACES.slice(1), 'true']).status === 0;
if (!hasNamespaces) console.log('skipping namespaces: this process may not make any');
(hasNamespaces ? test : test.skip)('prefill in another network and PID namespace hands off the same way', () => withReceiver(async (receiver) => {
  const peer = new Peer(['prefill', receiver.address, 'none'], NAMESPACES);
  await peer.line('ready');
  const { ticket, committed } = receiver.open(bigGrant());
  peer.tell(ticket);
  assert.is((await committed).path, 'shm');
  assert.is(findDifference(target, BIG_TARGET_PAGES, [0, 200], 1), null);
  const second = receiver.open(bigGrant());
  peer.child.kill('SIGKILL');
  await peer.ended;
  receiver.cancel(second.ticket.session);
  await failure(second.committed);
}));

test('a truncated hand-off, and one that left old bytes in place, are caught by their checksums', async () => {
  const layout = smallLayout();
  const source = newArena(layout, 16);
  const scratch = newArena(layout, 16);
  const small = newArena(layout, 16);
  const pages = pageRange(0, 7);
  const tokens: [number, number] = [0, 100];
  fillCanonical(source, pages, tokens, 1);
  // What decode's pages still hold: a previous request of the same shape.
  fillCanonical(small, pages, tokens, 2);
  const receiver = await createHandoffReceiver(freshAddress(), endpoint(small, systemClock));
  const put = { src: source, layers: [0, LAYERS] as [number, number], tokens, srcPages: [pages], dstPages: [pages] };
  const { checksums } = await native().kvPut({ ...put, dst: scratch });
  for (const written of [{ layers: [0, LAYERS - 1] as [number, number] }, { tokens: [0, 99] as [number, number] }, { tokens: [16, 100] as [number, number] }]) {
    const heard: Message[] = [];
    const fds: number[] = [];
    const channel = await native().connectChannel(receiver.address.slice('unix:'.length), {
      onMessage: (_channel, bytes, received) => { heard.push(decodeMessage(bytes)); fds.push(...received); },
      onClose: () => {},
    });
    const say = (message: Message) => channel.send(encodeMessage(message));
    fillCanonical(small, pages, tokens, 2);
    const { ticket, committed } = receiver.open({ tokens, pages: [pages], leaseMs: 60_000 });
    say({ type: 'hello', handshake: handshake(layout) });
    say({ type: 'open', session: ticket.session, path: 'shm' });
    await until(() => heard.some(({ type }) => type === 'granted'), 'the grant');
    const region = native().mapKvRegion(layout, 16, fds.slice(1));
    await native().kvPut({ ...put, ...written, dst: region });
    say({ type: 'pushed', session: ticket.session, layers: [0, LAYERS], tokens, checksums });
    say({ type: 'commit', session: ticket.session, pushes: 1, sinceMs: 1, firstTokens: [], prefill: stats(100) });
    assert.is((await failure(committed)).code, 'CHECKSUM_MISMATCH');
    region.close();
    channel.close();
    fds.forEach((fd) => closeSync(fd));
  }
  await receiver.close();
  for (const arena of [source, scratch, small]) arena.close();
});

test.run();
