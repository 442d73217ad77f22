import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import { endpoint, newArena, pageRange, smallLayout, stats, until } from '../support/handoff.js';
import { xorshift } from '../native/kv_reference.js';

const directory = mkdtempSync(join(tmpdir(), 'tpla-leaks-'));
test.after(() => rmSync(directory, { recursive: true }));

test('10,000 hand-offs with random cancels, failures and reconnects leak no page, descriptor or mapping', async () => {
  const source = newArena(smallLayout({ latent: 16, layers: 2 }), 64);
  const target = newArena(smallLayout({ latent: 16, layers: 2, form: 'tpla', ranks: 2 }), 64);
  const address = `unix:${join(directory, 'decode.sock')}`;
  const receiver = await createHandoffReceiver(address, endpoint(target));
  const free = Array.from({ length: 64 }, (_, page) => page);
  const random = xorshift(7);
  const outcomes: Record<string, number> = {};
  let sender = createHandoffSender(endpoint(source));
  const footprint = () => ({
    fds: readdirSync('/proc/self/fd').length,
    mappings: readFileSync('/proc/self/maps', 'utf8').split('\n').filter((line) => line.includes('memfd:tpla')).length,
  });

  const handoff = async () => {
    const tokens: [number, number] = [0, 32];
    const pages = Int32Array.from(free.splice(0, 2));
    const { ticket, committed } = receiver.open({ tokens, pages: [pages], leaseMs: 60_000 });
    const settled = committed.then(() => 'committed', (error: { code: string }) => error.code);
    const fate = random() % 8;
    const work = (async () => {
      const session = await sender.open(ticket);
      if (fate === 1) setImmediate(() => receiver.cancel(ticket.session));
      if (fate === 2) return session.fail('random');
      await Promise.all([session.push([0, 1], tokens, pageRange(0, 2)), session.push([1, 2], tokens, pageRange(0, 2))]);
      if (fate === 3) receiver.cancel(ticket.session);
      await session.commit({ firstTokens: [], prefill: stats(32) });
    })();
    if (fate === 0) receiver.cancel(ticket.session);
    // A hand-off that prefill could not open is decode's to cancel, as route would tell it.
    await work.catch(() => receiver.cancel(ticket.session));
    const outcome = await settled;
    outcomes[outcome] = (outcomes[outcome] ?? 0) + 1;
    free.push(...pages);
  };

  const rounds = async (count: number) => {
    for (let done = 0; done < count; done += 20) await Promise.all(Array.from({ length: 20 }, handoff));
  };
  await rounds(400);
  await sender.close();
  sender = createHandoffSender(endpoint(source));
  await rounds(20);
  // The receiver lets go of a connection when it hears of its end, a moment after the sender.
  const settledFootprint = async () => {
    await until(() => footprint().mappings === 7, 'the arenas, one region and one gate to be all there is');
    return footprint();
  };
  const before = await settledFootprint();
  for (let i = 0; i < 10; i++) {
    await rounds(960);
    await sender.close();
    sender = createHandoffSender(endpoint(source));
    await rounds(20);
  }
  assert.equal(await settledFootprint(), before);
  assert.is(new Set(free).size, 64, 'every page came back');
  assert.equal([receiver.stats().open, receiver.stats().draining], [0, 0]);
  assert.ok(outcomes['committed']! > 4000, JSON.stringify(outcomes));
  assert.ok(outcomes['CANCELLED']! > 1000 && outcomes['HANDOFF_FAILED']! > 500, JSON.stringify(outcomes));
  await sender.close();
  await receiver.close();
  source.close();
  target.close();
});


test.run();
