// time limit: 300 s
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { systemClock } from '../../src/clock.js';
import type { KvLayout, Ucx } from '../../src/native/types.js';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import { findUcx, openUcx } from '../../src/transfer/ucx.js';
import { endpoint, failure, newArena, smallLayout } from '../support/handoff.js';
import { cancelInTheMiddle, landPrompt, TARGET_PAGES, TOKENS, VIEWS } from '../support/handoff_exercises.js';
import { BIG, BIG_PAGES, BIG_TARGET, bigGrant } from '../support/handoff_fault_shapes.js';
import { abortWithKilledDecode, ANY_TCP, cutOffStoppedPrefill, leakNothing, type LibraryUnderTest, refuseUngrantedPieces, replaceKilledPrefill, withReceiver } from '../support/handoff_library_exercises.js';

const LIBRARY = findUcx();
const all = suite('transfer/ucx');
const test = LIBRARY === null ? all.skip : all;
const directory = mkdtempSync(join(tmpdir(), 'tpla-ucx-'));
all.after(() => rmSync(directory, { recursive: true }));

/** Peer failures are what is tested here: UCX's own lines about them say nothing. */
const quiet = { UCX_LOG_LEVEL: 'fatal', UCX_TLS: 'all' };
const open = (options: Record<string, string> = {}) => openUcx({ use: 'always', library: null, options: { ...quiet, ...options } }) as Promise<Ucx>;

async function pair(change: Partial<KvLayout> = { form: 'tpla', ranks: 2, pageTokens: 32 }) {
  const source = newArena(smallLayout(), 64);
  const target = newArena(smallLayout(change), 64);
  const ucx = await open();
  const receiver = await createHandoffReceiver(ANY_TCP, { ...endpoint(target, systemClock), ucx });
  const sender = createHandoffSender({ ...endpoint(source, systemClock), ucx, requirePath: 'ucx' });
  const close = async () => {
    await sender.close();
    await receiver.close();
    ucx.close();
    source.close();
    target.close();
  };
  return { source, target, receiver, sender, ucx, close };
}
const grant = (change: object = {}) => ({ tokens: TOKENS, pages: [TARGET_PAGES], leaseMs: 60_000, ...change });

for (const [name, change] of VIEWS) {
  test(`a prompt lands verified over UCX: ${name}`, async () => {
    const ends = await pair(change);
    const { commit } = await landPrompt(ends, change, 'ucx', 60_000);
    assert.is(commit.path, 'ucx');
    await ends.close();
  });
}

// ---------------------------------------------------------------- two processes

const bigTarget = newArena(BIG_TARGET, BIG_PAGES);
const over = (transports: string): LibraryUnderTest => {
  const env = { ...quiet, UCX_TLS: transports };
  return { path: 'ucx', link: 'ucx', env, open: async () => ({ ucx: await open(env) }) };
};

for (const transports of ['tcp', 'all']) {
  const library = over(transports);
  test(`two processes over UCX_TLS=${transports}: a prompt of 42 MB lands, then a killed prefill is noticed and replaced`, () =>
    withReceiver(library, bigTarget, (receiver) => replaceKilledPrefill(library, bigTarget, receiver)));
  test(`prefill stops in the middle over UCX_TLS=${transports}: its lease runs out, decode has its pages back while it is stopped, no late byte lands`, () =>
    withReceiver(library, bigTarget, (receiver) => cutOffStoppedPrefill(library, bigTarget, receiver)));
  test(`decode is killed over UCX_TLS=${transports}: prefill's session aborts`, () => abortWithKilledDecode(library));
}

test('transports that cannot tell of a dead peer are not used: over shared memory alone UCX is passed over, or refused where it is required', () => withReceiver(over('sm'), bigTarget, async (receiver) => {
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
}));

// ---------------------------------------------------------------- cancel, leaks, hostile pieces

test('decode cancels in the middle: no late write, the next hand-off on the same slot is whole', async () => {
  const ends = await pair();
  await cancelInTheMiddle(ends, 20, 60_000);
  await ends.close();
});

test('connections over UCX leak no thread and no descriptor', async () => {
  const { source, receiver, sender, ucx, close } = await pair();
  await leakNothing(receiver, sender, () => createHandoffSender({ ...endpoint(source, systemClock), ucx }));
  await close();
});

test('pieces that were not granted, or have another size, end the link; memory stays as it was', async () => {
  const ucx = await open();
  await refuseUngrantedPieces(ucx, ucx);
  ucx.close();
});

// ---------------------------------------------------------------- what is installed

test('another release series is passed over, or refused with both versions where UCX is required', async () => {
  const { receiver, source, ucx, close } = await pair();
  const other: Ucx = { ...ucx, version: '1.17.0' };
  const flexible = createHandoffSender({ ...endpoint(source, systemClock), ucx: other });
  assert.is((await flexible.open(receiver.open(grant()).ticket)).path, 'tcp');
  const strict = createHandoffSender({ ...endpoint(source, systemClock), ucx: other, requirePath: 'ucx' });
  const error = await failure(strict.open(receiver.open(grant()).ticket));
  assert.is(error.code, 'HANDSHAKE_REFUSED');
  assert.match(error.message, `UCX 1.17.0 on this side and ${ucx.version} on decode's`);
  const without = createHandoffSender({ ...endpoint(source, systemClock), requirePath: 'ucx' });
  assert.match((await failure(without.open(receiver.open(grant()).ticket))).message, /this side uses no UCX/);
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

all.after(() => bigTarget.close());
all.run();
