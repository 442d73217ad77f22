import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type RequestListener, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import { WorkerClient, isConnectionFailure, isTimeout } from '../../src/http/client.js';

const test = suite('http/client');
const dir = mkdtempSync(join(tmpdir(), 'tpla-client-'));
let server: Server | null = null;
let client: WorkerClient;

test.after.each(async () => {
  await client.close();
  server?.closeAllConnections();
  server?.close();
  server = null;
});
test.after(() => rmSync(dir, { recursive: true }));

async function serve(listener: RequestListener, where: string | number = join(dir, 'worker.sock')): Promise<void> {
  server = createServer(listener).listen(where);
  await once(server, 'listening');
  client = new WorkerClient(typeof where === 'string' ? `unix:${where}` : `tcp://127.0.0.1:${(server.address() as AddressInfo).port}`);
}

async function failure(promise: Promise<unknown>): Promise<TplaError> {
  const error = await promise.then(() => { throw new Error('no error'); }, (thrown: unknown) => thrown);
  assert.instance(error, TplaError);
  return error as TplaError;
}

async function all<T>(stream: AsyncIterable<T>): Promise<T[]> {
  const items: T[] = [];
  for await (const item of stream) items.push(item);
  return items;
}

const echo: RequestListener = (request, response) => {
  let body = '';
  request.on('data', (chunk) => { body += chunk; });
  request.on('end', () => response.end(JSON.stringify({ method: request.method, url: request.url, body })));
};

test('JSON over a Unix socket and over TCP', async () => {
  await serve(echo);
  assert.equal(await client.json('POST', '/x', { a: 1 }), { method: 'POST', url: '/x', body: '{"a":1}' });
  await client.close();
  server!.close();
  await serve(echo, 0);
  assert.equal(await client.json('GET', '/y'), { method: 'GET', url: '/y', body: '' });
});

test('lines of a stream, however they are cut, UTF-8 included', async () => {
  const bytes = Buffer.from('{"text":"naïve 🙂"}\n\n{"n":1}\n{"n":2}');
  await serve(async (_request, response) => {
    for (const byte of bytes) {
      response.write(Buffer.of(byte));
      await new Promise((resolve) => setImmediate(resolve));
    }
    response.end();
  });
  assert.equal(await all(client.stream('/s', {})), [{ text: 'naïve 🙂' }, { n: 1 }, { n: 2 }]);
});

test('errors the worker answers keep code, message and param; others say what came', async () => {
  const answers: [number, string][] = [
    [400, '{"error":{"message":"too long","type":"t","param":"prompt","code":"CONTEXT_LENGTH_EXCEEDED"}}'],
    [500, 'Bad Gateway'],
    [500, '{"error":{"message":"x","code":"NOT_OURS"}}'],
  ];
  let next = 0;
  await serve((_request, response) => { const [status, body] = answers[next++]!; response.writeHead(status).end(body); });
  const own = await failure(all(client.stream('/s', {})));
  assert.equal([own.code, own.message, own.param], ['CONTEXT_LENGTH_EXCEEDED', 'too long', 'prompt']);
  const text = await failure(client.json('GET', '/'));
  assert.is(text.code, 'WORKER_FAILED');
  assert.match(text.message, /answered 500: Bad Gateway/);
  assert.not.ok(isConnectionFailure(text));
  assert.is((await failure(client.json('GET', '/'))).code, 'WORKER_FAILED');
});

test('nobody there, and a connection that breaks in mid-stream, are connection failures', async () => {
  client = new WorkerClient(`unix:${join(dir, 'nobody.sock')}`);
  const absent = await failure(client.json('GET', '/state'));
  assert.is(absent.code, 'WORKER_FAILED');
  assert.ok(isConnectionFailure(absent));
  await client.close();
  await serve((_request, response) => {
    response.write('{"n":1}\n{"n":');
    setTimeout(() => response.destroy(), 20);
  });
  const seen: unknown[] = [];
  const broken = await failure((async () => { for await (const line of client.stream('/s', {})) seen.push(line); })());
  assert.equal(seen, [{ n: 1 }]);
  assert.ok(isConnectionFailure(broken));
});

test('a line that is not JSON is a protocol error that names the worker', async () => {
  await serve((_request, response) => { response.end('<html>\n'); });
  const error = await failure(all(client.stream('/s', {})));
  assert.is(error.code, 'PROTOCOL');
  assert.match(error.message, /worker\.sock.*<html>/);
});

test('a time limit is told from a dead worker', async () => {
  await serve(() => {});
  const error = await failure(client.json('GET', '/state', undefined, { timeoutMs: 50 }));
  assert.is(error.code, 'WORKER_FAILED');
  assert.ok(isTimeout(error));
  assert.not.ok(isConnectionFailure(error));
});

test('aborting closes the connection and throws the reason; leaving the loop closes it too', async () => {
  let closed = 0;
  await serve((_request, response) => {
    response.on('close', () => closed++);
    response.write('{"n":1}\n');
  });
  const abort = new AbortController();
  const error = await failure((async () => {
    for await (const _ of client.stream('/s', {}, abort.signal)) abort.abort(new TplaError('REQUEST_TIMEOUT', 'time is up'));
  })());
  assert.equal([error.code, error.message], ['REQUEST_TIMEOUT', 'time is up']);
  for await (const _ of client.stream('/s', {})) break;
  for (let i = 0; i < 200 && closed < 2; i++) await new Promise((resolve) => setTimeout(resolve, 10));
  assert.is(closed, 2);
  const before = new AbortController();
  before.abort();
  assert.is((await failure(all(client.stream('/s', {}, before.signal)))).code, 'CANCELLED');
});

test.run();
