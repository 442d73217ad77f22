import OpenAI, { APIConnectionTimeoutError, APIError, APIUserAbortError, BadRequestError, NotFoundError, RateLimitError } from 'openai';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { TplaTimings } from '../../../src/http/openai_types.js';
import { scriptedGenerate, tokensOf } from '../../support/fake_workers.js';
import { RouterStack, until } from '../../support/router_stack.js';

/** The official client against a real router; the workers are scripted. */
const test = suite('roles/router with the openai client');
let stack: RouterStack;
let client: OpenAI;

test.before(async () => {
  stack = await RouterStack.start();
  client = new OpenAI({ baseURL: `${stack.url}/v1`, apiKey: 'none', maxRetries: 0 });
});
test.before.each(() => {
  const [decode] = stack.decode;
  Object.assign(decode!, { script: scriptedGenerate, reply: () => 'Hello world', cachedTokens: 0, pace: 0, deaf: false, requests: [], stops: [], cancelled: [] });
});
test.after(() => stack.stop());

const user = (content: string) => [{ role: 'user' as const, content }];

test('a completion', async () => {
  const completion = await client.completions.create({ model: 'tiny', prompt: 'say', max_tokens: 50 });
  assert.match(completion.id, /^cmpl-[0-9a-f]{32}$/);
  assert.is(completion.object, 'text_completion');
  assert.is(completion.model, 'tiny');
  assert.ok(Math.abs(completion.created - Date.now() / 1000) < 60);
  assert.equal(completion.choices, [{ index: 0, text: 'Hello world', logprobs: null, finish_reason: 'stop' }]);
  // begin-of-text and 3 characters; 11 characters and end-of-text
  assert.equal(completion.usage, { prompt_tokens: 4, completion_tokens: 12, total_tokens: 16, prompt_tokens_details: { cached_tokens: 0 } });
  assert.equal(stack.decode[0]!.requests[0]!.tokens, [0, ...tokensOf('say')]);
  assert.equal(stack.prefill[0]!.requests.at(-1)!.tokens, [0, ...tokensOf('say')]);
});

test('max_tokens cuts and says so; completions default to 16', async () => {
  stack.decode[0]!.reply = () => 'x'.repeat(100);
  const cut = await client.completions.create({ model: 'tiny', prompt: 'say', max_tokens: 5 });
  assert.equal([cut.choices[0]!.text, cut.choices[0]!.finish_reason, cut.usage!.completion_tokens], ['xxxxx', 'length', 5]);
  assert.is((await client.completions.create({ model: 'tiny', prompt: 'say' })).choices[0]!.text.length, 16);
});

test('a streamed completion is the same text in pieces', async () => {
  const pieces: string[] = [];
  const reasons = new Set<string | null>();
  for await (const chunk of await client.completions.create({ model: 'tiny', prompt: 'say', max_tokens: 50, stream: true })) {
    assert.is(chunk.object, 'text_completion');
    assert.not.ok('usage' in chunk);
    pieces.push(chunk.choices[0]!.text);
    reasons.add(chunk.choices[0]!.finish_reason);
  }
  assert.is(pieces.join(''), 'Hello world');
  assert.ok(pieces.length > 5);
  assert.equal([...reasons], [null, 'stop']);
});

test('a chat completion goes through the template, system prompt and text parts included', async () => {
  const completion = await client.chat.completions.create({
    model: 'tiny',
    messages: [{ role: 'system', content: 'be kind' }, { role: 'user', content: [{ type: 'text', text: 'a' }, { type: 'text', text: 'b' }] }, { role: 'assistant', content: 'c' }, { role: 'user', content: 'd', name: 'eve' }],
  });
  assert.is(completion.object, 'chat.completion');
  assert.match(completion.id, /^chatcmpl-/);
  assert.equal(completion.choices, [{ index: 0, message: { role: 'assistant', content: 'Hello world', refusal: null }, logprobs: null, finish_reason: 'stop' }]);
  const rendered = await (await stack.post('/detokenize', { tokens: stack.decode[0]!.requests[0]!.tokens })).json() as { prompt: string };
  assert.is(rendered.prompt, '[system]be kind[user]ab[assistant]c[user]d[assistant]');
  // the rest of the context
  assert.is(stack.decode[0]!.requests[0]!.max_tokens, 4096 - stack.decode[0]!.requests[0]!.tokens.length);
});

test('a developer message is a system message; template variables reach the template', async () => {
  await client.chat.completions.create({ model: 'tiny', messages: [{ role: 'developer', content: 'x' }], chat_template_kwargs: { thinking: true } } as never);
  const { prompt } = await (await stack.post('/detokenize', { tokens: stack.decode[0]!.requests[0]!.tokens })).json() as { prompt: string };
  assert.is(prompt, '[system]x[assistant]<think>');
});

test('a streamed chat completion, through the client\'s own accumulator', async () => {
  const stream = client.chat.completions.stream({ model: 'tiny', messages: user('hi'), stream_options: { include_usage: true } });
  let text = '';
  stream.on('content', (delta) => { text += delta; });
  const completion = await stream.finalChatCompletion();
  assert.is(text, 'Hello world');
  assert.is(completion.choices[0]!.message.content, 'Hello world');
  assert.is(completion.choices[0]!.message.role, 'assistant');
  assert.is(completion.choices[0]!.finish_reason, 'stop');
  assert.is(completion.usage!.completion_tokens, 12);
});

test('include_usage: null in every chunk, numbers in a last one without choices', async () => {
  stack.decode[0]!.cachedTokens = 2;
  const chunks = [];
  for await (const chunk of await client.chat.completions.create({ model: 'tiny', messages: user('hi'), stream: true, stream_options: { include_usage: true } })) chunks.push(chunk);
  const last = chunks.pop()!;
  assert.ok(chunks.every(({ usage }) => usage === null));
  assert.equal(chunks[0]!.choices, [{ index: 0, delta: { role: 'assistant', content: '', refusal: null }, logprobs: null, finish_reason: null }]);
  assert.equal(chunks.at(-1)!.choices, [{ index: 0, delta: {}, logprobs: null, finish_reason: 'stop' }]);
  assert.equal(last.choices, []);
  const prompt_tokens = stack.decode[0]!.requests[0]!.tokens.length;
  assert.equal(last.usage, { prompt_tokens, completion_tokens: 12, total_tokens: prompt_tokens + 12, prompt_tokens_details: { cached_tokens: 2 } });
});

test('n choices, streamed and whole', async () => {
  stack.decode[0]!.reply = (_request, choice) => `choice ${choice}`;
  const whole = await client.chat.completions.create({ model: 'tiny', messages: user('hi'), n: 3 });
  assert.equal(whole.choices.map(({ index, message }) => [index, message.content]), [[0, 'choice 0'], [1, 'choice 1'], [2, 'choice 2']]);
  assert.is(whole.usage!.completion_tokens, 27);
  const texts = ['', '', ''];
  for await (const chunk of await client.completions.create({ model: 'tiny', prompt: 'hi', n: 3, stream: true })) {
    for (const { index, text } of chunk.choices) texts[index] += text;
  }
  assert.equal(texts, ['choice 0', 'choice 1', 'choice 2']);
});

test('prompts of every kind; several prompts give choices in order', async () => {
  stack.decode[0]!.reply = ({ tokens }) => [...tokens].reverse();
  const text = async (prompt: string | string[] | number[] | number[][], extra = {}) =>
    (await client.completions.create({ model: 'tiny', prompt, ...extra })).choices.map((choice) => choice.text);
  assert.equal(await text('abc'), ['cba']);
  assert.equal(await text(['abc', 'de', 'f']), ['cba', 'ed', 'f']);
  assert.equal(await text(tokensOf('xyz')), ['zyx']);
  assert.equal(await text([tokensOf('xy'), tokensOf('z')], { n: 2 }), ['yx', 'yx', 'z', 'z']);
  const texts: string[] = [];
  for await (const chunk of await client.completions.create({ model: 'tiny', prompt: ['abc', 'de'], stream: true })) {
    for (const choice of chunk.choices) texts[choice.index] = (texts[choice.index] ?? '') + choice.text;
  }
  assert.equal(texts, ['cba', 'ed']);
});

test('a character spread over tokens arrives whole', async () => {
  stack.decode[0]!.reply = () => 'naïve 🙂 €';
  const pieces: string[] = [];
  for await (const chunk of await client.completions.create({ model: 'tiny', prompt: 'x', stream: true })) pieces.push(chunk.choices[0]!.text);
  assert.is(pieces.join(''), 'naïve 🙂 €');
  assert.not.ok(pieces.join('').includes('\ufffd'));
});

test('stop strings end a choice and never show, though they span tokens', async () => {
  stack.decode[0]!.reply = () => 'one, two, three, four';
  for (const stream of [false, true]) {
    const pieces: string[] = [];
    let reason: string | null = null;
    const body = { model: 'tiny', prompt: 'count', max_tokens: 100, stop: ['three', 'two, th'] };
    if (stream) {
      for await (const chunk of await client.completions.create({ ...body, stream })) {
        pieces.push(chunk.choices[0]!.text);
        reason = chunk.choices[0]!.finish_reason;
      }
    } else {
      const { choices } = await client.completions.create(body);
      pieces.push(choices[0]!.text);
      reason = choices[0]!.finish_reason;
    }
    assert.is(pieces.join(''), 'one, ');
    assert.is(reason, 'stop');
  }
});

test('a stop string held back is let out where it does not come true', async () => {
  stack.decode[0]!.reply = () => 'abcab';
  const { choices } = await client.completions.create({ model: 'tiny', prompt: 'x', stop: 'abd' });
  assert.equal([choices[0]!.text, choices[0]!.finish_reason], ['abcab', 'stop']);
});

test('a stop string ends the work at decode: the whole request, or one choice of several', async () => {
  const [decode] = stack.decode;
  decode!.pace = 2;
  decode!.reply = (_request, choice) => (choice === 0 ? 'short END never seen' : 'a somewhat longer answer');
  const one = await client.completions.create({ model: 'tiny', prompt: 'x', max_tokens: 100, stop: ' END' });
  assert.is(one.choices[0]!.text, 'short');
  await until(() => decode!.cancelled.length === 1, 'the request is cancelled');
  const two = await client.completions.create({ model: 'tiny', prompt: 'x', max_tokens: 100, n: 2, stop: ' END' });
  assert.equal(two.choices.map(({ text }) => text), ['short', 'a somewhat longer answer']);
  assert.equal(decode!.stops, [{ id: decode!.requests[1]!.id, index: 0 }]);
});

test('a decode worker that is slow to stop a choice is asked once, and what it sends meanwhile is not shown', async () => {
  const [decode] = stack.decode;
  decode!.deaf = true;
  decode!.reply = (_request, choice) => (choice === 0 ? 'short END never seen' : 'a somewhat longer answer');
  const { choices } = await client.completions.create({ model: 'tiny', prompt: 'x', max_tokens: 100, n: 2, stop: ' END' });
  assert.equal(choices.map(({ text }) => text), ['short', 'a somewhat longer answer']);
  await until(() => decode!.stops.length === 1, 'decode is asked');
  assert.is(decode!.stops.length, 1);
});

test('logprobs of a completion', async () => {
  stack.decode[0]!.reply = () => 'aé';
  const { choices } = await client.completions.create({ model: 'tiny', prompt: 'x', logprobs: 2 });
  assert.equal(choices[0]!.logprobs, {
    tokens: ['a', 'bytes:\\xc3', 'bytes:\\xa9'],
    token_logprobs: [-0.25, -0.5, -0.75],
    top_logprobs: [{ a: -0.25, b: -1.25 }, { 'bytes:\\xc3': -0.5, b: -1.5 }, { 'bytes:\\xa9': -0.75, b: -1.75 }],
    text_offset: [0, 1, 1],
  });
  assert.is(stack.decode[0]!.requests[0]!.sampling.logprobs, 2);
});

test('logprobs of a chat completion, whole and streamed', async () => {
  stack.decode[0]!.reply = () => 'hé';
  const body = { model: 'tiny', messages: user('x'), logprobs: true, top_logprobs: 1 };
  const expected = [
    { token: 'h', logprob: -0.25, bytes: [104], top_logprobs: [{ token: 'h', logprob: -0.25, bytes: [104] }] },
    { token: 'bytes:\\xc3', logprob: -0.5, bytes: [0xc3], top_logprobs: [{ token: 'bytes:\\xc3', logprob: -0.5, bytes: [0xc3] }] },
    { token: 'bytes:\\xa9', logprob: -0.75, bytes: [0xa9], top_logprobs: [{ token: 'bytes:\\xa9', logprob: -0.75, bytes: [0xa9] }] },
  ];
  const whole = await client.chat.completions.create(body);
  assert.equal(whole.choices[0]!.logprobs, { content: expected, refusal: null });
  const streamed = [];
  for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) streamed.push(...(chunk.choices[0]!.logprobs?.content ?? []));
  assert.equal(streamed, expected);
});

test('tokens of a stop string have no logprobs reported', async () => {
  stack.decode[0]!.reply = () => 'yes STOP';
  const { choices } = await client.completions.create({ model: 'tiny', prompt: 'x', logprobs: 0, stop: 'STOP' });
  assert.equal(choices[0]!.logprobs!.tokens, ['y', 'e', 's', ' ']);
  assert.equal(choices[0]!.logprobs!.top_logprobs, [null, null, null, null] as never);
});

test('echo repeats the prompt, tokens too, and offsets count from its start', async () => {
  const text = await client.completions.create({ model: 'tiny', prompt: 'say: ', echo: true });
  assert.is(text.choices[0]!.text, 'say: Hello world');
  const tokens = await client.completions.create({ model: 'tiny', prompt: tokensOf('é '), echo: true });
  assert.is(tokens.choices[0]!.text, 'é Hello world');
});

test('sampling parameters reach decode, with neutral defaults', async () => {
  await client.chat.completions.create({
    model: 'tiny', messages: user('x'), temperature: 0.5, top_p: 0.9, presence_penalty: 0.1, frequency_penalty: -0.2, seed: -1, logit_bias: { 7: -100, 8: 2.5 },
    max_completion_tokens: 9, user: 'someone', service_tier: 'flex', metadata: { a: 'b' }, ...{ top_k: 40, min_p: 0.05, repetition_penalty: 1.1 },
  });
  const { sampling, max_tokens, qos, stop_token_ids } = stack.decode[0]!.requests[0]!;
  assert.equal(sampling, {
    temperature: 0.5, top_k: 40, top_p: 0.9, min_p: 0.05, repetition_penalty: 1.1, presence_penalty: 0.1, frequency_penalty: -0.2, seed: '18446744073709551615', logprobs: -1,
    logit_bias: [{ token: 7, bias: -100 }, { token: 8, bias: 2.5 }],
  });
  assert.equal([max_tokens, qos, stop_token_ids], [9, 'batch', [1]]);
  await client.completions.create({ model: 'tiny', prompt: 'x', ...{ ignore_eos: true, stop_token_ids: [5] } });
  const second = stack.decode[0]!.requests[1]!;
  const { seed, ...rest } = second.sampling;
  assert.equal(rest, { temperature: 1, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0, logprobs: -1, logit_bias: [] });
  assert.match(seed, /^\d+$/);
  assert.equal(second.stop_token_ids, [5]);
});

test('timings on request: body flag or header, whole or streamed', async () => {
  const check = (timings: TplaTimings) => {
    assert.ok(timings.ttft_ms > 0);
    assert.equal(timings.prefill, { attention: 'mla', tokens: 4, computed_tokens: 4, queue_ms: 0.5, ms: 3 });
    assert.equal(timings.transfer, { path: 'shm', bytes: 2560, ms: 1.5 });
    assert.equal(timings.decode, { attention: 'tpla', ranks: 2, tokens: 12, tpot_ms: 2, kv_bytes_per_token_per_rank: 640, preemptions: 0 });
  };
  const whole = await client.completions.create({ model: 'tiny', prompt: 'say', ...{ tpla_timings: true } });
  check((whole as unknown as { tpla: TplaTimings }).tpla);
  let last: unknown;
  for await (const chunk of await client.completions.create({ model: 'tiny', prompt: 'say', stream: true }, { headers: { 'x-tpla-timings': 'true' } })) last = chunk;
  check((last as { tpla: TplaTimings }).tpla);
  assert.equal((last as { choices: unknown[] }).choices, []);
  assert.not.ok('tpla' in await client.completions.create({ model: 'tiny', prompt: 'say' }));
});

test('timings of a request that a stop string ended are measured at route', async () => {
  stack.decode[0]!.reply = () => 'a b END and more';
  const completion = await client.completions.create({ model: 'tiny', prompt: 'x', stop: 'END', ...{ tpla_timings: true } });
  const { decode } = (completion as unknown as { tpla: TplaTimings }).tpla;
  assert.equal([decode.attention, decode.ranks, decode.tokens, decode.kv_bytes_per_token_per_rank], ['tpla', 2, 7, 640]);
  assert.ok(decode.tpot_ms > 0);
});

test('models', async () => {
  const models = [];
  for await (const model of client.models.list()) models.push(model);
  assert.equal(models.map(({ id, object, owned_by }) => [id, object, owned_by]), [['tiny', 'model', 'tpla']]);
  assert.is((await client.models.retrieve('tiny')).id, 'tiny');
  await rejects(client.models.retrieve('other'), NotFoundError, { code: 'MODEL_NOT_FOUND', param: 'model' });
});

test('errors become the client\'s own classes, with all four keys', async () => {
  const unknown = await rejects(client.chat.completions.create({ model: 'gpt-9', messages: user('x') }), NotFoundError, { code: 'MODEL_NOT_FOUND', param: 'model', type: 'invalid_request_error' });
  assert.match(unknown.message, 'gpt-9');
  const tools = await rejects(client.chat.completions.create({ model: 'tiny', messages: user('x'), tools: [{ type: 'function', function: { name: 'f' } }] }), BadRequestError, { code: 'REQUEST_INVALID', param: 'tools' });
  assert.equal(Object.keys(tools.error as object).sort(), ['code', 'message', 'param', 'type']);
  const long = await rejects(client.completions.create({ model: 'tiny', prompt: 'a'.repeat(5000) }), BadRequestError, { code: 'CONTEXT_LENGTH_EXCEEDED', param: 'prompt' });
  assert.match(long.message, /5001 tokens.*4096/);
});

test('the client retries a full router after the time it is told', async () => {
  const [decode] = stack.decode;
  let refusals = 0;
  decode!.script = (exchange, worker) => (refusals++ < 1 ? exchange.refuse(429, 'OVERLOADED') : scriptedGenerate(exchange, worker));
  const completion = await client.completions.create({ model: 'tiny', prompt: 'x' }, { maxRetries: 2 });
  assert.is(completion.choices[0]!.text, 'Hello world');
  assert.is(refusals, 2);
  decode!.script = (exchange) => exchange.refuse(429, 'OVERLOADED');
  const full = await rejects(client.completions.create({ model: 'tiny', prompt: 'x' }), RateLimitError, { code: 'OVERLOADED', type: 'rate_limit_error' });
  assert.match(full.headers!.get('retry-after')!, /^\d+$/);
});

test('aborting a stream at the client cancels decode', async () => {
  const [decode] = stack.decode;
  decode!.pace = 5;
  decode!.reply = () => 'x'.repeat(1000);
  const stream = await client.completions.create({ model: 'tiny', prompt: 'x', max_tokens: 1000, stream: true });
  let pieces = 0;
  for await (const _ of stream) if (++pieces === 3) break;
  await until(() => decode!.cancelled.length === 1, 'decode sees the cancellation');
  await until(async () => (await stack.state()).running === 0, 'nothing runs');
});

test('aborting by signal, and the client\'s own timeout, cancel both legs during prefill', async () => {
  const [prefill] = stack.prefill;
  const normal = prefill!.script;
  prefill!.script = ({ emit }) => emit({ event: 'started' });
  for (const options of [{ signal: AbortSignal.timeout(300) }, { timeout: 300 }]) {
    [prefill!.cancelled, stack.decode[0]!.cancelled] = [[], []];
    const error = await client.completions.create({ model: 'tiny', prompt: 'x' }, options).then(() => null, (thrown: unknown) => thrown);
    assert.ok(error instanceof APIUserAbortError || error instanceof APIConnectionTimeoutError, String(error));
    await until(() => prefill!.cancelled.length === 1 && stack.decode[0]!.cancelled.length === 1, 'both legs end');
  }
  prefill!.script = normal;
});

test('an error in mid-stream is thrown by the client, after the text that came before', async () => {
  stack.decode[0]!.script = async (exchange, worker) => {
    await worker.reserve(exchange);
    for (const token of tokensOf('par')) exchange.emit({ event: 'token', index: 0, token: { token, logprob: NaN, top: [] } });
    exchange.emit({ event: 'error', error: { message: 'the GPU fell off', type: 'server_error', param: null, code: 'INTERNAL' }, retryable: true });
    exchange.end();
  };
  let text = '';
  const error = await (async () => {
    for await (const chunk of await client.completions.create({ model: 'tiny', prompt: 'x', stream: true })) text += chunk.choices[0]!.text;
  })().then(() => null, (thrown: unknown) => thrown);
  assert.is(text, 'par');
  assert.instance(error, APIError);
  assert.equal((error as APIError).error, { message: 'the GPU fell off', type: 'server_error', param: null, code: 'INTERNAL' });
});

async function rejects<T extends APIError>(promise: Promise<unknown>, type: new (...args: never[]) => T, expected: Partial<T>): Promise<T> {
  const error = await promise.then(() => { throw new Error('no error'); }, (thrown: unknown) => thrown) as T;
  assert.instance(error, type, `${error}`);
  for (const [key, value] of Object.entries(expected)) assert.is(error[key as keyof T], value as T[keyof T], key);
  return error;
}

test.run();
