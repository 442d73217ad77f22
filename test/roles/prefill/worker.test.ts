import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../../src/errors.js';
import { promptOf } from '../fake_model.js';
import { Client, createRig, request, type Rig } from './fakes.js';

async function atRest(rig: Rig): Promise<void> {
  await rig.worker.drain();
  assert.is(rig.space.counts.used, 0, 'every page is given back');
  assert.equal(rig.space.check(), []);
  assert.is(rig.worker.counters.accountingErrors, 0);
  assert.is(rig.worker.running + rig.worker.waiting, 0);
  if (rig.store) assert.is(rig.store.pinned, 0);
  await rig.worker.close();
}

async function rejection(promise: Promise<unknown>): Promise<TplaError> {
  try {
    await promise;
  } catch (error) {
    return error as TplaError;
  }
  throw new Error('expected a rejection');
}

test('a prompt is computed in chunks and every layer of every token is pushed once', async () => {
  for (const length of [1, 63, 64, 65, 128, 500]) {
    const rig = createRig({ pages: 8 });
    const client = new Client(rig, request(promptOf(length), { n: 3 }));
    await client.ended;
    assert.is(client.delivered, 'right');
    assert.equal(client.events.map(({ event }) => event), ['started', 'done']);
    const { prefill, transfer } = client.find('done')!;
    assert.equal([prefill.promptTokens, prefill.computedTokens, prefill.pooledTokens, prefill.skippedTokens], [length, length, 0, 0]);
    assert.is(transfer.bytes, length * 96);
    assert.is(rig.engine.steps.length, Math.ceil(length / 128));
    await atRest(rig);
  }
});

test('what decode has already is computed if need be, but not pushed', async () => {
  const rig = createRig({ pages: 8 });
  const client = new Client(rig, request(promptOf(300), { begin: 192 }));
  await client.ended;
  assert.is(client.delivered, 'right');
  assert.is(client.find('done')!.prefill.skippedTokens, 192);
  assert.is(client.find('done')!.transfer.bytes, 108 * 96);
  await atRest(rig);
});

test('several prompts share steps, and a short one does not wait for a long one', async () => {
  const rig = createRig({ pages: 64 });
  const long = new Client(rig, request(promptOf(2000)));
  while (rig.engine.steps.length < 2) await nextTurn();
  const short = new Client(rig, request(promptOf(100, 1)));
  await short.ended;
  assert.is(short.delivered, 'right');
  assert.is(long.find('done'), undefined);
  assert.ok(rig.engine.steps.length < 8);
  await long.ended;
  assert.is(long.delivered, 'right');
  assert.ok(rig.engine.steps.some((step) => step.length === 2));
  await atRest(rig);
});

test('a prefix computed before is taken from the own cache', async () => {
  const rig = createRig({ pages: 16 });
  const prompt = promptOf(320);
  await new Client(rig, request(prompt)).ended;
  await sleep(5);
  const again = new Client(rig, request(prompt, { begin: 64 }));
  await again.ended;
  assert.is(again.delivered, 'right');
  assert.is(again.find('done')!.prefill.pooledTokens, 256, 'all but the last block, of which the last token is needed');
  assert.is(again.find('done')!.prefill.computedTokens, 64);
  await atRest(rig);
});

test('a prefix another worker computed is taken from the pool and pushed on', async () => {
  const rig = createRig({ pages: 16, pool: true });
  const prompt = promptOf(200);
  await new Client(rig, request(prompt)).ended;
  await sleep(5);
  assert.is(rig.store!.blocks.size, 3);

  const other = createRig({ pages: 16, pool: true });
  for (const [id, tokens] of rig.store!.blocks) other.store!.blocks.set(id, tokens);
  const longer = [...prompt, ...promptOf(50, 3)];
  const client = new Client(other, request(longer));
  await client.ended;
  assert.is(client.delivered, 'right');
  assert.is(client.find('done')!.prefill.pooledTokens, 192);
  assert.equal(other.engine.steps, [[58]]);
  await atRest(rig);
  await atRest(other);
});

test('a pool that delivers less than it promised is no failure', async () => {
  const rig = createRig({ pages: 16, pool: true });
  const prompt = promptOf(300);
  await new Client(rig, request(prompt)).ended;
  await sleep(5);
  const other = createRig({ pages: 16, pool: true });
  for (const [id, tokens] of rig.store!.blocks) other.store!.blocks.set(id, tokens);
  const load = other.store!.load.bind(other.store);
  other.store!.load = async (lease, begin, _end, target) => load(lease, begin, begin + 1, target);
  const client = new Client(other, request(prompt));
  await client.ended;
  assert.is(client.delivered, 'right');
  assert.is(client.find('done')!.prefill.pooledTokens, 64);
  await atRest(rig);
  await atRest(other);
});

test('more prompts than pages: they wait their turn and all arrive', async () => {
  const rig = createRig({ pages: 10, pool: true });
  rig.pushTurns = 20;
  const clients = Array.from({ length: 24 }, (_, i) => new Client(rig, request(promptOf(1 + (i * 71) % 600, i % 5), { begin: i % 3 === 0 ? 0 : Math.min(64, (i * 71) % 600) })));
  await Promise.all(clients.map(({ ended }) => ended));
  for (const client of clients) assert.is(client.delivered, 'right');
  await atRest(rig);
});

test('prompts cancelled at any moment disturb nobody and leave no page', async () => {
  let state = 3;
  const random = (below: number) => { state = (Math.imul(state, 1103515245) + 12345) >>> 0; return (state >>> 8) % below; };
  const rig = createRig({ pages: 24, pool: true });
  const clients = Array.from({ length: 60 }, (_, i) => {
    const client = new Client(rig, request(promptOf(1 + random(500), i % 7)));
    client.ended.catch(() => {});
    if (i % 3 === 0) setTimeout(() => client.gone.abort(), random(30));
    if (i % 3 === 1) setTimeout(() => client.session?.abort.abort(new TplaError('HANDOFF_FAILED', 'decode is gone')), random(30));
    return client;
  });
  await Promise.allSettled(clients.map(({ ended }) => ended));
  clients.forEach((client, i) => {
    if (i % 3 === 2) assert.is(client.delivered, 'right');
    else if (!client.find('done')) assert.is(client.session?.committed, undefined);
  });
  await atRest(rig);
});

test('a cancel stops a step that nobody else is in', async () => {
  const rig = createRig({ pages: 16 });
  let open: () => void = () => {};
  rig.engine.gate = () => new Promise((resolve) => { open = resolve; });
  const client = new Client(rig, request(promptOf(100)));
  while (rig.engine.steps.length === 0) await nextTurn();
  client.gone.abort();
  await nextTurn();
  open();
  await client.ended;
  assert.is(rig.engine.flagged, 1);
  assert.is(client.find('error')!.error.code, 'CANCELLED');
  rig.engine.gate = nextTurn;
  await atRest(rig);
});

test('a decode worker that dies fails its hand-off, quickly and alone', async () => {
  const rig = createRig({ pages: 32 });
  const [doomed, healthy] = [new Client(rig, request(promptOf(700))), new Client(rig, request(promptOf(700, 1)))];
  while (rig.engine.steps.length < 2) await nextTurn();
  doomed.session!.abort.abort(new TplaError('HANDOFF_FAILED', 'decode is gone'));
  await Promise.all([doomed.ended, healthy.ended]);
  assert.is(doomed.find('error')!.error.code, 'HANDOFF_FAILED');
  assert.is(doomed.find('error')!.retryable, true);
  assert.is(healthy.delivered, 'right');
  await atRest(rig);
});

test('an engine that fails ends the step\'s prompts; the next is computed', async () => {
  const rig = createRig({ pages: 8 });
  rig.engine.failNext = true;
  const broken = new Client(rig, request(promptOf(50)));
  await broken.ended;
  assert.is(broken.find('error')!.error.code, 'INTERNAL');
  assert.ok(broken.session!.failed !== undefined, 'decode was told');
  const next = new Client(rig, request(promptOf(50)));
  await next.ended;
  assert.is(next.delivered, 'right');
  await atRest(rig);
});

test('what can never run is refused with a reason, and its ticket stays unused', async () => {
  const rig = createRig({ pages: 4, settings: { contextLength: 1000 } });
  const refused = async (fields: Parameters<typeof request>[1], tokens: number[]) => {
    const client = new Client(rig, request(tokens, fields));
    const error = await rejection(client.ended);
    assert.is(client.session, undefined);
    return `${error.code} ${error.message}`;
  };
  assert.match(await refused({}, promptOf(257)), /CONTEXT_LENGTH_EXCEEDED .*raise kv\.pages/);
  assert.match(await refused({}, promptOf(1001)), /CONTEXT_LENGTH_EXCEEDED .*context is 1000/);
  assert.match(await refused({}, [5, 999]), /REQUEST_INVALID .*token 999/);
  assert.match(await refused({ begin: 10 }, promptOf(10)), /REQUEST_INVALID .*ticket/);
  await atRest(rig);
});

test('who waits is limited', async () => {
  const rig = createRig({ pages: 2, settings: { maxWaiting: 2 } });
  const clients = Array.from({ length: 3 }, (_, i) => new Client(rig, request(promptOf(100, i))));
  assert.is((await rejection(new Client(rig, request(promptOf(10))).ended)).code, 'OVERLOADED');
  await Promise.all(clients.map(({ ended }) => ended));
  await atRest(rig);
});

test('drain finishes what was taken in; close ends it with DRAINING', async () => {
  const rig = createRig({ pages: 32 });
  const client = new Client(rig, request(promptOf(900)));
  await nextTurn();
  await nextTurn();
  const drained = rig.worker.drain();
  assert.is((await rejection(new Client(rig, request(promptOf(5))).ended)).code, 'DRAINING');
  await drained;
  assert.is(client.delivered, 'right');
  await rig.worker.close();

  const other = createRig({ pages: 32 });
  const cut = new Client(other, request(promptOf(900)));
  while (other.engine.steps.length === 0) await nextTurn();
  await other.worker.close();
  await cut.ended;
  assert.is(cut.find('error')!.error.code, 'DRAINING');
  assert.is(other.space.counts.used, 0);
});

test.run();
