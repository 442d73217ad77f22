import { existsSync, mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { systemClock } from '../../src/clock.js';
import { loadRoleConfig } from '../../src/config/load.js';
import type { RoleName } from '../../src/config/types.js';
import { TplaError } from '../../src/errors.js';
import { WorkerClient } from '../../src/http/client.js';
import type { Service } from '../../src/up/stack_config.js';
import { Supervisor, type SupervisorEvent } from '../../src/up/supervisor.js';

const test = suite('up/supervisor');
const FIXTURE = fileURLToPath(new URL('fixture_service.ts', import.meta.url));

let dir: string;
test.before.each(() => { dir = mkdtempSync(join(tmpdir(), 'tpla-up-')); });
test.after.each(() => rmSync(dir, { recursive: true, force: true }));

const flagsOf: Record<RoleName, Record<string, string | string[]>> = {
  pool: {}, prefill: { model: 'm' }, decode: { model: 'm' }, route: { model: 'm', prefill: ['unix:/p'], decode: ['unix:/d'] },
};

/** Services by name; `words` tell the fixture what goes wrong. */
function supervise(services: { name: string; role: RoleName; words?: string[] }[], options: { startTimeoutMs?: number; firstMs?: number } = {}) {
  const events: SupervisorEvent[] = [];
  const words = new Map(services.map((service) => [service.name, service.words ?? []]));
  const socket = (name: string) => join(dir, `${name}.sock`);
  const supervisor = new Supervisor({
    services: services.map(({ name, role }): Service => {
      const listen = role === 'route' ? [`unix:${socket(name)}`] : `unix:${socket(name)}`;
      return { name, role, config: loadRoleConfig(role, { env: {}, flags: { ...flagsOf[role], listen, id: name } }) };
    }),
    directory: dir,
    startTimeoutMs: options.startTimeoutMs ?? 60_000,
    restart: { first_ms: options.firstMs ?? 20, max_ms: 100, reset_after_ms: 60_000 },
    clock: systemClock,
    onEvent: (event) => events.push(event),
    command: ({ name }) => [process.execPath, '--import', 'tsx', FIXTURE, socket(name), `id=${name}`, ...words.get(name)!],
  });
  const told = (kind: SupervisorEvent['kind'], name: string) => events.filter((event) => event.kind === kind && 'name' in event && event.name === name);
  const until = async (condition: () => boolean) => {
    for (const deadline = Date.now() + 60_000; !condition(); await new Promise((resolve) => setTimeout(resolve, 10))) {
      if (Date.now() > deadline) throw new Error(`nothing came of it: ${JSON.stringify(events)}`);
    }
  };
  return { supervisor, events, told, until, client: (name: string) => new WorkerClient(`unix:${socket(name)}`) };
}

/** Processes whose command line names a file of this test's directory. */
function processes(): string[] {
  return readdirSync('/proc').filter((pid) => {
    try {
      return /^\d+$/.test(pid) && readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes(dir);
    } catch {
      return false;
    }
  });
}

async function failure(start: Promise<void>): Promise<TplaError> {
  const error = await start.then(() => { throw new Error('it started'); }, (thrown: unknown) => thrown);
  assert.instance(error, TplaError);
  return error as TplaError;
}

test('starts the pool, then workers together, then route, each once the ones before are healthy; stops them all', async () => {
  const { supervisor, events } = supervise([
    { name: 'r', role: 'route' }, { name: 'd', role: 'decode', words: ['start=150'] }, { name: 'p', role: 'prefill' }, { name: 'k', role: 'pool', words: ['unhealthy=200'] },
  ]);
  await supervisor.start();
  const story = events.filter(({ kind }) => kind !== 'line').map((event) => (event.kind === 'starting' ? `start ${[...event.names].sort().join('+')}` : `${event.kind} ${'name' in event ? event.name : ''}`));
  assert.equal(story.map((line) => line.replace(/ready [dp]$/, 'ready worker')), ['start k', 'ready k', 'start d+p', 'ready worker', 'ready worker', 'start r', 'ready r']);
  assert.equal(supervisor.addressesOf('d'), [`unix:${join(dir, 'd.sock')}`]);
  assert.is(processes().length, 4);
  await supervisor.stop();
  assert.equal(processes(), []);
  assert.equal(readdirSync(dir).filter((name) => name.endsWith('.sock')), []);
});

test('a service that cannot start ends the start, with its own code and words', async () => {
  const { supervisor } = supervise([{ name: 'k', role: 'pool' }, { name: 'd', role: 'decode', words: ['refuse=another model'] }, { name: 'p', role: 'prefill' }]);
  const error = await failure(supervisor.start());
  assert.is(error.code, 'HANDSHAKE_REFUSED');
  assert.match(error.message, 'd ended with status 76 while starting; its last lines:\n  tpla: HANDSHAKE_REFUSED: another model');
  await supervisor.stop();
  assert.equal(processes(), []);
});

test('a service that takes too long ends the start', async () => {
  const { supervisor } = supervise([{ name: 'k', role: 'pool', words: ['start=60000'] }], { startTimeoutMs: 1000 });
  assert.match((await failure(supervisor.start())).message, 'k is not ready after 1000 ms (start_timeout_ms)');
  supervisor.kill();
  await supervisor.stop();
  assert.equal(processes(), []);
});

test('a crash is told with its status and last lines, and the service comes back', async () => {
  const { supervisor, told, until, client } = supervise([{ name: 'k', role: 'pool' }]);
  await supervisor.start();
  const worker = client('k');
  await worker.json('POST', '/crash', {}).catch(() => undefined);
  await until(() => told('ready', 'k').length === 2);
  const [ended] = told('ended', 'k') as Extract<SupervisorEvent, { kind: 'ended' }>[];
  assert.is(ended?.exit.status, 9);
  assert.match(ended?.exit.lastLines.at(-1) ?? '', 'about to crash');
  assert.is(ended?.restartMs, 20);
  assert.equal(await worker.json('GET', '/health'), { status: 'ok' });
  await worker.close();
  await supervisor.stop();
  assert.equal(processes(), []);
});

test('kill -9 is told as a signal; what keeps failing is tried ever more rarely, and stops with the rest', async () => {
  const flag = join(dir, 'second');
  const { supervisor, told, until } = supervise([{ name: 'k', role: 'pool', words: [`refuseAgain=${flag}`] }]);
  await supervisor.start();
  assert.ok(existsSync(flag));
  process.kill(Number(processes()[0]), 'SIGKILL');
  await until(() => told('ended', 'k').length === 5);
  const ends = told('ended', 'k') as Extract<SupervisorEvent, { kind: 'ended' }>[];
  assert.is(ends[0]?.exit.signal, 'SIGKILL');
  assert.equal(ends.map(({ restartMs }) => restartMs), [20, 40, 80, 100, 100]);
  assert.match(ends[4]?.exit.lastLines.join('\n') ?? '', 'IO_FAILED: not a second time');
  await supervisor.stop();
  assert.equal(processes(), []);
});

test('services are in process groups of their own', async () => {
  const { supervisor } = supervise([{ name: 'k', role: 'pool' }]);
  await supervisor.start();
  const [pid] = processes();
  const group = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]?.split(' ')[2];
  assert.is(group, pid);
  await supervisor.stop();
});

test.run();
