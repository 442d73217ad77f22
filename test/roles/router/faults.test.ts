import { once } from 'node:events';
import { connect } from 'node:net';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { blockIds } from '../../../src/kv/hash.js';
import { deliver, pause, scriptedGenerate, tokensOf, type FakeDecode, type GenerateScript } from '../../support/fake_workers.js';
import { RouterStack, sseData, until } from '../../support/router_stack.js';

/** What breaks behind route, and in front of it. */
const test = suite('roles/router faults');
let stack: RouterStack;
test.after.each(() => stack.stop());

const completion = { model: 'tiny', prompt: 'say', max_tokens: 50 };
const text = async (response: Response) => ((await response.json()) as { choices: { text: string }[] }).choices.map((choice) => choice.text);
const error = async (response: Response) => ((await response.json()) as { error: { code: string; message: string } }).error;
const idle = () => until(async () => (await stack.state()).running === 0, 'nothing runs');
const token = (id: number, index = 0) => ({ event: 'token' as const, index, token: { token: id, logprob: NaN, top: [] } });

/** A stack whose first prefill or decode worker is a process; so many others of that role are in this process. */
async function withChild(role: 'prefill' | 'decode', others: number, tokens = 0) {
  stack = new RouterStack();
  const path = join(stack.dir, 'child.sock');
  const child = await stack.child({ role, path, tokens });
  await stack.startWorkers({ decode: 1, prefill: 1, [role]: others });
  const workers = { prefill: stack.prefill.map(({ address }) => address), decode: stack.decode.map(({ address }) => address) };
  workers[role].unshift(`unix:${path}`);
  await stack.startRouter(workers);
  return child;
}

test('kill -9 of prefill in the middle of a hand-off: the request moves to another prefill worker, its first reservation is cancelled', async () => {
  const child = await withChild('prefill', 1);
  const [decode] = stack.decode;
  const response = stack.post('/v1/completions', { ...completion, stream: true });
  await until(() => decode!.requests.length === 1, 'decode has reserved');
  await pause(50);
  child.kill('SIGKILL');
  const data = sseData(await (await response).text());
  assert.is(data.pop(), '[DONE]');
  assert.is(data.map((event) => JSON.parse(event).choices[0].text).join(''), 'Hello world');
  assert.equal(decode!.cancelled, [decode!.requests[0]!.id]);
  assert.is(decode!.requests.length, 2);
  assert.is.not(decode!.requests[0]!.id, decode!.requests[1]!.id);
  assert.equal((await stack.state()).workers.filter(({ health }) => health === 'down').map(({ role }) => role), ['prefill']);
  assert.match(await stack.metrics(), /tpla_route_retries_total\{leg="prefill"\} 1/);
});

test('kill -9 of the only prefill: one clear error, quickly, and nothing left running', async () => {
  const child = await withChild('prefill', 0);
  const [decode] = stack.decode;
  const response = stack.post('/v1/completions', completion);
  await until(() => decode!.requests.length === 1, 'decode has reserved');
  await pause(50);
  child.kill('SIGKILL');
  const answer = await response;
  assert.is(answer.status, 503);
  const { code, message } = await error(answer);
  assert.is(code, 'NO_WORKER');
  assert.match(message, /no prefill worker is up: unix:.*child\.sock is down/);
  await until(() => decode!.cancelled.length === 1, 'the reservation is cancelled');
  await idle();
});

test('kill -9 of decode in mid-stream: the text so far, an error event, no [DONE]', async () => {
  const child = await withChild('decode', 0, 3);
  const response = await stack.post('/v1/chat/completions', { model: 'tiny', messages: [{ role: 'user', content: 'x' }], stream: true });
  assert.is(response.status, 200);
  const reader = response.body!.getReader();
  let body = '';
  const decoder = new TextDecoder();
  while (!body.includes('"c"')) body += decoder.decode((await reader.read()).value);
  child.kill('SIGKILL');
  for (let step = await reader.read(); !step.done; step = await reader.read()) body += decoder.decode(step.value);
  const data = sseData(body).map((event) => JSON.parse(event));
  const last = data.pop();
  assert.equal(Object.keys(last), ['error']);
  assert.equal(Object.keys(last.error).sort(), ['code', 'message', 'param', 'type']);
  assert.is(last.error.code, 'WORKER_FAILED');
  assert.match(last.error.message, 'child.sock');
  assert.is(data.map(({ choices }) => choices[0].delta.content).join(''), 'abc');
  await idle();
});

test('kill -9 of decode under a request that is not streamed: nobody has seen a token, so another worker answers', async () => {
  const child = await withChild('decode', 1, 3);
  const [healthy] = stack.decode;
  healthy!.state.running = 50;
  await healthy!.polled();
  const response = stack.post('/v1/completions', completion);
  await until(async () => (await stack.state()).workers[0]!.legs === 1, 'it runs on the child');
  await pause(100);
  child.kill('SIGKILL');
  assert.equal(await text(await response), ['Hello world']);
});

test('a worker that stops answering without closing anything is found out by its health', async () => {
  const child = await withChild('decode', 0, 2);
  // the answer begins with its first token
  const response = await stack.post('/v1/completions', { ...completion, stream: true });
  child.kill('SIGSTOP');
  const data = sseData(await response.text());
  assert.is(JSON.parse(data.at(-1)!).error.code, 'WORKER_FAILED');
  assert.match(JSON.parse(data.at(-1)!).error.message, 'went down');
});

test('a worker that never was there is passed over', async () => {
  stack = await RouterStack.start();
  const here = stack.decode[0]!;
  await stack.role.close();
  await stack.startRouter({ decode: ['unix:/nowhere/decode.sock', here.address] });
  for (let i = 0; i < 3; i++) assert.equal(await text(await stack.post('/v1/completions', completion)), ['Hello world']);
});

test('no worker at all: 503 that says what is wrong with each, and /health says unavailable', async () => {
  stack = await RouterStack.start();
  await stack.role.close();
  await stack.startRouter({ decode: ['unix:/nowhere/decode.sock'] });
  const response = await stack.post('/v1/completions', completion);
  assert.is(response.status, 503);
  assert.match((await error(response)).message, /no decode worker is up: unix:\/nowhere\/decode.sock is down \(.*ENOENT/);
  const health = await fetch(`${stack.url}/health`);
  assert.equal([health.status, await health.json()], [503, { status: 'unavailable' }]);
});

test('a worker of another reparameterisation is not used, and /state says why', async () => {
  stack = await RouterStack.start({ decode: 2 });
  stack.decode[1]!.state.model.reparam = 'pca-2';
  await until(async () => (await stack.state()).workers[1]!.health === 'refused', 'refused');
  for (let i = 0; i < 3; i++) await stack.post('/v1/completions', completion);
  assert.is(stack.decode[1]!.requests.length, 0);
  assert.match((await stack.state()).workers[1]!.reason!, 'pca-2');
});

test('a hand-off that decode reports as failed is tried again with another prefill worker', async () => {
  stack = await RouterStack.start({ prefill: 2 });
  const [decode] = stack.decode;
  for (const prefill of stack.prefill) prefill.script = ({ emit }) => emit({ event: 'started' });
  decode!.script = async (exchange) => {
    if (decode!.requests.length > 1) return scriptedGenerate(exchange, decode!);
    exchange.emit({ event: 'reserved', cached_tokens: 0, ticket: { address: decode!.address, session: 'x', tokens: [0, 4] } });
    await until(() => stack.prefill.some(({ requests }) => requests.length > 0), 'prefill has begun');
    for (const prefill of stack.prefill) prefill.script = deliver;
    exchange.emit({ event: 'error', error: { message: 'page 3 does not match', type: 'server_error', param: null, code: 'CHECKSUM_MISMATCH' }, retryable: true });
    exchange.end();
  };
  assert.equal(await text(await stack.post('/v1/completions', completion)), ['Hello world']);
  assert.equal(stack.prefill.map(({ requests }) => requests.length), [1, 1]);
});

test('retries end: as many attempts as allowed, then the last error', async () => {
  stack = await RouterStack.start({ retries: 2 });
  const [decode] = stack.decode;
  decode!.script = (exchange) => exchange.refuse(502, 'HANDOFF_FAILED', 'cannot map the pages');
  const response = await stack.post('/v1/completions', completion);
  assert.is(response.status, 502);
  const { code, message } = await error(response);
  assert.equal([code, message], ['HANDOFF_FAILED', 'cannot map the pages']);
  assert.is(decode!.requests.length, 3);
});

test('an error that would come anywhere is not tried again', async () => {
  stack = await RouterStack.start({ decode: 2 });
  for (const decode of stack.decode) decode.script = (exchange) => exchange.refuse(400, 'CONTEXT_LENGTH_EXCEEDED', 'too long for these pages');
  const response = await stack.post('/v1/completions', completion);
  assert.is(response.status, 400);
  assert.is(stack.decode[0]!.requests.length + stack.decode[1]!.requests.length, 1);
});

test('after a token was sent nothing is tried again', async () => {
  stack = await RouterStack.start({ decode: 2 });
  const breaking: GenerateScript = async (exchange, worker) => {
    await worker.reserve(exchange);
    exchange.emit(token(tokensOf('a')[0]!));
    await pause(50);
    exchange.destroy();
  };
  for (const decode of stack.decode) decode.script = breaking;
  const data = sseData(await (await stack.post('/v1/completions', { ...completion, stream: true })).text());
  assert.is(JSON.parse(data[0]!).choices[0].text, 'a');
  assert.is(JSON.parse(data.at(-1)!).error.code, 'WORKER_FAILED');
  assert.is(stack.decode[0]!.requests.length + stack.decode[1]!.requests.length, 1);
});

test('a worker that talks nonsense, or ends too early, is not believed', async () => {
  stack = await RouterStack.start({ decode: 1 });
  const [decode] = stack.decode;
  const nonsense: GenerateScript[] = [
    (exchange) => { exchange.emit('{"event":' as never); exchange.end(); },
    (exchange) => { exchange.emit({ event: 'reserved', ticket: null, cached_tokens: 4 }); exchange.end(); },
  ];
  decode!.script = (exchange, worker) => (nonsense[worker.requests.length - 1] ?? scriptedGenerate)(exchange, worker);
  assert.equal(await text(await stack.post('/v1/completions', completion)), ['Hello world']);
  assert.is(decode!.requests.length, 3);
});

test('a full worker is passed over, which is no retry; when all are full: 429 with Retry-After', async () => {
  stack = await RouterStack.start({ decode: 3, retries: 0 });
  const full: GenerateScript = (exchange) => exchange.refuse(429, 'OVERLOADED');
  for (const decode of stack.decode.slice(0, 2)) decode.script = full;
  assert.equal(await text(await stack.post('/v1/completions', completion)), ['Hello world']);
  stack.decode[2]!.script = full;
  const before = stack.decode.map(({ requests }) => requests.length);
  const response = await stack.post('/v1/completions', completion);
  assert.equal([response.status, (await error(response)).code], [429, 'OVERLOADED']);
  assert.match(response.headers.get('retry-after')!, /^[1-9]\d*$/);
  assert.equal(stack.decode.map(({ requests }, i) => requests.length - before[i]!), [1, 1, 1]);
});

test('a prefill worker that is full leaves the reservation to the next', async () => {
  stack = await RouterStack.start({ prefill: 2, retries: 0 });
  stack.prefill[0]!.script = (exchange) => exchange.refuse(429, 'OVERLOADED');
  for (let i = 0; i < 2; i++) assert.equal(await text(await stack.post('/v1/completions', completion)), ['Hello world']);
  assert.is(stack.decode[0]!.requests.length, 2);
  assert.ok(stack.prefill[0]!.requests.length >= 1);
  stack.prefill[1]!.script = stack.prefill[0]!.script;
  const response = await stack.post('/v1/completions', completion);
  assert.equal([response.status, (await error(response)).code], [429, 'OVERLOADED']);
  assert.is(stack.decode[0]!.requests.length, 3);
  await until(() => stack.decode[0]!.cancelled.length === 1, 'the reservation is given back');
});

test('a prompt that decode holds already needs no prefill', async () => {
  stack = await RouterStack.start();
  const [decode] = stack.decode;
  decode!.script = async (exchange) => {
    exchange.emit({ event: 'reserved', ticket: null, cached_tokens: 3 });
    for (const id of tokensOf('hit')) exchange.emit(token(id));
    exchange.emit({ event: 'finish', index: 0, reason: 'length' });
    exchange.emit({ event: 'done', decode: { attention: 'mla', ranks: 1, tokens: 3, tpot_ms: 1, kv_bytes_per_token_per_rank: 1152, preemptions: 0 } });
    exchange.end();
  };
  const answer = await (await stack.post('/v1/completions', { ...completion, tpla_timings: true })).json() as { choices: { text: string }[]; usage: { prompt_tokens_details: { cached_tokens: number } }; tpla: { prefill: unknown; transfer: unknown } };
  assert.is(answer.choices[0]!.text, 'hit');
  assert.is(answer.usage.prompt_tokens_details.cached_tokens, 3);
  assert.equal([answer.tpla.prefill, answer.tpla.transfer], [null, null]);
  assert.is(stack.prefill[0]!.requests.length, 0);
});

test('requests with the same beginning go to the worker that has it; others spread', async () => {
  stack = await RouterStack.start({ decode: 2, prefill: 2 });
  const [a, b] = ['a'.repeat(700), 'b'.repeat(700)];
  for (const prompt of [a, b, `${a}1`, `${b}1`, `${a}2`, `${b}2`]) assert.is((await stack.post('/v1/completions', { ...completion, prompt })).status, 200);
  for (const workers of [stack.decode, stack.prefill] as { requests: { tokens: number[] }[] }[][]) {
    for (const { requests } of workers) {
      assert.is(requests.length, 3);
      assert.is(new Set(requests.map(({ tokens }) => tokens[1])).size, 1, 'one beginning per worker');
    }
  }
});

test('blocks that decode reports as cached draw requests to it', async () => {
  stack = await RouterStack.start({ decode: 2 });
  const prompt = [0, ...tokensOf('z'.repeat(640))];
  const target: FakeDecode = stack.decode[1]!;
  target.state.cached_blocks = blockIds(prompt, target.state.model, { dtype: 'bf16', pageTokens: 64, salt: '' });
  stack.decode[0]!.state.cached_blocks = [];
  await Promise.all(stack.decode.map((decode) => decode.polled()));
  for (let i = 0; i < 3; i++) await stack.post('/v1/completions', { ...completion, prompt: [...prompt, ...tokensOf(String(i))] });
  assert.equal(stack.decode.map(({ requests }) => requests.length), [0, 3]);
});

test('a request out of time is ended on both legs: 504', async () => {
  stack = await RouterStack.start({ request_timeout_ms: 300 });
  stack.prefill[0]!.script = ({ emit }) => emit({ event: 'started' });
  const response = await stack.post('/v1/completions', completion);
  assert.is(response.status, 504);
  assert.is((await error(response)).code, 'REQUEST_TIMEOUT');
  await until(() => stack.prefill[0]!.cancelled.length === 1 && stack.decode[0]!.cancelled.length === 1, 'both legs end');
});

test('drain finishes what runs, refuses what is new and says so', async () => {
  stack = await RouterStack.start();
  stack.decode[0]!.pace = 20;
  const running = stack.post('/v1/completions', { ...completion, stream: true });
  await until(() => stack.decode[0]!.requests.length === 1, 'it runs');
  let drained = false;
  const drain = stack.role.drain().then(() => {
    drained = true;
    return stack.role.close();
  });
  const refused = await stack.post('/v1/completions', completion);
  assert.equal([refused.status, (await error(refused)).code], [503, 'DRAINING']);
  assert.equal(await (await fetch(`${stack.url}/health`)).json(), { status: 'draining' });
  assert.not.ok(drained);
  assert.is(sseData(await (await running).text()).at(-1), '[DONE]');
  await drain;
});

test('close ends a running stream with an error event, at once', async () => {
  stack = await RouterStack.start();
  stack.decode[0]!.pace = 50;
  stack.decode[0]!.reply = () => 'x'.repeat(1000);
  const response = await stack.post('/v1/completions', { ...completion, max_tokens: 1000, stream: true });
  const reader = response.body!.getReader();
  let body = new TextDecoder().decode((await reader.read()).value);
  await stack.role.close();
  for (let step = await reader.read(); !step.done; step = await reader.read()) body += new TextDecoder().decode(step.value);
  assert.is(JSON.parse(sseData(body).at(-1)!).error.code, 'DRAINING');
  await until(() => stack.decode[0]!.cancelled.length === 1, 'decode is told');
});

test('a reader that does not read holds decode back instead of filling memory; when it goes, decode is told', async () => {
  stack = await RouterStack.start();
  await stack.role.close();
  const path = join(stack.dir, 'route.sock');
  await stack.startRouter({ listen: [`unix:${path}`] });
  const [decode] = stack.decode;
  let sent = 0;
  decode!.script = async (exchange, worker) => {
    await worker.reserve(exchange);
    for (; !exchange.isClosed() && sent < 1_000_000; sent++) {
      exchange.emit(token(tokensOf('x')[0]!));
      if (sent % 64 === 0) await exchange.drained();
    }
  };
  const body = JSON.stringify({ ...completion, max_tokens: 4000, stream: true });
  const socket = connect(path);
  socket.write(`POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`);
  await once(socket, 'readable');
  // the socket is not read from here on
  let before = -1;
  await until(async () => {
    const stalled = sent === before;
    before = sent;
    await pause(300);
    return stalled;
  }, 'decode is held back');
  assert.ok(sent < 50_000, `${sent} tokens were taken for a client that reads none`);
  socket.destroy();
  await until(() => decode!.cancelled.length === 1, 'decode is told');
});

test.run();
