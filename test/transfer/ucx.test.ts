// time limit: 300 s
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { systemClock } from '../../src/clock.js';
import { ucxLibraryFromEnv } from '../../src/config/env.js';
import type { Ucx } from '../../src/native/types.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import { findUcx, openUcx } from '../../src/transfer/ucx.js';
import { endpoint, failure, newArena } from '../support/handoff.js';
import { BIG, BIG_PAGES, BIG_TARGET, bigGrant } from '../support/handoff_fault_shapes.js';
import { grantOf, type LibraryUnderTest, openPair, testBetweenProcesses, testInOneProcess, withReceiver } from '../support/handoff_library_exercises.js';

const LIBRARY = ucxLibraryFromEnv() ?? findUcx();
const all = suite('transfer/ucx');
const test = LIBRARY === null ? all.skip : all;
const directory = mkdtempSync(join(tmpdir(), 'tpla-ucx-'));
all.after(() => rmSync(directory, { recursive: true }));

/** Peer failures are what is tested here: UCX's own lines about them say nothing. */
const quiet = { UCX_LOG_LEVEL: 'fatal', UCX_TLS: 'all' };
const open = (options: Record<string, string> = {}) => openUcx({ use: 'always', library: LIBRARY, options: { ...quiet, ...options } }) as Promise<Ucx>;

const over = (transports: string): LibraryUnderTest => {
  const env = { ...quiet, UCX_TLS: transports };
  return { path: 'ucx', link: `ucx=${LIBRARY}`, env, open: async () => ({ ucx: await open(env) }) };
};

testInOneProcess(test, over('all'));
for (const transports of ['tcp', 'all']) testBetweenProcesses((name, body) => test(`UCX_TLS=${transports}: ${name}`, body), over(transports));

test('transports that cannot tell of a dead peer are not used: over shared memory alone UCX is passed over, or refused where it is required', async () => {
  const target = newArena(BIG_TARGET, BIG_PAGES);
  await withReceiver(over('sm'), target, async (receiver) => {
    const source = newArena(BIG, BIG_PAGES);
    const ucx = await open({ UCX_TLS: 'sm' });
    const flexible = createHandoffSender({ ...endpoint(source, systemClock), ucx });
    assert.is((await flexible.open(receiver.open(bigGrant()).ticket)).path, 'tcp');
    const strict = createHandoffSender({ ...endpoint(source, systemClock), ucx, requirePath: 'ucx' });
    assert.match((await failure(strict.open(receiver.open(bigGrant()).ticket))).message, /UCX cannot reach the peer: destination is unreachable/);
    await flexible.close();
    await strict.close();
    ucx.close();
    source.close();
  });
  target.close();
});

// ---------------------------------------------------------------- what is installed

test('another release series is passed over, or refused with both versions where UCX is required', async () => {
  const { receiver, source, near: { ucx }, close } = await openPair(over('all'));
  const other: Ucx = { ...ucx!, version: '1.11.0' };
  const flexible = createHandoffSender({ ...endpoint(source, systemClock), ucx: other });
  assert.is((await flexible.open(receiver.open(grantOf()).ticket)).path, 'tcp');
  const strict = createHandoffSender({ ...endpoint(source, systemClock), ucx: other, requirePath: 'ucx' });
  const error = await failure(strict.open(receiver.open(grantOf()).ticket));
  assert.is(error.code, 'HANDSHAKE_REFUSED');
  assert.match(error.message, `UCX 1.11.0 on this side and ${ucx!.version} on decode's`);
  const without = createHandoffSender({ ...endpoint(source, systemClock), requirePath: 'ucx' });
  assert.match((await failure(without.open(receiver.open(grantOf()).ticket))).message, /this side uses no UCX/);
  for (const sender of [flexible, strict, without]) await sender.close();
  await close();
});

all('an absent library, one that is none, one that is too old: one clear error each', async () => {
  assert.is(await openUcx({ use: 'never', library: null, options: {} }), null);
  const missing = await failure(openUcx({ use: 'always', library: '/nowhere/libucp.so.0', options: {} }));
  assert.is(missing.code, 'CONFIG_INVALID');
  assert.match(missing.message, /\/nowhere\/libucp\.so\.0, which does not exist/);
  const build = (name: string, code: string) => {
    const file = join(directory, name);
    writeFileSync(`${file}.cpp`, `extern "C" { ${code} }`);
    assert.is(spawnSync('g++', ['-shared', '-fPIC', '-o', file, `${file}.cpp`]).status, 0);
    return file;
  };
  // In a process that has loaded no UCX yet.
  const load = (file: string) => {
    const script = `import { native } from ${JSON.stringify(join(import.meta.dirname, '../../src/native/loader.ts'))};
      native().openUcx(${JSON.stringify(file)}).then(() => console.log('loaded'), (error) => console.log(error.code, error.message));`;
    return spawnSync(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script], { encoding: 'utf8' }).stdout;
  };
  assert.match(load(build('libnothing.so', 'int nothing;')), /CONFIG_INVALID .*libnothing\.so has no ucp_get_version/);
  const old = 'void ucp_get_version(unsigned* a, unsigned* b, unsigned* c) { *a = 1; *b = 12; *c = 0; } const char* ucp_get_version_string() { return "1.12.0"; }';
  assert.match(load(build('libold.so', old)), /CONFIG_INVALID UCX 1\.12\.0 at .*libold\.so is not supported; tpla works with UCX 1\.13/);
});

test('a setting that UCX cannot meet is refused', async () => {
  const error = await failure(open({ UCX_TLS: 'bogus' }));
  assert.is(error.code, 'CONFIG_INVALID');
  assert.match(error.message, /cannot be started: no such device; check UCX_TLS/);
  await open({ UCX_TLS: 'all' }).then((ucx) => ucx.close());
});

all.run();
