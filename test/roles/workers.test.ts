// time limit: 400 s
/** serve-prefill, serve-decode and kv-pool together: real processes, real hand-offs, real faults. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { WorkerState } from '../../src/fleet/protocol.js';
import type { PoolState } from '../../src/kv/pool_protocol.js';
import type { KvForm } from '../../src/native/types.js';
import { TINY_V3, writeCheckpoint } from '../support/checkpoint.js';
import { eventually, type RoleProcess } from '../support/role_process.js';
import { atRest, generate, LAYERS, promptOf, WorkerStack, type GenerateOptions, type Generated } from '../support/worker_stack.js';

const stack = new WorkerStack();

async function code(promise: Promise<unknown>): Promise<string> {
  try {
    await promise;
    return 'fine';
  } catch (error) {
    return (error as { code?: string }).code ?? String(error);
  }
}

// ---------------------------------------------------------------- a healthy pair

const pair = suite('a prefill and a decode worker');
let prefill: RoleProcess;
let decode: RoleProcess;
const run = (tokens: number[], options?: GenerateOptions): Promise<Generated> => generate(prefill.client, decode.client, tokens, options);

pair.before(async () => {
  [prefill, decode] = await Promise.all([stack.start('prefill', stack.prefillConfig()), stack.start('decode', stack.decodeConfig())]);
});
pair.after(() => stack.stop(prefill, decode));

pair('a prompt goes in, its KV goes over, tokens come out', async () => {
  const { text, reasons, prefill: stats, transfer, report } = await run(promptOf(700), { maxTokens: 20 });
  assert.is(text[0]!.length, 20);
  assert.equal(reasons, ['length']);
  assert.equal([stats!.promptTokens, stats!.computedTokens, stats!.pooledTokens, stats!.skippedTokens], [700, 700, 0, 0]);
  assert.is(transfer!.path, 'shm');
  // Latent 32 in two slices and rope 8 on both ranks, f32.
  assert.is(transfer!.bytes, 700 * LAYERS * 2 * (16 + 8) * 4);
  assert.equal([report.attention, report.ranks, report.tokens, report.kv_bytes_per_token_per_rank], ['tpla', 2, 20, LAYERS * (16 + 8) * 4]);
  await atRest(prefill, decode);
});

pair('decode workers that pull, draw the first token themselves, or take KV over TCP say the same', async () => {
  const attention = { form: 'mla' as const, ranks: 1 };
  const [pushed, pulled, remote] = await Promise.all([
    stack.start('decode', stack.decodeConfig({ listen: stack.address('pushed'), handoff_listen: stack.address('pushed-kv'), attention })),
    stack.start('decode', stack.decodeConfig({ listen: stack.address('pulled'), handoff_listen: stack.address('pulled-kv'), attention, handoff_direction: 'pull', first_token: 'decode' })),
    stack.start('decode', stack.decodeConfig({ listen: stack.address('remote'), handoff_listen: 'tcp://127.0.0.1:0', attention })),
  ]);
  for (const length of [1, 64, 300]) {
    const expected = await generate(prefill.client, pushed.client, promptOf(length));
    for (const [worker, path] of [[pulled, 'shm'], [remote, 'tcp']] as const) {
      const found = await generate(prefill.client, worker.client, promptOf(length));
      assert.equal(found.text, expected.text);
      assert.is(found.transfer!.bytes, expected.transfer!.bytes);
      assert.is(found.transfer!.path, path);
    }
  }
  await atRest(prefill, pulled);
  await atRest(prefill, remote);
  await stack.stop(pushed, pulled, remote);
});

pair('/state, /health and /metrics say what is there', async () => {
  const state = await decode.state<WorkerState>();
  assert.is(state.role, 'decode');
  assert.is(state.context_length, 4096);
  assert.is(state.pages.total, 256);
  assert.is(state.page_tokens, 64);
  assert.is(state.model.name, 'tiny');
  assert.equal(state.attention, { form: 'tpla', ranks: 2, dtype: 'f32', kv_bytes_per_token_per_rank: LAYERS * 24 * 4 });
  assert.is((await prefill.state<WorkerState>()).model.fingerprint, state.model.fingerprint);
  assert.equal(await decode.client.json('GET', '/health'), { status: 'ok' });
  for (const name of ['tpla_decode_tokens_total', 'tpla_decode_pages_used 0', 'tpla_decode_step_seconds_count', 'tpla_decode_landed_bytes_total{path="shm"}', 'tpla_decode_handoffs_open 0']) assert.match(await decode.client.text('/metrics'), name);
  for (const name of ['tpla_prefill_computed_tokens_total', 'tpla_prefill_step_seconds_count']) assert.match(await prefill.client.text('/metrics'), name);
});

pair('32 streams of mixed lengths at a time: each as if alone, every page returned', async () => {
  const requests = Array.from({ length: 32 }, (_, i) => ({ tokens: promptOf(1 + (i * 97) % 1200, i), maxTokens: 1 + (i * 29) % 70, n: 1 + (i % 9 === 0 ? 2 : 0) }));
  const together = await Promise.all(requests.map(({ tokens, ...options }) => run(tokens, options)));
  await atRest(prefill, decode);
  for (const i of [0, 5, 11, 18, 31]) assert.equal(together[i]!.text, (await run(requests[i]!.tokens, requests[i]!)).text);
  together.forEach(({ text, report }, i) => {
    assert.equal(text.map(({ length }) => length), Array.from({ length: requests[i]!.n }, () => requests[i]!.maxTokens));
    assert.is(report.tokens, requests[i]!.n * requests[i]!.maxTokens);
  });
  await atRest(prefill, decode);
});

pair('choices draw different streams from one seed, the same ones every time', async () => {
  const sampling = { temperature: 1.2, seed: '42', logprobs: 2 };
  const [first, second, other] = await Promise.all([
    run(promptOf(90), { n: 3, sampling }), run(promptOf(90), { n: 3, sampling }), run(promptOf(90), { n: 3, sampling: { ...sampling, seed: '43' } }),
  ]);
  assert.equal(first.text, second.text);
  assert.is.not(JSON.stringify(first.text), JSON.stringify(other.text));
  assert.is(new Set(first.text.map(String)).size, 3);
  for (const { logprob, top } of first.tokens.flat()) {
    assert.ok(logprob <= 0);
    assert.is(top.length, 2);
  }
});

pair('a prompt seen before is not sent again', async () => {
  const prompt = promptOf(400, 103);
  const cold = await run(prompt);
  const warm = await run(prompt);
  assert.is(cold.cachedTokens, 0);
  assert.is(warm.cachedTokens, 384);
  assert.is(warm.prefill!.computedTokens, 16);
  assert.equal(warm.text, cold.text);
  assert.ok(warm.transfer!.bytes < cold.transfer!.bytes / 10);
  const whole = promptOf(320, 104);
  await run(whole);
  const again = await run(whole);
  assert.is(again.cachedTokens, 320);
  assert.is(again.transfer, null, 'all of it is there: no hand-off');
  assert.is(again.text[0]!.length, 16);
  await atRest(prefill, decode);
});

pair('a stop token ends the text, the context as well', async () => {
  const free = await run(promptOf(50), { maxTokens: 30 });
  const stop = free.text[0]![9]!;
  const stopped = await run(promptOf(50), { maxTokens: 30, stop: [stop] });
  assert.equal(stopped.text[0], free.text[0]!.slice(0, free.text[0]!.indexOf(stop) + 1));
  assert.equal(stopped.reasons, ['stop']);
  const long = await run(promptOf(4090), { maxTokens: 100 });
  assert.is(long.text[0]!.length, 6);
  assert.equal(long.reasons, ['length']);
});

pair('one choice is stopped while another goes on', async () => {
  let tokens = 0;
  const { text, reasons } = await run(promptOf(60), {
    id: 'stop-me', n: 2, maxTokens: 600,
    onEvent(event) {
      if (event.event === 'token' && event.index === 1 && ++tokens === 5) void decode.client.json('POST', '/stop', { id: 'stop-me', index: 1 });
    },
  });
  assert.equal(reasons, ['length', 'stop']);
  assert.is(text[0]!.length, 600);
  assert.ok(text[1]!.length < 600);
  await atRest(prefill, decode);
});

pair('clients that leave at any moment leave nothing behind', async () => {
  const outcomes = await Promise.all(Array.from({ length: 40 }, async (_, i) => {
    const controller = new AbortController();
    const timer = i % 2 === 0 ? setTimeout(() => controller.abort(), (i * 37) % 400) : undefined;
    const result = await code(run(promptOf(1 + (i * 211) % 1500, i), { maxTokens: 40, n: 1 + (i % 3), signal: controller.signal }));
    clearTimeout(timer);
    return result;
  }));
  outcomes.forEach((outcome, i) => assert.ok(outcome === 'fine' || (i % 2 === 0 && outcome === 'CANCELLED'), `${i}: ${outcome}`));
  await atRest(prefill, decode);
});

pair('what is malformed, too long or unknown is refused by name', async () => {
  assert.is(await code(run(promptOf(4096))), 'CONTEXT_LENGTH_EXCEEDED');
  assert.is(await code(run([1, 2, 100_000])), 'REQUEST_INVALID');
  assert.is(await code(run([])), 'REQUEST_INVALID');
  assert.is(await code(run([1], { n: 100 })), 'REQUEST_INVALID');
  assert.is(await code(decode.client.json('POST', '/generate', { nonsense: true })), 'REQUEST_INVALID');
  assert.is(await code(prefill.client.json('POST', '/prefill', { nonsense: true })), 'REQUEST_INVALID');
  assert.is(await code(decode.client.json('GET', '/nothing')), 'NOT_FOUND');
  await atRest(prefill, decode);
});

pair.run();

// ---------------------------------------------------------------- the four forms

const forms = suite('the forms of decode');
forms.after.each(() => stack.stopAll());

forms('mla, dcp, dp and tpla of one rank generate the same text', async () => {
  const source = await stack.start('prefill', stack.prefillConfig());
  const prompts = Array.from({ length: 6 }, (_, i) => promptOf(40 + i * 150, i));
  let expected: number[][][] | undefined;
  for (const [form, ranks] of [['mla', 1], ['mla', 2], ['dcp', 2], ['dcp', 3], ['dp', 2], ['tpla', 1]] as [KvForm, number][]) {
    const worker = await stack.start('decode', stack.decodeConfig({ attention: { form, ranks } }));
    const texts = await Promise.all(prompts.map(async (prompt) => (await generate(source.client, worker.client, prompt, { maxTokens: 80, n: 2 })).text));
    expected ??= texts;
    assert.equal(texts, expected, `${form} over ${ranks}`);
    await atRest(source, worker);
    await stack.stop(worker);
  }
  await stack.stop(source);
});

forms.run();

// ---------------------------------------------------------------- too few pages

const scarce = suite('too few pages');

/** Texts of eight prompts that run together. */
async function crowd(worker: RoleProcess, during?: () => Promise<void>, from = source): Promise<Generated[]> {
  const running = Promise.all(Array.from({ length: 8 }, (_, i) => generate(from.client, worker.client, promptOf(70 + i * 23, i), { maxTokens: 250 })));
  await during?.();
  return running;
}
const textsOf = (results: Generated[]) => results.map(({ text }) => text);
const fewPages = (form: KvForm) => ({ dtype: 'f32' as const, page_tokens: 64, pages: form === 'dcp' ? 6 : 12 });
const metric = async (process: RoleProcess, name: string) => Number(new RegExp(`^${name} (\\S+)`, 'm').exec(await process.client.text('/metrics'))![1]);

let source: RoleProcess;
let pool: RoleProcess;
/** By form, with ample pages; exact forms share one. */
const expected = new Map<string, number[][][]>();
scarce.before(async () => {
  pool = await stack.start('pool', stack.poolConfig());
  source = await stack.start('prefill', stack.prefillConfig({ pool: stack.address('pool') }));
  for (const [form, ranks] of [['mla', 1], ['tpla', 2]] as [KvForm, number][]) {
    const ample = await stack.start('decode', stack.decodeConfig({ attention: { form, ranks } }));
    expected.set(form, textsOf(await crowd(ample)));
    await stack.stop(ample);
  }
});

for (const [form, ranks] of [['mla', 1], ['tpla', 2], ['dcp', 2], ['dp', 2]] as [KvForm, number][]) {
  scarce(`${form}: preempted to the pool and resumed, the text is that of ample pages`, async () => {
    const worker = await stack.start('decode', stack.decodeConfig({ attention: { form, ranks }, kv: fewPages(form), pool: stack.address('pool') }));
    const results = await crowd(worker);
    assert.equal(textsOf(results), expected.get(form === 'tpla' ? 'tpla' : 'mla'));
    assert.ok(results.some(({ report }) => report.preemptions > 0), 'there were too few pages for all');
    assert.is(await metric(worker, 'tpla_decode_relanded_tokens_total') + await metric(worker, 'tpla_decode_recomputed_tokens_total'), 0);
    await atRest(source, worker, pool);
    await stack.stop(worker);
  });
}

scarce('tpla with a width for every layer: preempted to the pool and resumed, the text is that of ample pages; other widths find none of it', async () => {
  const model = join(stack.directory, 'mixed');
  const tpla = { groups: 2, norm: 'exact', transform: true, rank_weights: true };
  writeCheckpoint(model, { seed: 5, config: { ...TINY_V3, tpla: { ...tpla, shared: [0, 32, 8], fingerprint: 'mixed' } } });
  const shelf = await stack.start('pool', stack.poolConfig({ listen: stack.address('shelf'), channel_listen: stack.address('shelf-channel') }));
  const from = await stack.start('prefill', stack.prefillConfig({ listen: stack.address('mixed-prefill'), model, pool: stack.address('shelf') }));
  const ample = await stack.start('decode', stack.decodeConfig({ model }));
  assert.is((await ample.state<WorkerState>()).attention.kv_bytes_per_token_per_rank, (16 + 32 + 20 + 3 * 8) * 4);
  const wanted = textsOf(await crowd(ample, undefined, from));
  await stack.stop(ample);
  const worker = await stack.start('decode', stack.decodeConfig({ model, kv: fewPages('tpla'), pool: stack.address('shelf') }));
  const results = await crowd(worker, undefined, from);
  assert.equal(textsOf(results), wanted);
  assert.ok(results.some(({ report }) => report.preemptions > 0), 'there were too few pages for all');
  assert.is(await metric(worker, 'tpla_decode_relanded_tokens_total') + await metric(worker, 'tpla_decode_recomputed_tokens_total'), 0);
  await atRest(from, worker, shelf);
  const again = await generate(from.client, worker.client, promptOf(70 + 7 * 23, 7), { maxTokens: 1 });
  assert.ok(again.cachedTokens > 0 || (again.prefill?.pooledTokens ?? 0) > 0, 'the prompt is known');

  const other = join(stack.directory, 'other-widths');
  writeCheckpoint(other, { seed: 5, config: { ...TINY_V3, tpla: { ...tpla, shared: [8, 32, 0], fingerprint: 'other' } } });
  const stranger = await stack.start('prefill', stack.prefillConfig({ listen: stack.address('other-prefill'), model: other, pool: stack.address('shelf') }));
  const refused = await generate(stranger.client, worker.client, promptOf(300, 9)).then(() => null, (error: Error) => error.message);
  assert.match(refused ?? '', /reparameterisation "other" against "mixed"/);
  await stack.stop(stranger, worker, from, shelf);
});

scarce('without a pool they wait instead, and the text is the same', async () => {
  const worker = await stack.start('decode', stack.decodeConfig({ kv: fewPages('tpla') }));
  const results = await crowd(worker);
  assert.equal(textsOf(results), expected.get('tpla'));
  assert.ok(results.every(({ report }) => report.preemptions === 0));
  await atRest(source, worker);
  await stack.stop(worker);
});

scarce('kill -9 of the pool while sequences are parked in it fails nobody', async () => {
  const worker = await stack.start('decode', stack.decodeConfig({ attention: { form: 'mla', ranks: 1 }, kv: fewPages('mla'), pool: stack.address('pool') }));
  const results = await crowd(worker, async () => {
    await eventually(async () => await metric(worker, 'tpla_decode_preemptions_total') > 0, 'a preemption');
    await stack.stop(pool);
  });
  assert.equal(textsOf(results), expected.get('mla'));
  await atRest(source, worker);
  pool = await stack.start('pool', stack.poolConfig());
  await eventually(async () => (await pool.state<PoolState>()).clients === 2, 'both workers to come back');
  assert.equal(textsOf(await crowd(worker)), expected.get('mla'));
  await atRest(source, worker, pool);
});

scarce.after(() => stack.stopAll());
scarce.run();

// ---------------------------------------------------------------- the pool as a cache

const shared = suite('a pool between workers');
shared.after.each(() => stack.stopAll());

shared('what one prefill worker computed, the next takes from the pool', async () => {
  const cache = await stack.start('pool', stack.poolConfig());
  const config = stack.prefillConfig({ pool: stack.address('pool') });
  const mla = stack.decodeConfig({ attention: { form: 'mla', ranks: 1 } });
  const prompt = promptOf(700, 9);
  const [first, target] = await Promise.all([stack.start('prefill', config), stack.start('decode', mla)]);
  const cold = await generate(first.client, target.client, prompt);
  assert.is(cold.prefill!.pooledTokens, 0);
  await atRest(first, target, cache);
  assert.is((await cache.state<PoolState>()).pages.cached, 10);
  await stack.stop(first, target);

  const [second, fresh] = await Promise.all([stack.start('prefill', config), stack.start('decode', mla)]);
  const warm = await generate(second.client, fresh.client, prompt);
  assert.is(warm.prefill!.pooledTokens, 640);
  assert.is(warm.prefill!.computedTokens, 60);
  assert.is(warm.transfer!.bytes, 700 * LAYERS * 40 * 4, 'decode had nothing: all is pushed, the pooled prefix too');
  assert.equal(warm.text, cold.text);
  await atRest(second, fresh, cache);
});

shared.run();

// ---------------------------------------------------------------- faults

const faults = suite('faults');
faults.after.each(() => stack.stopAll());

faults('kill -9 of prefill in the middle of a hand-off fails its requests alone, at once, and leaks no page', async () => {
  const [doomed, healthy, worker] = await Promise.all([
    stack.start('prefill', stack.prefillConfig({ chunk_tokens: 64, max_batch_tokens: 64 })),
    stack.start('prefill', stack.prefillConfig({ listen: stack.address('prefill-1'), id: 'prefill-1' })),
    stack.start('decode', stack.decodeConfig({ lease_ms: 60_000 })),
  ]);
  const survivor = generate(healthy.client, worker.client, promptOf(100), { maxTokens: 1500 });
  const broken = [0, 1, 2].map((i) => code(generate(doomed.client, worker.client, promptOf(3000, i))));
  await eventually(async () => (await doomed.state<WorkerState>()).pages.used > 0 && /step_seconds_count [1-9]/.test(await doomed.client.text('/metrics')), 'prefill to be computing');
  await stack.stop(doomed);
  const killed = performance.now();
  for (const outcome of await Promise.all(broken)) assert.ok(['WORKER_FAILED', 'HANDOFF_FAILED'].includes(outcome), outcome);
  assert.ok(performance.now() - killed < 10_000, 'long before the lease of a minute');
  assert.is((await survivor).text[0]!.length, 1500);
  await atRest(healthy, worker);

  const replaced = await stack.start('prefill', stack.prefillConfig());
  assert.is((await generate(replaced.client, worker.client, promptOf(3000, 0))).text[0]!.length, 16);
  await atRest(replaced, worker);
  await stack.stop(healthy, worker, replaced);
});

faults('kill -9 of decode fails what it ran; restarted on the same sockets it serves, and no memory of it stays mapped', async () => {
  const source = await stack.start('prefill', stack.prefillConfig({ chunk_tokens: 64, max_batch_tokens: 64 }));
  let worker = await stack.start('decode', stack.decodeConfig());
  const mapped = () => readFileSync(`/proc/${source.pid}/maps`, 'utf8').split('\n').filter((line) => line.includes('memfd:')).length;
  const descriptors = () => readdirSync(`/proc/${source.pid}/fd`).length;
  await generate(source.client, worker.client, promptOf(10));
  const before = { maps: mapped(), fds: descriptors() };
  for (let round = 0; round < 3; round++) {
    const broken = [0, 1].map((i) => code(generate(source.client, worker.client, promptOf(3000, i))));
    await eventually(async () => (await source.state<WorkerState>()).pages.used > 0, 'prefill to be computing');
    await stack.stop(worker);
    for (const outcome of await Promise.all(broken)) assert.ok(['WORKER_FAILED', 'HANDOFF_FAILED'].includes(outcome), outcome);
    await atRest(source);
    worker = await stack.start('decode', stack.decodeConfig());
    assert.is((await generate(source.client, worker.client, promptOf(10))).text[0]!.length, 16);
  }
  await atRest(source, worker);
  assert.is(mapped(), before.maps);
  assert.ok(descriptors() <= before.fds + 4, `${descriptors()} descriptors, ${before.fds} before`);
  await stack.stop(source, worker);
});

faults('workers of different models do not shake hands, and say which', async () => {
  const other = `${stack.directory}/other`;
  writeCheckpoint(other, { seed: 6 });
  const [stranger, worker] = await Promise.all([stack.start('prefill', stack.prefillConfig({ model: other })), stack.start('decode', stack.decodeConfig())]);
  const refusal = await generate(stranger.client, worker.client, promptOf(100)).then(() => null, (error: { code: string; message: string }) => error);
  assert.is(refusal!.code, 'HANDSHAKE_REFUSED');
  const fingerprints = await Promise.all([stranger, worker].map(async (process) => (await process.state<WorkerState>()).model.fingerprint));
  for (const fingerprint of fingerprints) assert.match(refusal!.message, fingerprint);
  await atRest(stranger, worker);
  await stack.stop(stranger, worker);
});

faults('SIGTERM finishes what runs and refuses what comes', async () => {
  const [source, worker] = await Promise.all([stack.start('prefill', stack.prefillConfig()), stack.start('decode', stack.decodeConfig())]);
  const running = generate(source.client, worker.client, promptOf(200), { maxTokens: 1200 });
  await eventually(async () => /tokens_total [1-9]/.test(await worker.client.text('/metrics')), 'tokens to come');
  worker.kill('SIGTERM');
  await eventually(async () => (await worker.client.json<{ status: string }>('GET', '/health')).status === 'draining', 'decode to drain');
  assert.is(await code(generate(source.client, worker.client, promptOf(10))), 'DRAINING');
  assert.is((await running).text[0]!.length, 1200);
  assert.equal(await worker.exited, { status: 0, signal: null });
  source.kill('SIGTERM');
  assert.equal(await source.exited, { status: 0, signal: null });
  for (const name of ['prefill', 'decode', 'handoff']) assert.not.ok(existsSync(stack.address(name).slice('unix:'.length)), `the socket of ${name} is gone`);
  await stack.stop(source, worker);
});

faults('an address in use ends a worker before it loads anything', async () => {
  const worker = await stack.start('decode', stack.decodeConfig());
  const second = await stack.start('decode', stack.decodeConfig()).then(() => 'started', (error: Error) => error.message);
  assert.match(second, 'in use');
  const third = await stack.start('decode', stack.decodeConfig({ listen: stack.address('decode-1') })).then(() => 'started', (error: Error) => error.message);
  assert.match(third, 'in use');
  await stack.stop(worker);
});

faults.after(() => stack.end());
faults.run();
