import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { DecodeConfig, PrefillConfig, RouteConfig } from '../../src/config/types.js';
import { TplaError } from '../../src/errors.js';
import { loadStack, planServices, startTiers, type Service } from '../../src/up/stack_config.js';

const test = suite('up/stack_config');
const dir = mkdtempSync(join(tmpdir(), 'tpla-stack-'));
test.after(() => rmSync(dir, { recursive: true }));

function file(text: string): string {
  const path = join(dir, 'stack.yaml');
  writeFileSync(path, text);
  return path;
}

function refusal(text: string): string {
  const path = file(text);
  try {
    planServices(loadStack(path), '/run/x', path);
  } catch (error) {
    assert.instance(error, TplaError);
    assert.is((error as TplaError).code, 'CONFIG_INVALID');
    return (error as TplaError).message;
  }
  throw new Error('the stack was accepted');
}

const configOf = <C>(services: Service[], name: string) => services.find((service) => service.name === name)!.config as unknown as C;

test('the shipped stack: pool, workers, route, wired to one another', () => {
  const path = fileURLToPath(new URL('../../configs/up.yaml', import.meta.url));
  const services = planServices(loadStack(path), '/run/x', path);
  assert.equal(startTiers(services).map((tier) => tier.map(({ name }) => name)), [['pool-0'], ['prefill-0', 'decode-0'], ['route-0']]);
  const route = configOf<RouteConfig>(services, 'route-0');
  assert.equal([route.listen, route.prefill, route.decode], [['tcp://127.0.0.1:8000'], ['unix:/run/x/prefill-0.sock'], ['unix:/run/x/decode-0.sock']]);
  const decode = configOf<DecodeConfig>(services, 'decode-0');
  assert.equal([decode.id, decode.listen, decode.handoff_listen, decode.pool], ['decode-0', 'unix:/run/x/decode-0.sock', 'unix:/run/x/decode-0.handoff.sock', 'unix:/run/x/pool-0.sock']);
  assert.equal(decode.attention, { form: 'tpla', ranks: 2 });
  const model = fileURLToPath(new URL('../../models/demo', import.meta.url));
  assert.equal([route.model, decode.model, route.model_name], [model, model, 'demo']);
  assert.is(decode.log_level, 'warn');
});

test("what a service says itself wins, with ${runtime} and paths of the stack's file", () => {
  const path = file(`
model: big
model_name: served
services:
  a: { role: prefill, listen: 'tcp://127.0.0.1:7001', pool: null, model: other, model_name: mine }
  b: { role: decode, handoff_listen: 'unix:\${runtime}/h.sock', drain_ms: 5 }
  c: { role: decode, listen: 'unix:\${runtime}/sub.sock' }
  r: { role: route }
`);
  const services = planServices(loadStack(path), '/run/y', path);
  const a = configOf<PrefillConfig>(services, 'a');
  assert.equal([a.listen, a.pool, a.model, a.model_name], ['tcp://127.0.0.1:7001', null, join(dir, 'other'), 'mine']);
  const b = configOf<DecodeConfig>(services, 'b');
  assert.equal([b.handoff_listen, b.model, b.model_name, b.drain_ms, b.pool], ['unix:/run/y/h.sock', join(dir, 'big'), 'served', 5, null]);
  const r = configOf<RouteConfig>(services, 'r');
  assert.equal([r.prefill, r.decode, r.listen], [['tcp://127.0.0.1:7001'], ['unix:/run/y/b.sock', 'unix:/run/y/sub.sock'], ['tcp://127.0.0.1:8000']]);
});

test('errors of all services at once, each by its path', () => {
  const text = refusal('services:\n  p: { role: prefill, model: m, kv: { dtype: int4 } }\n  d: { role: decode, attenton: {} }\n  r: { role: route, model: m }\n');
  assert.match(text, 'has 3 errors');
  assert.match(text, 'services.p.kv.dtype: "int4" is not one of f32, bf16, fp8');
  assert.match(text, 'services.d.model: missing: checkpoint directory');
  assert.match(text, 'services.d.attenton: unknown key; did you mean "attention"?');
});

test('a stack without route, of an unknown role, or with a misspelt key', () => {
  assert.match(refusal('model: m\nservices: { p: { role: prefill } }\n'), 'services: has no service of role route');
  assert.match(refusal('services: { p: { role: prefil } }\n'), 'services.p.role: "prefil" is not one of pool, prefill, decode, route');
  assert.match(refusal('service: {}\n'), 'service: unknown key; did you mean "services"?');
  assert.match(refusal('model: m\nservices: { r: { role: route }, p: { role: prefill } }\n'), 'services.r.decode: [] is too short');
});

test.run();
