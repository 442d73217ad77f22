import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { spawnSync } from 'node:child_process';
import { pino } from 'pino';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import { createHttpServer, listen, ndjsonStream } from '../../src/http/server.js';

const test = suite('http/server');
const dir = mkdtempSync(join(tmpdir(), 'tpla-server-'));
const log = pino({ level: 'silent' });
const open: { close(): unknown }[] = [];

function server(seen: string[] = []) {
  const app = createHttpServer({ log, maxBodyBytes: 100, onError: ({ code }) => seen.push(code) });
  open.push(app);
  return app;
}
test.after.each(async () => { for (const app of open.splice(0)) await app.close(); });
test.after(() => rmSync(dir, { recursive: true }));

test('a client that is still sending reads why its body is refused', async () => {
  const app = server();
  app.post('/', async () => ({}));
  const address = await listen(app, 'tcp://127.0.0.1:0');
  const response = await fetch(address.replace('tcp:', 'http:'), { method: 'POST', headers: { 'content-type': 'application/json' }, body: 'x'.repeat(50_000_000) });
  assert.is(response.status, 413);
  assert.is((await response.json() as { error: { code: string } }).error.code, 'REQUEST_TOO_LARGE');
});

test('whatever a handler throws becomes an error object with its status', async () => {
  const seen: string[] = [];
  const app = server(seen);
  app.get('/coded', () => { throw new TplaError('OVERLOADED', 'full', { retryAfterSeconds: 3 }); });
  app.get('/native', () => { throw Object.assign(new Error('no room'), { code: 'OUT_OF_MEMORY' }); });
  app.get('/bug', () => { throw new TypeError('x is undefined'); });
  const coded = await app.inject('/coded');
  assert.equal([coded.statusCode, coded.headers['retry-after'], coded.json()], [429, '3', { error: { message: 'full', type: 'rate_limit_error', param: null, code: 'OVERLOADED' } }]);
  assert.is((await app.inject('/native')).statusCode, 503);
  const bug = await app.inject('/bug');
  assert.equal([bug.statusCode, bug.json().error.code], [500, 'INTERNAL']);
  assert.is((await app.inject('/none')).json().error.code, 'NOT_FOUND');
  assert.is((await app.inject({ method: 'POST', url: '/none', payload: 'x'.repeat(200) })).statusCode, 404);
  assert.equal(seen, ['OVERLOADED', 'OUT_OF_MEMORY', 'INTERNAL', 'NOT_FOUND', 'NOT_FOUND']);
});

test('a socket that a killed process left is replaced; its mode lets the group in', async () => {
  const path = join(dir, 'stale.sock');
  spawnSync(process.execPath, ['-e', `require('net').createServer().listen(${JSON.stringify(path)}, () => process.kill(process.pid, 'SIGKILL'))`]);
  assert.ok(existsSync(path));
  assert.is(await listen(server(), `unix:${path}`), `unix:${path}`);
  assert.is(statSync(path).mode & 0o777, 0o660);
});

test('a socket that answers, a file that is no socket, and a taken port are in use', async () => {
  const failure = (address: string) => listen(server(), address).then(() => null, (thrown: TplaError) => [thrown.code, thrown.message]);
  const path = join(dir, 'live.sock');
  await listen(server(), `unix:${path}`);
  assert.equal(await failure(`unix:${path}`), ['ADDRESS_IN_USE', `unix:${path} is in use by another process; stop it or choose another address`]);
  const file = join(dir, 'notes.txt');
  writeFileSync(file, 'keep me');
  assert.is((await failure(`unix:${file}`))![0], 'ADDRESS_IN_USE');
  assert.ok(existsSync(file));
  const taken = createServer().listen(0, '127.0.0.1');
  open.push(taken);
  await once(taken, 'listening');
  const { port } = taken.address() as { port: number };
  assert.equal(await failure(`tcp://127.0.0.1:${port}`), ['ADDRESS_IN_USE', `tcp://127.0.0.1:${port} is in use by another process; stop it or choose another address`]);
  assert.is((await failure(`unix:${dir}/none/x.sock`))![0], 'IO_FAILED');
});

test('a line stream knows when its reader leaves early, and not when it has ended', async () => {
  const app = server();
  const left: string[] = [];
  app.get<{ Params: { end: string } }>('/:end', (request, reply) => {
    const stream = ndjsonStream(reply);
    stream.closed.addEventListener('abort', () => left.push(request.params.end));
    stream.write({ n: 1 });
    if (request.params.end === 'ends') stream.end();
  });
  const address = (await listen(app, 'tcp://127.0.0.1:0')).replace('tcp', 'http');
  assert.is(await (await fetch(`${address}/ends`)).text(), '{"n":1}\n');
  const abort = new AbortController();
  const open = await fetch(`${address}/open`, { signal: abort.signal });
  await open.body!.getReader().read();
  abort.abort();
  for (let i = 0; i < 200 && left.length === 0; i++) await new Promise((resolve) => setTimeout(resolve, 10));
  assert.equal(left, ['open']);
});

test.run();
