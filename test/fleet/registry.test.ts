import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Writable } from 'node:stream';
import { pino } from 'pino';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { systemClock } from '../../src/clock.js';
import { TplaError } from '../../src/errors.js';
import { WorkerRegistry } from '../../src/fleet/registry.js';
import type { ModelIdentity } from '../../src/model/spec.js';
import { FakeDecode, FakePrefill, IDENTITY } from '../support/fake_workers.js';
import { until } from '../support/router_stack.js';

const test = suite('fleet/registry');
const dir = mkdtempSync(join(tmpdir(), 'tpla-registry-'));
const opened: { stop(): Promise<void> }[] = [];
const registries: WorkerRegistry[] = [];

test.after.each(async () => {
  for (const registry of registries.splice(0)) await registry.close();
  for (const worker of opened.splice(0)) await worker.stop();
});
test.after(() => rmSync(dir, { recursive: true }));

async function decode(name: string, model: Partial<ModelIdentity> = {}): Promise<FakeDecode> {
  const worker = await new FakeDecode(join(dir, `${name}.sock`)).start();
  Object.assign(worker.state.model, model);
  opened.push(worker);
  return worker;
}

async function registryOf(workers: { role: 'prefill' | 'decode'; address: string }[], identity: ModelIdentity | null = null) {
  const lines: { msg: string; level: number }[] = [];
  const log = pino({ level: 'info' }, new Writable({ write(line: Buffer, _encoding, done) { lines.push(JSON.parse(line.toString())); done(); } }));
  const registry = new WorkerRegistry({ workers, identity, pollIntervalMs: 30, clock: systemClock, log });
  registries.push(registry);
  await registry.start();
  return { registry, lines };
}
const statuses = (registry: WorkerRegistry) => registry.workers.map(({ health }) => health.status);

test('after the first look every worker has a status; one that is missing may come later and go again', async () => {
  const [a, b] = [await decode('a'), new FakeDecode(join(dir, 'b.sock'))];
  const { registry } = await registryOf([a, b].map(({ address }) => ({ role: 'decode', address })));
  assert.equal(statuses(registry), ['up', 'down']);
  opened.push(await b.start());
  await until(() => statuses(registry)[1] === 'up', 'b comes up');
  assert.is(registry.usable('decode').length, 2);
  assert.is(registry.usable('prefill').length, 0);
  await a.stop();
  await until(() => statuses(registry)[0] === 'down', 'a goes down');
});

test('a worker of another model or reparameterisation is refused, logged once, and the reason names both', async () => {
  const workers = [await decode('a'), await decode('b', { reparam: 'pca-2' }), await decode('c', { fingerprint: 'feed' })];
  const { registry, lines } = await registryOf(workers.map(({ address }) => ({ role: 'decode', address })));
  assert.equal(statuses(registry), ['up', 'refused', 'refused']);
  assert.match(registry.workers[1]!.health.reason!, /reparameterisation pca-2.*expected.*reparameterisation none/);
  assert.match(registry.workers[2]!.health.reason!, /fingerprint feed.*expected.*fingerprint 0123456789abcdef/);
  await new Promise((resolve) => setTimeout(resolve, 150));
  assert.is(lines.filter(({ level }) => level === 50).length, 2);
  assert.equal(registry.identity, IDENTITY);
});

test('route\'s own identity counts more than that of the workers', async () => {
  const worker = await decode('a');
  const { registry } = await registryOf([{ role: 'decode', address: worker.address }], { ...IDENTITY, fingerprint: 'own' });
  assert.equal(statuses(registry), ['refused']);
});

test('when all workers of the adopted model are gone, another model may follow', async () => {
  const worker = await decode('a');
  const { registry } = await registryOf([{ role: 'decode', address: worker.address }]);
  worker.state.model.fingerprint = 'next';
  await until(() => registry.identity?.fingerprint === 'next', 'the new model is adopted');
  assert.equal(statuses(registry), ['up']);
});

test('a worker under the wrong role, and something that is no worker', async () => {
  const prefill = await new FakePrefill(join(dir, 'p.sock')).start();
  const other = await decode('o');
  (other as unknown as { state: unknown }).state = { status: 'fine' };
  opened.push(prefill);
  const { registry } = await registryOf([{ role: 'decode', address: prefill.address }, { role: 'decode', address: other.address }]);
  assert.equal(statuses(registry), ['refused', 'refused']);
  assert.match(registry.workers[0]!.health.reason!, 'listed under decode and is a prefill worker');
  assert.match(registry.workers[1]!.health.reason!, 'not that of a tpla worker');
});

test('a draining worker takes nothing new', async () => {
  const worker = await decode('a');
  const { registry } = await registryOf([{ role: 'decode', address: worker.address }]);
  worker.state.draining = true;
  await until(() => statuses(registry)[0] === 'draining', 'draining');
  assert.equal(registry.usable('decode'), []);
});

test('a broken connection takes a worker out at once and fails what runs there; an error it answered does not', async () => {
  const fake = await decode('a');
  const { registry } = await registryOf([{ role: 'decode', address: fake.address }]);
  const worker = registry.workers[0]!;
  const down: string[] = [];
  registry.onDown(({ address }) => down.push(address));
  let failure: TplaError | undefined;
  worker.begin({ tokens: 1, fail: (error) => { failure = error; } });
  registry.report(worker, new TplaError('OVERLOADED', 'full'));
  registry.report(worker, new TplaError('WORKER_FAILED', 'answered 502'));
  assert.is(worker.health.status, 'up');
  registry.report(worker, new TplaError('WORKER_FAILED', 'reset', { cause: new Error('ECONNRESET') }));
  assert.is(worker.health.status, 'down');
  assert.is(failure?.code, 'WORKER_FAILED');
  assert.equal(down, [fake.address]);
  await until(() => worker.health.status === 'up', 'it answers the next poll');
});

test.run();
