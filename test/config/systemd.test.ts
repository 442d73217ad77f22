import { spawnSync } from 'node:child_process';
import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { ERRORS } from '../../src/errors.js';

const UNITS = fileURLToPath(new URL('../../configs/systemd/', import.meta.url));
const files = readdirSync(UNITS).sort();
const setting = (unit: string, key: string) => new RegExp(`^${key}=(.*)$`, 'm').exec(readFileSync(join(UNITS, unit), 'utf8'))?.[1];

test('one unit per role', () => {
  assert.equal(files, ['tpla-decode@.service', 'tpla-pool.service', 'tpla-prefill@.service', 'tpla-route.service']);
});

test('systemd-analyze verify has nothing to say', () => {
  const verify = spawnSync('systemd-analyze', ['verify', ...files.map((file) => join(UNITS, file))], { encoding: 'utf8' });
  assert.is(verify.error, undefined, 'systemd-analyze is missing: apt-get install systemd');
  assert.is(verify.stderr + verify.stdout, '');
  assert.is(verify.status, 0);
});

test('every unit tells of readiness, is watched, drains, and is not restarted into the same wrong configuration', () => {
  for (const file of files) {
    assert.is(setting(file, 'Type'), 'notify', file);
    assert.ok(Number(setting(file, 'WatchdogSec')) > 0, file);
    assert.ok(Number(setting(file, 'TimeoutStopSec')) * 1000 > 30_000, `${file}: stops later than the default drain_ms`);
    const final = setting(file, 'RestartPreventExitStatus')?.split(' ').map(Number);
    assert.equal(final, [ERRORS.USAGE.exit, ERRORS.MODEL_UNSUPPORTED.exit, ERRORS.ADDRESS_IN_USE.exit, ERRORS.CONFIG_INVALID.exit], file);
  }
});

test.run();
