import { setTimeout as sleep } from 'node:timers/promises';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../../src/errors.js';
import type { KvForm } from '../../../src/native/types.js';
import { expectedText, nextToken, promptOf } from '../fake_model.js';
import { Client, createRig, FakeStore, request, type Rig } from './fakes.js';

const FORMS: [KvForm, number][] = [['mla', 1], ['tpla', 2], ['dcp', 2], ['dcp', 3], ['dp', 2]];

function atRest({ worker, space }: Rig): void {
  assert.is(space.counts.used, 0, 'every page is given back');
  assert.equal(space.check(), []);
  assert.is(worker.running, 0);
  assert.is(worker.waiting, 0);
  assert.is(worker.counters.accountingErrors, 0);
}

async function rejection(promise: Promise<unknown>): Promise<TplaError> {
  try {
    await promise;
  } catch (error) {
    return error as TplaError;
  }
  throw new Error('expected a rejection');
}

for (const [form, ranks] of FORMS) {
  test(`${form} over ${ranks}: one request, all events in order`, async () => {
    const rig = createRig({ form, ranks, pages: 8 });
    const prompt = promptOf(100);
    const client = new Client(rig, request(prompt, { max_tokens: 40 }));
    await client.ended;
    assert.equal(client.text(), expectedText(prompt, 40));
    assert.equal([...new Set(client.events.map(({ event }) => event))], ['reserved', 'landed', 'token', 'finish', 'done']);
    assert.is(client.find('finish')!.reason, 'length');
    assert.equal(client.find('reserved')!.ticket!.tokens, [0, 100]);
    const { decode } = client.find('done')!;
    assert.is(decode.tokens, 40);
    assert.is(decode.attention, form);
    assert.is(decode.ranks, ranks);
    atRest(rig);
    await rig.worker.close();
  });
}

test('many requests of mixed lengths share steps and all give their pages back', async () => {
  for (const [form, ranks] of FORMS) {
    const rig = createRig({ form, ranks, pages: 200 });
    const clients = Array.from({ length: 32 }, (_, i) => new Client(rig, request(promptOf(1 + (i * 37) % 400, i), { max_tokens: 1 + (i * 13) % 90 }), { landAfterMs: i % 7 }));
    await Promise.all(clients.map(({ ended }) => ended));
    for (const client of clients) assert.equal(client.text(), expectedText(client.request.tokens, client.request.max_tokens));
    assert.ok(Math.max(...rig.engine.rowsPerStep) > 16, 'sequences ran together');
    atRest(rig);
    await rig.worker.close();
  }
});

test('a stop token ends a choice and is reported', async () => {
  const rig = createRig({ pages: 8 });
  const prompt = promptOf(10);
  const text = expectedText(prompt, 30);
  const stop = text[7]!;
  const client = new Client(rig, request(prompt, { max_tokens: 30, stop_token_ids: [VOCAB_UNUSED, stop] }));
  await client.ended;
  assert.equal(client.text(), text.slice(0, text.indexOf(stop) + 1));
  assert.is(client.find('finish')!.reason, 'stop');
  atRest(rig);
  await rig.worker.close();
});
const VOCAB_UNUSED = 1_000_000;

test('the context ends a choice with reason length', async () => {
  const rig = createRig({ pages: 8, settings: { contextLength: 120 } });
  const client = new Client(rig, request(promptOf(100), { max_tokens: 1000 }));
  await client.ended;
  assert.is(client.text().length, 20);
  assert.is(client.find('finish')!.reason, 'length');
  await rig.worker.close();
});

test('a prompt seen before is shared up to its last full block', async () => {
  for (const [form, ranks] of FORMS) {
    const rig = createRig({ form, ranks, pages: 16 });
    const prompt = promptOf(150);
    const first = new Client(rig, request(prompt));
    await first.ended;
    const longer = [...prompt.slice(0, 140), ...promptOf(60, 5)];
    const second = new Client(rig, request(longer));
    await second.ended;
    assert.is(second.find('reserved')!.cached_tokens, 128);
    assert.equal(second.find('reserved')!.ticket!.tokens, [128, 200]);
    assert.equal(second.text(), expectedText(longer, 16));
    assert.ok(rig.space.counts.cached >= 2);
    atRest(rig);
    await rig.worker.close();
  }
});

test('requests that run at the same time share pages', async () => {
  const rig = createRig({ pages: 8, settings: { maxBatch: 8 } });
  const prompt = promptOf(64 * 4);
  await new Client(rig, request(prompt, { max_tokens: 1 })).ended;
  const clients = Array.from({ length: 3 }, (_, i) => new Client(rig, request([...prompt, i], { max_tokens: 30 })));
  await Promise.all(clients.map(({ ended }) => ended));
  for (const client of clients) {
    assert.is(client.find('reserved')!.cached_tokens, 256);
    assert.equal(client.text(), expectedText(client.request.tokens, 30));
  }
  assert.ok(Math.max(...rig.engine.rowsPerStep) === 3, 'eight pages hold three sequences of five because four are shared');
  atRest(rig);
  await rig.worker.close();
});

test('a prompt that is cached whole needs no hand-off, and its cached block stays as it was', async () => {
  for (const [form, ranks] of FORMS) {
    const rig = createRig({ form, ranks, pages: 16 });
    const prompt = promptOf(128);
    await new Client(rig, request(prompt)).ended;
    const { tokens, positions } = rig.memory;
    const before = [...tokens.entries()].filter(([row, token]) => token > 0 && positions[row]! < 128);
    for (const n of [1, 3]) {
      const again = new Client(rig, request(prompt, { n, max_tokens: 70 }));
      await again.ended;
      assert.is(again.find('reserved')!.ticket, null);
      assert.is(again.find('landed'), undefined);
      for (let index = 0; index < n; index++) assert.equal(again.text(index), expectedText(prompt, 70));
    }
    assert.is(before.length, 128);
    for (const [row, token] of before) assert.is(tokens[row], token);
    atRest(rig);
    await rig.worker.close();
  }
});

for (const [form, ranks] of FORMS) {
  test(`${form} over ${ranks}: decode draws the first token itself where it is told to, and leaves the blocks of the prompt as they landed`, async () => {
    const rig = createRig({ form, ranks, pages: 24, settings: { firstToken: 'decode' } });
    for (const length of [1, 63, 64, 128, 100]) {
      const prompt = promptOf(length, length);
      const client = new Client(rig, request(prompt, { max_tokens: 10, n: 2 }), { firstToken: 0 });
      await client.ended;
      assert.equal(client.text(), expectedText(prompt, 10), `${length} tokens`);
      assert.equal([...new Set(client.events.map(({ event }) => event))], ['reserved', 'landed', 'token', 'finish', 'done']);
      const again = new Client(rig, request(prompt, { max_tokens: 10 }));
      await again.ended;
      assert.equal(again.text(), expectedText(prompt, 10));
    }
    atRest(rig);
    await rig.worker.close();
  });
}

test('choices share the prompt and copy its last partial page', async () => {
  for (const [form, ranks] of FORMS) {
    const rig = createRig({ form, ranks, pages: 32 });
    const prompt = promptOf(100);
    const client = new Client(rig, request(prompt, { n: 4, max_tokens: 80 }));
    await client.ended;
    for (let index = 0; index < 4; index++) assert.equal(client.text(index), expectedText(prompt, 80));
    assert.is(rig.copies, 3, 'the last choice keeps the original');
    assert.is(client.find('done')!.decode.tokens, 320);
    atRest(rig);
    await rig.worker.close();
  }
});

test('a client that goes away frees its pages, wherever its request is', async () => {
  const rig = createRig({ pages: 40, settings: { maxBatch: 6 } });
  let state = 7;
  const random = (below: number) => { state = (Math.imul(state, 1103515245) + 12345) >>> 0; return (state >>> 8) % below; };
  const clients = Array.from({ length: 60 }, (_, i) => {
    const client = new Client(rig, request(promptOf(1 + random(300), i), { max_tokens: 1 + random(60), n: 1 + random(3) }), { landAfterMs: random(10) });
    client.ended.catch(() => {});
    if (i % 2 === 0) setTimeout(() => client.gone.abort(), random(40));
    return client;
  });
  const results = await Promise.allSettled(clients.map(({ ended }) => ended));
  let finished = 0;
  results.forEach(({ status }, i) => {
    const client = clients[i]!;
    if (status === 'rejected' || client.find('error')) {
      assert.is(i % 2, 0, 'only who left was cut off');
      return;
    }
    finished++;
    for (let index = 0; index < client.request.n; index++) assert.equal(client.text(index), expectedText(client.request.tokens, client.request.max_tokens));
  });
  assert.ok(finished >= 30);
  await sleep(5);
  atRest(rig);
  await rig.worker.close();
});

test('a hand-off that fails, fails its request alone and leaks no page', async () => {
  const rig = createRig({ pages: 8 });
  const healthy = new Client(rig, request(promptOf(50), { max_tokens: 50 }));
  const broken = new Client(rig, request(promptOf(90, 1)), { land: false });
  await sleep(2);
  rig.receiver.fail(broken.find('reserved')!.ticket!.session, new TplaError('HANDOFF_FAILED', 'the prefill worker died'));
  await broken.ended;
  assert.is(broken.find('error')!.error.code, 'HANDOFF_FAILED');
  assert.is(broken.find('error')!.retryable, true);
  await healthy.ended;
  assert.equal(healthy.text(), expectedText(healthy.request.tokens, 50));
  atRest(rig);
  await rig.worker.close();
});

test('pages of a cancelled hand-off stay reserved until the receiver says that no write can come', async () => {
  const rig = createRig({ pages: 4 });
  rig.receiver.cancel = () => {};
  const client = new Client(rig, request(promptOf(200)), { land: false });
  await sleep(2);
  client.gone.abort();
  await client.ended;
  await sleep(2);
  assert.is(rig.space.counts.used, 4);
  rig.receiver.fail(client.find('reserved')!.ticket!.session, new TplaError('CANCELLED', 'settled'));
  await rig.worker.drain();
  atRest(rig);
  await rig.worker.close();
});

test('a client hears of a failed hand-off before its pages are safe', async () => {
  const rig = createRig({ pages: 4 });
  const client = new Client(rig, request(promptOf(100)), { land: false });
  await sleep(2);
  const { session } = client.find('reserved')!.ticket!;
  rig.receiver.open_.get(session)!.failing.abort(new TplaError('LEASE_EXPIRED', 'prefill was silent'));
  await client.ended;
  assert.is(client.find('error')!.error.code, 'LEASE_EXPIRED');
  assert.is(rig.space.counts.used, 2);
  rig.receiver.fail(session, new TplaError('LEASE_EXPIRED', 'prefill was silent'));
  await rig.worker.drain();
  atRest(rig);
  assert.is(rig.worker.counters.failed, 1);
  await rig.worker.close();
});

test('an engine that fails ends the step\'s requests; the next run', async () => {
  const rig = createRig({ pages: 8 });
  rig.engine.failNext = true;
  const broken = new Client(rig, request(promptOf(10)));
  await broken.ended;
  assert.is(broken.find('error')!.error.code, 'INTERNAL');
  const next = new Client(rig, request(promptOf(10)));
  await next.ended;
  assert.equal(next.text(), expectedText(promptOf(10), 16));
  atRest(rig);
  await rig.worker.close();
});

test('one choice can be stopped while the others go on', async () => {
  const rig = createRig({ pages: 32 });
  const prompt = promptOf(30);
  const client = new Client(rig, request(prompt, { n: 2, max_tokens: 400 }));
  while (client.text(1).length < 5) await sleep(1);
  rig.worker.stop(client.request.id, 1);
  rig.worker.stop(client.request.id, 9);
  rig.worker.stop('nobody', 0);
  await client.ended;
  assert.equal(client.text(0), expectedText(prompt, 400));
  assert.ok(client.text(1).length < 400);
  const finished = client.events.filter((event) => event.event === 'finish');
  assert.equal(finished, [{ event: 'finish', index: 1, reason: 'stop' }, { event: 'finish', index: 0, reason: 'length' }]);
  atRest(rig);
  await rig.worker.close();
});

// ---------------------------------------------------------------- running out of pages

for (const [form, ranks] of FORMS) {
  test(`${form} over ${ranks}: preempted to the pool and resumed, the text is the same`, async () => {
    const rig = createRig({ form, ranks, pages: 12 / (form === 'dcp' ? ranks : 1), store: (memory) => new FakeStore(memory) });
    const clients = Array.from({ length: 8 }, (_, i) => new Client(rig, request(promptOf(90 + i * 11, i), { max_tokens: 300 })));
    await Promise.all(clients.map(({ ended }) => ended));
    for (const client of clients) assert.equal(client.text(), expectedText(client.request.tokens, 300));
    assert.ok(rig.worker.counters.preemptions > 0, 'there were too few pages for all');
    assert.is(rig.worker.counters.recomputedTokens, 0);
    assert.ok(clients.some((client) => client.find('done')!.decode.preemptions > 0));
    assert.is(rig.store!.pinned, 0);
    atRest(rig);
    await rig.worker.close();
  });

  test(`${form} over ${ranks}: without a pool nobody is preempted, nobody fails and nothing deadlocks`, async () => {
    const rig = createRig({ form, ranks, pages: 12 / (form === 'dcp' ? ranks : 1) });
    const clients = Array.from({ length: 8 }, (_, i) => new Client(rig, request(promptOf(90 + i * 11, i), { max_tokens: 300, n: 1 + (i % 2) })));
    await Promise.all(clients.map(({ ended }) => ended));
    for (const client of clients) for (let index = 0; index < client.request.n; index++) assert.equal(client.text(index), expectedText(client.request.tokens, 300));
    assert.is(rig.worker.counters.preemptions, 0);
    atRest(rig);
    await rig.worker.close();
  });
}

for (const reland of [true, false]) {
  test(`what the pool loses is computed again by ${reland ? 'a prefill worker' : 'decode itself'}, and no request fails`, async () => {
    for (const [form, ranks] of FORMS) {
      const rig = createRig({ form, ranks, pages: 12 / (form === 'dcp' ? ranks : 1), store: (memory) => new FakeStore(memory) });
      const clients = Array.from({ length: 8 }, (_, i) => new Client(rig, request(promptOf(90 + i * 11, i), { max_tokens: 300 }), { reland }));
      while (rig.store!.parks < 2) await sleep(1);
      rig.store!.connected = false;
      await Promise.all(clients.map(({ ended }) => ended));
      for (const client of clients) assert.equal(client.text(), expectedText(client.request.tokens, 300));
      const { relandedTokens, recomputedTokens } = rig.worker.counters;
      assert.ok(reland ? relandedTokens > 0 && recomputedTokens === 0 : relandedTokens === 0 && recomputedTokens > 0, `${relandedTokens} relanded, ${recomputedTokens} recomputed`);
      atRest(rig);
      await rig.worker.close();
    }
  });
}

test('blocks into which decode has written are not passed off as what prefill computes', async () => {
  for (const [form, ranks, shareable] of [['mla', 1, 2], ['tpla', 2, 1]] as [KvForm, number, number][]) {
    const rig = createRig({ form, ranks, pages: 12, store: (memory) => new FakeStore(memory) });
    const prompt = promptOf(128);
    await new Client(rig, request(prompt, { max_tokens: 1 })).ended;
    const clients = Array.from({ length: 6 }, () => new Client(rig, request(prompt, { max_tokens: 300 })));
    await Promise.all(clients.map(({ ended }) => ended));
    for (const client of clients) {
      assert.is(client.find('reserved')!.ticket, null, 'its last token goes through a decode step, into a copy of the last block');
      assert.equal(client.text(), expectedText(prompt, 300));
    }
    assert.ok(rig.store!.named.length > 0);
    for (const named of rig.store!.named) assert.is(named, shareable);
    atRest(rig);
    await rig.worker.close();
  }
});

test('a pool with room for little is filled, and the rest computed again', async () => {
  const rig = createRig({ pages: 12, store: (memory) => new FakeStore(memory, 3) });
  const clients = Array.from({ length: 8 }, (_, i) => new Client(rig, request(promptOf(90 + i * 11, i), { max_tokens: 300 })));
  await Promise.all(clients.map(({ ended }) => ended));
  for (const client of clients) assert.equal(client.text(), expectedText(client.request.tokens, 300));
  assert.ok(rig.worker.counters.relandedTokens > 0);
  atRest(rig);
  await rig.worker.close();
});

test('the more important and the older are preempted last', async () => {
  const rig = createRig({ pages: 10, store: (memory) => new FakeStore(memory) });
  const old = new Client(rig, request(promptOf(60, 1), { max_tokens: 350 }));
  const batch = new Client(rig, request(promptOf(60, 2), { max_tokens: 350, qos: 'batch' }));
  const urgent = new Client(rig, request(promptOf(60, 3), { max_tokens: 350, qos: 'interactive' }));
  await Promise.all([old, batch, urgent].map(({ ended }) => ended));
  assert.is(urgent.find('done')!.decode.preemptions, 0);
  assert.ok(batch.find('done')!.decode.preemptions > 0);
  for (const client of [old, batch, urgent]) assert.equal(client.text(), expectedText(client.request.tokens, 350));
  atRest(rig);
  await rig.worker.close();
});

test('clients that leave while preempted leave nothing in the pool', async () => {
  const rig = createRig({ pages: 12, store: (memory) => new FakeStore(memory) });
  const clients = Array.from({ length: 8 }, (_, i) => new Client(rig, request(promptOf(90 + i * 11, i), { max_tokens: 300 })));
  while (rig.store!.parks < 2) await sleep(1);
  clients.slice(2).forEach(({ gone }) => gone.abort());
  await Promise.allSettled(clients.map(({ ended }) => ended));
  for (const client of clients.slice(0, 2)) assert.equal(client.text(), expectedText(client.request.tokens, 300));
  assert.is(rig.store!.pinned, 0);
  atRest(rig);
  await rig.worker.close();
});

// ---------------------------------------------------------------- refusals

test('what can never run is refused with a reason', async () => {
  const rig = createRig({ pages: 4, settings: { maxBatch: 2, contextLength: 1000 } });
  const refused = async (fields: Parameters<typeof request>[1], tokens = promptOf(10)) => rejection(new Client(rig, request(tokens, fields)).ended);
  const pages = await refused({}, promptOf(256));
  assert.is(pages.code, 'CONTEXT_LENGTH_EXCEEDED');
  assert.match(pages.message, '256 tokens');
  assert.match(pages.message, 'raise kv.pages');
  assert.match((await refused({}, promptOf(1000))).message, "model's context is 1000");
  assert.match((await refused({ n: 3 })).message, 'at most 2');
  assert.match((await refused({}, [5, 999])).message, 'token 999');
  atRest(rig);
  await rig.worker.close();
});

test('who waits for pages is limited, in order, and may leave', async () => {
  const rig = createRig({ pages: 4, settings: { maxWaiting: 2 } });
  const first = new Client(rig, request(promptOf(200), { max_tokens: 20 }), { land: false });
  const leaves = new Client(rig, request(promptOf(200, 1), { max_tokens: 20 }));
  const waits = new Client(rig, request(promptOf(200, 2), { max_tokens: 20 }));
  await sleep(2);
  assert.is(rig.worker.waiting, 2);
  assert.is((await rejection(new Client(rig, request(promptOf(10))).ended)).code, 'OVERLOADED');
  leaves.gone.abort();
  assert.is((await rejection(leaves.ended)).code, 'CANCELLED');
  rig.receiver.land(first.find('reserved')!.ticket!, first.request.tokens, 1);
  await Promise.all([first.ended, waits.ended]);
  assert.equal(waits.text(), expectedText(waits.request.tokens, 20));
  atRest(rig);
  await rig.worker.close();
});

test('drain finishes what runs and refuses what comes', async () => {
  const rig = createRig({ pages: 8 });
  const client = new Client(rig, request(promptOf(50), { max_tokens: 100 }));
  await sleep(2);
  const drained = rig.worker.drain();
  assert.is((await rejection(new Client(rig, request(promptOf(5))).ended)).code, 'DRAINING');
  await drained;
  assert.equal(client.text(), expectedText(client.request.tokens, 100));
  atRest(rig);
  await rig.worker.close();
});

test('close ends everything with DRAINING', async () => {
  const rig = createRig({ pages: 8, store: (memory) => new FakeStore(memory) });
  const running = new Client(rig, request(promptOf(50), { max_tokens: 400 }));
  const landing = new Client(rig, request(promptOf(50)), { land: false });
  while (running.text().length < 3) await sleep(1);
  await rig.worker.close();
  await Promise.all([running.ended, landing.ended]);
  await sleep(2);
  for (const client of [running, landing]) assert.is(client.find('error')!.error.code, 'DRAINING');
  atRest(rig);
});

test('the fake itself notices a wrong row', () => {
  assert.is.not(nextToken([1, 2, 3]), nextToken([1, 3, 2]));
});

test.run();
