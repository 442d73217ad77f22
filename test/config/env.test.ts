import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { childEnvironment, readVariables, serviceManager, unknownVariables } from '../../src/config/env.js';

test('an empty variable counts as unset', () => {
  assert.equal([...readVariables(['TPLA_A', 'TPLA_B', 'TPLA_C'], { TPLA_A: 'x', TPLA_B: '' })], [['TPLA_A', 'x']]);
});

test('unknown variables are ours and not build options', () => {
  assert.equal(unknownVariables(['TPLA_MODEL'], { TPLA_MODEL: 'a', TPLA_MODLE: 'b', TPLA_CUDA: 'off', TPLA_CONFIG: 'c', PATH: 'd', TPLA_EMPTY: '' }), ['TPLA_MODLE']);
});

test('children inherit neither our settings nor the service manager', () => {
  assert.equal(childEnvironment({ PATH: '/bin', TPLA_LISTEN: 'x', NOTIFY_SOCKET: '@y', WATCHDOG_USEC: '1', HOME: undefined }), { PATH: '/bin' });
});

test('the watchdog is ours only when its pid is', () => {
  assert.equal(serviceManager({}, 7), { socket: null, watchdogMs: null });
  assert.equal(serviceManager({ NOTIFY_SOCKET: '/run/n', WATCHDOG_USEC: '3000000', WATCHDOG_PID: '7' }, 7), { socket: '/run/n', watchdogMs: 3000 });
  assert.equal(serviceManager({ NOTIFY_SOCKET: '/run/n', WATCHDOG_USEC: '3000000', WATCHDOG_PID: '8' }, 7), { socket: '/run/n', watchdogMs: null });
});

test('no other file of src reads the environment', () => {
  const src = fileURLToPath(new URL('../../src/', import.meta.url));
  const readers = readdirSync(src, { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('.ts') && /process\.env\b/.test(readFileSync(join(src, name), 'utf8')));
  assert.equal(readers, ['config/env.ts']);
});

test.run();
