/** The whole product as processes, with the demo model, through the official client. */
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { createServer, type AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import OpenAI, { APIError, BadRequestError } from 'openai';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { DecodeConfig, PrefillConfig } from '../../src/config/types.js';
import type { WorkerState } from '../../src/fleet/protocol.js';
import type { TplaTimings } from '../../src/http/openai_types.js';
import type { KvForm } from '../../src/native/types.js';
import { eventually, RoleProcess } from '../support/role_process.js';
import { LOCAL_TRANSFER, NO_DISK } from '../support/worker_stack.js';

const MODEL = fileURLToPath(new URL('../../models/demo', import.meta.url));
const COMMON = { model: MODEL, model_name: 'demo', threads: 1, drain_ms: 10_000, log_level: 'info' as const, kv: { dtype: 'f32' as const, page_tokens: 64, pages: 512 } };
const PROMPT = 'The kernel allocates memory for a process in pages. When a page is';
/** First sentences of the model's own held-out text. */
const HELD_OUT = readFileSync(join(MODEL, 'heldout.txt'), 'utf8').slice(0, 60_000);

/** Pool, prefill and decode workers, and route in front of them. */
class Stack {
  readonly dir = mkdtempSync(join(tmpdir(), 'tpla-e2e-'));
  readonly prefill: RoleProcess[] = [];
  readonly decode: RoleProcess[] = [];
  readonly #others: RoleProcess[] = [];
  client!: OpenAI;
  url = '';

  async start({ prefill, decode }: { prefill: number; decode: { form: KvForm; ranks: number }[] }): Promise<this> {
    const pool = RoleProcess.start('pool', { listen: this.#at('pool'), id: 'pool', channel_listen: this.#at('pool-channel'), dram_bytes: 64 << 20, nvme: NO_DISK, drain_ms: 1_000, log_level: 'info' });
    this.#others.push(await pool);
    this.prefill.push(...await Promise.all(Array.from({ length: prefill }, (_, i) => this.startPrefill(i))));
    this.decode.push(...await Promise.all(decode.map((attention, i) => this.startDecode(i, attention))));
    const port = await freePort();
    this.#others.push(await RoleProcess.start('route', {
      listen: [`tcp://127.0.0.1:${port}`], id: 'route', prefill: this.prefill.map((_, i) => this.#at(`prefill-${i}`)), decode: this.decode.map((_, i) => this.#at(`decode-${i}`)),
      model: MODEL, model_name: 'demo', health_interval_ms: 200, request_timeout_ms: 120_000, max_body_bytes: 16 << 20, retries: 2, drain_ms: 10_000, log_level: 'info',
    }));
    this.url = `http://127.0.0.1:${port}`;
    this.client = new OpenAI({ baseURL: `${this.url}/v1`, apiKey: 'none', maxRetries: 0 });
    return this;
  }

  startPrefill(i: number): Promise<RoleProcess> {
    const config: PrefillConfig = { ...COMMON, listen: this.#at(`prefill-${i}`), id: `prefill-${i}`, pool: this.#at('pool'), chunk_tokens: 256, max_batch_tokens: 512, max_waiting: 256, transfer: LOCAL_TRANSFER };
    return RoleProcess.start('prefill', config);
  }

  startDecode(i: number, attention: { form: KvForm; ranks: number }): Promise<RoleProcess> {
    const config: DecodeConfig = {
      ...COMMON, listen: this.#at(`decode-${i}`), id: `decode-${i}`, pool: this.#at('pool'), handoff_listen: this.#at(`handoff-${i}`), attention, max_batch: 64, max_waiting: 256, handoff_direction: 'push', first_token: 'prefill', lease_ms: 5_000,
      transfer: LOCAL_TRANSFER,
    };
    return RoleProcess.start('decode', config);
  }

  /** Nothing runs and no page is in use anywhere. */
  async atRest(): Promise<void> {
    await eventually(async () => {
      const states = await Promise.all([...this.prefill, ...this.decode].map((worker) => worker.state<WorkerState>()));
      return states.every(({ running, waiting, pages }) => running + waiting + pages.used === 0);
    }, 'every page to be returned');
  }

  async stop(): Promise<void> {
    await Promise.all([...this.#others, ...this.prefill, ...this.decode].map((role) => role.stop()));
    rmSync(this.dir, { recursive: true, force: true });
  }

  #at(name: string): string {
    return `unix:${this.dir}/${name}.sock`;
  }
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, 'close');
  return port;
}

const user = (content: string) => [{ role: 'user' as const, content }];

// ---------------------------------------------------------------- a healthy stack with exact decode

const test = suite('openai client, route, prefill, pool, decode');
let stack: Stack;
let client: OpenAI;

test.before(async () => {
  stack = await new Stack().start({ prefill: 1, decode: [{ form: 'dcp', ranks: 2 }] });
  client = stack.client;
});
test.after(() => stack.stop());

test('the same greedy text whole, streamed, and from token ids', async () => {
  const whole = await client.completions.create({ model: 'demo', prompt: PROMPT, max_tokens: 40, temperature: 0 });
  const text = whole.choices[0]!.text;
  assert.match(text, /[a-z]+ [a-z]+/);
  assert.is(whole.choices[0]!.finish_reason, 'length');
  assert.is(whole.usage!.completion_tokens, 40);
  let streamed = '';
  for await (const chunk of await client.completions.create({ model: 'demo', prompt: PROMPT, max_tokens: 40, temperature: 0, stream: true })) streamed += chunk.choices[0]!.text;
  assert.is(streamed, text);
  const { tokens } = await (await fetch(`${stack.url}/tokenize`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ prompt: PROMPT }) })).json() as { tokens: number[] };
  assert.is(whole.usage!.prompt_tokens, tokens.length);
  assert.is((await client.completions.create({ model: 'demo', prompt: tokens, max_tokens: 40, temperature: 0 })).choices[0]!.text, text);
});

test('what was planted in a prompt is found again, through prefill, hand-off and decode', async () => {
  const tasks = readFileSync(join(MODEL, 'recall.jsonl'), 'utf8').trim().split('\n').map((line) => JSON.parse(line) as { prompt: string; answer: string; context_tokens: number })
    .filter(({ context_tokens }) => context_tokens < 1500).slice(0, 8);
  assert.is(tasks.length, 8);
  const answers = await Promise.all(tasks.map(({ prompt }) => client.completions.create({ model: 'demo', prompt, max_tokens: 12, temperature: 0 })));
  assert.equal(answers.map(({ choices }, i) => choices[0]!.text.trimStart().startsWith(tasks[i]!.answer)), tasks.map(() => true));
});

test('a conversation ends by itself and is the same for the same seed', async () => {
  const ask = (seed: number) => client.chat.completions.create({ model: 'demo', messages: user('The port number of the blue gateway is 4711. What is the port number of the blue gateway?'), max_tokens: 60, seed });
  const [first, again] = [await ask(7), await ask(7)];
  assert.is(first.choices[0]!.message.content, again.choices[0]!.message.content);
  assert.match(first.choices[0]!.message.content!, /4711/);
  assert.is(first.choices[0]!.finish_reason, 'stop');
  assert.not.match(first.choices[0]!.message.content!, /<\|/);
});

test('a prompt seen before is taken from the cache', async () => {
  const prompt = HELD_OUT.slice(0, 4_000);
  const body = { model: 'demo', prompt, max_tokens: 8, temperature: 0 };
  const [cold, warm] = [await client.completions.create(body), await client.completions.create(body)];
  assert.is(warm.choices[0]!.text, cold.choices[0]!.text);
  assert.is(cold.usage!.prompt_tokens_details!.cached_tokens, 0);
  assert.ok(warm.usage!.prompt_tokens_details!.cached_tokens! >= warm.usage!.prompt_tokens - 64 - 1, JSON.stringify(warm.usage));
});

test('logprobs are those of a distribution; greedy takes the top', async () => {
  const { choices } = await client.chat.completions.create({ model: 'demo', messages: user('What is a page?'), max_tokens: 12, temperature: 0, logprobs: true, top_logprobs: 5 });
  const content = choices[0]!.logprobs!.content!;
  assert.is(content.map(({ bytes }) => Buffer.from(bytes!).toString()).join(''), choices[0]!.message.content);
  for (const { token, logprob, top_logprobs } of content) {
    assert.is(top_logprobs.length, 5);
    assert.is(top_logprobs[0]!.token, token);
    assert.ok(Math.abs(top_logprobs[0]!.logprob - logprob) < 1e-6);
    assert.ok(top_logprobs.reduce((sum, top) => sum + Math.exp(top.logprob), 0) <= 1 + 1e-6);
  }
});

test('several prompts, several choices, stop strings, all at once', async () => {
  const prompts = [PROMPT, 'The file system', 'A socket is'];
  const body = { model: 'demo', prompt: prompts, max_tokens: 30, temperature: 0.8, n: 2, seed: 3, stop: ['.', ' the '] };
  const { choices, usage } = await client.completions.create(body);
  assert.equal(choices.map(({ index }) => index), [0, 1, 2, 3, 4, 5]);
  for (const { text, finish_reason } of choices) {
    assert.not.match(text, /\.| the /);
    assert.ok(finish_reason === 'stop' || finish_reason === 'length');
  }
  assert.ok(usage!.completion_tokens <= 6 * 30);
  await stack.atRest();
});

test('32 streams of mixed lengths at a time; afterwards every page is free', async () => {
  const requests = Array.from({ length: 32 }, (_, i) => ({ prompt: HELD_OUT.slice(i * 900, i * 900 + 20 + (i * 337) % 3_000), max_tokens: 1 + (i * 13) % 50 }));
  const run = async ({ prompt, max_tokens }: { prompt: string; max_tokens: number }) => {
    let text = '';
    let reason: string | null = null;
    for await (const { choices } of await client.completions.create({ model: 'demo', prompt, max_tokens, temperature: 0, stream: true })) {
      text += choices[0]!.text;
      reason ??= choices[0]!.finish_reason;
    }
    return { text, reason };
  };
  const together = await Promise.all(requests.map(run));
  for (const { reason } of together) assert.ok(reason === 'length' || reason === 'stop');
  await stack.atRest();
  for (const i of [0, 7, 31]) assert.is(together[i]!.text, (await run(requests[i]!)).text);
});

test('a client that goes away frees what it held', async () => {
  const stream = await client.completions.create({ model: 'demo', prompt: HELD_OUT.slice(0, 2_000), max_tokens: 2_000, temperature: 0, stream: true, ...{ ignore_eos: true } });
  let pieces = 0;
  for await (const _ of stream) if (++pieces === 3) break;
  await stack.atRest();
});

test('a prompt that does not fit is refused with both numbers', async () => {
  const error = await client.completions.create({ model: 'demo', prompt: HELD_OUT }).then(() => null, (thrown: unknown) => thrown);
  assert.instance(error, BadRequestError);
  assert.is((error as APIError).code, 'CONTEXT_LENGTH_EXCEEDED');
  assert.match((error as APIError).message, /\d+ tokens.* 4096/);
});

test.run();

// ---------------------------------------------------------------- TPLA, and what the demo prints

const tpla = suite('decode with TPLA');

tpla.before(async () => { stack = await new Stack().start({ prefill: 1, decode: [{ form: 'tpla', ranks: 2 }] }); });
tpla.after(() => stack.stop());

tpla('text, and where its time went', async () => {
  const completion = await stack.client.completions.create({ model: 'demo', prompt: PROMPT, max_tokens: 24, temperature: 0, ...{ tpla_timings: true, ignore_eos: true } });
  assert.match(completion.choices[0]!.text, /[a-z]+/);
  const { ttft_ms, prefill, transfer, decode } = (completion as unknown as { tpla: TplaTimings }).tpla;
  assert.ok(ttft_ms > 0);
  assert.equal([prefill!.attention, prefill!.tokens, prefill!.computed_tokens], ['mla', completion.usage!.prompt_tokens, completion.usage!.prompt_tokens]);
  assert.ok(prefill!.ms > 0);
  // 7 layers, latent 128 in two slices and rope 32 on both ranks, f32
  assert.is(transfer!.path, 'shm');
  assert.is(transfer!.bytes, completion.usage!.prompt_tokens * 7 * 2 * (64 + 32) * 4);
  assert.equal([decode.attention, decode.ranks, decode.tokens, decode.kv_bytes_per_token_per_rank], ['tpla', 2, 24, 7 * (64 + 32) * 4]);
  assert.ok(decode.tpot_ms > 0);
  await stack.atRest();
});

tpla.run();

// ---------------------------------------------------------------- faults

const faults = suite('worker processes that die');

faults.before(async () => { stack = await new Stack().start({ prefill: 2, decode: [{ form: 'mla', ranks: 1 }] }); });
faults.after(() => stack.stop());

faults('kill -9 of a prefill process under load: every request is answered, no page is lost', async () => {
  const requests = Array.from({ length: 8 }, (_, i) => stack.client.completions.create({ model: 'demo', prompt: HELD_OUT.slice(i * 4_000, i * 4_000 + 6_000), max_tokens: 4, temperature: 0 }));
  await eventually(async () => (await stack.prefill[0]!.state<WorkerState>()).running > 0, 'prefill to have begun');
  await stack.prefill.shift()!.stop('SIGKILL');
  for (const { choices } of await Promise.all(requests)) assert.is(choices[0]!.finish_reason, 'length');
  await stack.atRest();
});

faults('kill -9 of decode in mid-stream: an error for the stream; a new process on the same socket serves again', async () => {
  const stream = await stack.client.completions.create({ model: 'demo', prompt: PROMPT, max_tokens: 3_000, temperature: 0, stream: true, ...{ ignore_eos: true } });
  let text = '';
  const error = await (async () => {
    for await (const { choices } of stream) {
      text += choices[0]!.text;
      if (text.length > 20) await stack.decode[0]!.stop('SIGKILL');
    }
  })().then(() => null, (thrown: unknown) => thrown);
  assert.instance(error, APIError);
  assert.is((error as APIError).code, 'WORKER_FAILED');
  const refused = await stack.client.completions.create({ model: 'demo', prompt: PROMPT }).then(() => null, (thrown: unknown) => thrown);
  assert.is((refused as APIError).code, 'NO_WORKER');
  stack.decode[0] = await stack.startDecode(0, { form: 'mla', ranks: 1 });
  await eventually(async () => (await fetch(`${stack.url}/health`)).status === 200, 'route to see the new worker');
  assert.is((await stack.client.completions.create({ model: 'demo', prompt: PROMPT, max_tokens: 4 })).usage!.completion_tokens, 4);
  await stack.atRest();
});

faults.run();
