import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { request as httpRequest, type IncomingMessage } from 'node:http';
import { connect } from 'node:net';
import { join } from 'node:path';
import { request as undici, Agent } from 'undici';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { tokensOf } from '../../support/fake_workers.js';
import { RouterStack, until, writeModel } from '../../support/router_stack.js';

const test = suite('roles/router http surface');
let stack: RouterStack;

test.before(async () => { stack = await RouterStack.start(); });
test.after(() => stack.stop());

const completion = { model: 'tiny', prompt: 'say', max_tokens: 50 };

/** Every error has the four keys of OpenAI's error object and nothing else. */
async function errorOf(response: { json(): Promise<unknown> }): Promise<{ message: string; type: string; param: string | null; code: string }> {
  const body = await response.json() as { error: { message: string; type: string; param: string | null; code: string } };
  assert.equal(Object.keys(body), ['error']);
  assert.equal(Object.keys(body.error).sort(), ['code', 'message', 'param', 'type']);
  return body.error;
}

test('bodies that are no request: 400, and the next request is served', async () => {
  const bodies: [string, string, RegExp][] = [
    ['{"model": "tiny", ', 'application/json', /JSON/],
    ['', 'application/json', /empty/],
    ['[1, 2]', 'application/json', /must be a JSON object; got \[1,2\]/],
    ['null', 'application/json', /must be a JSON object; got null/],
    ['model=tiny&prompt=x', 'application/x-www-form-urlencoded', /Unsupported Media Type/],
    ['{"__proto__": {"model": "tiny"}, "prompt": "x"}', 'application/json', /JSON|prototype/i],
  ];
  for (const [body, type, message] of bodies) {
    const response = await stack.post('/v1/completions', body, { headers: { 'content-type': type } });
    assert.is(response.status, 400, body);
    const error = await errorOf(response);
    assert.match(error.message, message);
    assert.equal([error.type, error.code, error.param], ['invalid_request_error', 'REQUEST_INVALID', null]);
  }
  assert.is((await stack.post('/v1/completions', completion)).status, 200);
});

test('unknown endpoints and methods', async () => {
  for (const [path, init] of [['/v1/embeddings', { method: 'POST' }], ['/', {}], ['/v1/completions', { method: 'GET' }]] as const) {
    const response = await fetch(stack.url + path, init);
    assert.is(response.status, 404);
    assert.is((await errorOf(response)).code, 'NOT_FOUND');
  }
});

test('a body of 100 MB is refused before it is read, with its length announced or not', async () => {
  const announced = httpRequest(`${stack.url}/v1/completions`, { method: 'POST', headers: { 'content-type': 'application/json', 'content-length': 100_000_000 } });
  announced.on('error', () => {});
  announced.flushHeaders();
  const [refusal] = await once(announced, 'response') as [IncomingMessage];
  assert.is(refusal.statusCode, 413);
  announced.destroy();

  for (const headers of [{ 'content-length': '100000000' }, {}] as Record<string, string>[]) {
    const { status, body, sent } = await pour(100_000_000, headers);
    assert.is(status, 413);
    assert.match(body, /larger than 1000000 bytes/);
    assert.match(body, /REQUEST_TOO_LARGE/);
    assert.ok(sent < 100_000_000, `${sent} bytes were taken`);
  }
  assert.is((await stack.post('/v1/completions', completion)).status, 200);
});

/** Sends `bytes` as fast as they are taken, until an answer comes. */
async function pour(bytes: number, headers: Record<string, string>): Promise<{ status: number | undefined; body: string; sent: number }> {
  const message = httpRequest(`${stack.url}/v1/completions`, { method: 'POST', headers: { 'content-type': 'application/json', ...headers } });
  const response = once(message, 'response') as Promise<[IncomingMessage]>;
  let answered = false;
  let taken = () => {};
  for (const event of ['response', 'error', 'close']) message.on(event, () => { answered = true; taken(); });
  message.on('drain', () => taken());
  const piece = Buffer.alloc(65_536, 0x20);
  let sent = 0;
  for (; !answered && sent < bytes; sent += piece.length) {
    if (!message.write(piece)) await new Promise<void>((resolve) => { taken = resolve; });
  }
  const [answer] = await response;
  let body = '';
  for await (const chunk of answer) body += String(chunk);
  message.destroy();
  return { status: answer.statusCode, body, sent };
}

test('many clients that go away at any moment leave nothing behind', async () => {
  stack.decode[0]!.pace = 3;
  const agent = new Agent({ connections: 50 });
  await Promise.all(Array.from({ length: 60 }, async (_, i) => {
    const abort = new AbortController();
    setTimeout(() => abort.abort(), i * 2);
    await undici(`${stack.url}/v1/completions`, { method: 'POST', dispatcher: agent, signal: abort.signal, headers: { 'content-type': 'application/json' }, body: JSON.stringify({ ...completion, stream: i % 2 === 0 }) })
      .then(({ body }) => body.text()).catch(() => {});
  }));
  await agent.close();
  stack.decode[0]!.pace = 0;
  await until(async () => (await stack.state()).running === 0, 'nothing runs');
  assert.equal((await stack.state()).workers.map(({ legs, health }) => [legs, health]), [[0, 'up'], [0, 'up']]);
});

test('a request that is cut off in its body harms nobody', async () => {
  const { hostname, port } = new URL(stack.url);
  const socket = connect(Number(port), hostname);
  socket.write('POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"model"');
  socket.end();
  socket.resume();
  await once(socket, 'close');
  assert.is((await stack.post('/v1/completions', completion)).status, 200);
});

test('the context length: both numbers, for texts, tokens, conversations and max_tokens', async () => {
  const cases: [string, unknown, string, RegExp][] = [
    ['/v1/completions', { ...completion, prompt: 'a'.repeat(4096) }, 'prompt', /4097 tokens.* 4096/],
    ['/v1/completions', { ...completion, prompt: Array(4096).fill(5) }, 'prompt', /4096 tokens.* 4096/],
    ['/v1/completions', { ...completion, prompt: ['a', 'b'.repeat(5000)] }, 'prompt[1]', /5001 tokens.* 4096/],
    ['/v1/completions', { ...completion, prompt: 'c'.repeat(900_000) }, 'prompt', /at least \d+ tokens.* 4096/],
    ['/v1/chat/completions', { model: 'tiny', messages: [{ role: 'user', content: 'd'.repeat(4096) }] }, 'messages', /41\d\d tokens.* 4096/],
    ['/v1/completions', { ...completion, max_tokens: 5000 }, 'max_tokens', /4096 tokens; 5004 are asked for, 4 of them in the prompt and 5000 to be generated; lower max_tokens to 4092/],
  ];
  for (const [path, body, param, message] of cases) {
    const response = await stack.post(path, body);
    assert.is(response.status, 400);
    const error = await errorOf(response);
    assert.equal([error.code, error.param], ['CONTEXT_LENGTH_EXCEEDED', param]);
    assert.match(error.message, message);
  }
  const full = await stack.post('/v1/completions', { ...completion, prompt: Array(4095).fill(5), max_tokens: 1 });
  assert.is(full.status, 200);
});

test('a context that decode workers were set up smaller for is what counts', async () => {
  stack.decode[0]!.state.context_length = 100;
  await until(async () => (await stack.state() as unknown as { context_length: number }).context_length === 100, 'the worker\'s limit is known');
  const response = await stack.post('/v1/completions', { ...completion, prompt: 'a'.repeat(100), max_tokens: 1 });
  assert.match((await errorOf(response)).message, /101 tokens.* 100/);
  stack.decode[0]!.state.context_length = 4096;
  await until(async () => (await stack.state() as unknown as { context_length: number }).context_length === 4096, 'and back');
});

test('tokenize and detokenize', async () => {
  const json = async (path: string, body: unknown) => (await stack.post(path, body)).json();
  assert.equal(await json('/tokenize', { model: 'tiny', prompt: 'the é' }), { tokens: [0, ...tokensOf('t'), 2 + 256 + 1, ...tokensOf(' é')], count: 6, max_model_len: 4096 });
  assert.equal(await json('/tokenize', { prompt: 'x', add_special_tokens: false, return_token_strs: true }), { tokens: tokensOf('x'), count: 1, max_model_len: 4096, token_strs: ['x'] });
  const chat = await json('/tokenize', { messages: [{ role: 'user', content: 'x' }], add_generation_prompt: false }) as { tokens: number[] };
  assert.equal(await json('/detokenize', { tokens: chat.tokens }), { prompt: '[user]x' });
  assert.equal(await json('/detokenize', { tokens: [0, ...tokensOf('é')] }), { prompt: '<｜begin▁of▁sentence｜>é' });
  for (const [path, body, param] of [['/tokenize', {}, 'prompt'], ['/tokenize', { prompt: 'x', messages: [] }, 'prompt'], ['/detokenize', { tokens: [1, 320] }, 'tokens[1]'], ['/detokenize', {}, 'tokens']] as const) {
    const response = await stack.post(path, body);
    assert.is(response.status, 400);
    assert.is((await errorOf(response)).param, param);
  }
});

test('health, state and metrics', async () => {
  assert.equal(await (await fetch(`${stack.url}/health`)).json(), { status: 'ok' });
  const state = await stack.state();
  assert.equal(state.workers.map(({ role, health }) => [role, health]), [['decode', 'up'], ['prefill', 'up']]);
  assert.equal(state.model, { name: 'tiny', fingerprint: '0123456789abcdef', reparam: 'none' });
  await stack.post('/v1/completions', completion);
  await stack.post('/v1/completions', { ...completion, stream: true }).then((response) => response.text());
  await stack.post('/v1/completions', { ...completion, model: 'other' });
  const metrics = await stack.metrics();
  const value = (name: string) => Number(new RegExp(`^${name.replace(/[{}"/]/g, '\\$&')} (\\S+)$`, 'm').exec(metrics)?.[1]);
  assert.ok(value('tpla_route_requests_total{endpoint="/v1/completions",code="ok"}') >= 2);
  assert.is(value('tpla_route_errors_total{code="MODEL_NOT_FOUND"}'), 1);
  assert.ok(value('tpla_route_errors_total{code="REQUEST_TOO_LARGE"}') >= 2);
  for (const histogram of ['ttft', 'tpot', 'e2e']) assert.ok(value(`tpla_route_${histogram}_seconds_count`) >= 2, histogram);
  assert.is(value('tpla_route_in_flight'), 0);
  assert.is(metrics.match(/^tpla_route_worker_up\{.*\} 1$/gm)!.length, 2);
  assert.ok(value('tpla_route_prompt_tokens_total{source="computed"}') > 0);
  assert.ok(value('tpla_route_generated_tokens_total') > 0);
});

test('every answer has a request id', async () => {
  for (const stream of [false, true]) {
    const response = await stack.post('/v1/completions', { ...completion, stream });
    assert.match(response.headers.get('x-request-id')!, /^cmpl-[0-9a-f]{32}$/);
    assert.ok((await response.text()).includes(response.headers.get('x-request-id')!));
  }
});

test('generation_config.json gives the defaults; do_sample false is greedy; its ends of text count', async () => {
  const other = new RouterStack();
  try {
    writeModel(join(other.dir, 'tiny'), { temperature: 0.6, top_p: 0.95, top_k: 20, eos_token_id: [1, 9] });
    await other.startWorkers({ decode: 1, prefill: 1 });
    await other.startRouter();
    await other.post('/v1/completions', completion);
    await other.post('/v1/completions', { ...completion, temperature: 0, top_k: -1 });
    await other.role.close();
    writeModel(join(other.dir, 'tiny'), { do_sample: false });
    await other.startRouter();
    await other.post('/v1/completions', completion);
    const [first, second, third] = other.decode[0]!.requests.map(({ sampling, stop_token_ids }) => ({ ...sampling, stop_token_ids }));
    assert.equal([first!.temperature, first!.top_p, first!.top_k, first!.stop_token_ids], [0.6, 0.95, 20, [1, 9]]);
    assert.equal([second!.temperature, second!.top_k], [0, 0]);
    assert.is(third!.temperature, 0);
  } finally {
    await other.stop();
  }
});

test('it listens on TCP and on Unix sockets at once, and cleans up after itself', async () => {
  const other = new RouterStack();
  const path = join(other.dir, 'route.sock');
  try {
    await other.startWorkers({ decode: 1, prefill: 1 });
    await other.startRouter({ listen: ['tcp://127.0.0.1:0', `unix:${path}`] });
    assert.is(other.role.addresses[1], `unix:${path}`);
    assert.is((await fetch(`${other.url}/health`)).status, 200);
    const message = httpRequest({ socketPath: path, path: '/health' });
    message.end();
    const [response] = await once(message, 'response') as [IncomingMessage];
    assert.is(response.statusCode, 200);
    response.resume();
    await once(response, 'end');
    await other.role.close();
    assert.not.ok(existsSync(path));
  } finally {
    await other.stop();
  }
});

test('a taken port or socket path: ADDRESS_IN_USE, and nothing half-started is left', async () => {
  const other = new RouterStack();
  const path = join(other.dir, 'route.sock');
  try {
    await other.startWorkers({ decode: 1, prefill: 1 });
    const taken = stack.role.addresses[0]!;
    const error = await other.startRouter({ listen: [`unix:${path}`, taken] }).then(() => null, (thrown: { code: string; message: string }) => thrown);
    assert.is(error?.code, 'ADDRESS_IN_USE');
    assert.match(error!.message, taken);
    assert.not.ok(existsSync(path));
    await other.startRouter({ listen: [`unix:${path}`] });
    const second = new RouterStack();
    await second.startWorkers({ decode: 1, prefill: 1 });
    const refused = await second.startRouter({ listen: [`unix:${path}`] }).then(() => null, (thrown: { code: string }) => thrown);
    await second.stop();
    assert.is(refused?.code, 'ADDRESS_IN_USE');
  } finally {
    await other.stop();
  }
});

test.run();
