// time limit: 200 s
// Over a stand-in library (test/support/nixl_stand_in.cpp): two real processes, one of whom reads the other's memory, and what NIXL itself cannot
// be made to do wrong. NIXL itself is in nixl_installed.test.ts.
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { systemClock } from '../../src/clock.js';
import { native } from '../../src/native/loader.js';
import type { Nixl } from '../../src/native/types.js';
import { describeNixl, findNixl, nixlVersion, openNixl } from '../../src/transfer/nixl.js';
import { createHandoffReceiver } from '../../src/transfer/receiver.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import type { TransferPath } from '../../src/transfer/types.js';
import { tpla } from '../support/cli.js';
import { endpoint, failure, fillCanonical, LAYERS, pageRange, smallLayout, stats, until } from '../support/handoff.js';
import { SOURCE_PAGES, TOKENS } from '../support/handoff_exercises.js';
import { grantOf, type LibraryUnderTest, openPair, testBetweenProcesses, testInOneProcess } from '../support/handoff_library_exercises.js';
import { buildLibrary, buildNixlStandIn, openInNewProcess } from '../support/nixl_library.js';

const test = suite('transfer/nixl');
const directory = mkdtempSync(join(tmpdir(), 'tpla-nixl-'));
const LIBRARY = buildNixlStandIn(directory);
test.after(() => rmSync(directory, { recursive: true }));

const open = async () => (await openNixl({ use: 'always', library: LIBRARY, backends: ['UCX'], options: {} }))!;

/** The library looks at each transfer. */
async function withFault<T>(fault: 'flip' | 'error' | 'hang', body: () => Promise<T>): Promise<T> {
  process.env['NIXL_STAND_IN_FAULT'] = fault;
  try {
    return await body();
  } finally {
    delete process.env['NIXL_STAND_IN_FAULT'];
  }
}

const library: LibraryUnderTest = { path: 'nixl', holdsPages: true, link: `nixl=${LIBRARY}`, open: async () => ({ nixl: await open() }) };
const pair = () => openPair(library);

testInOneProcess(test, library);
testBetweenProcesses(test, library);

// ---------------------------------------------------------------- transfers that go wrong

test('a byte that changed on the way is found before the page is used', async () => {
  const ends = await pair();
  fillCanonical(ends.source, SOURCE_PAGES, TOKENS, 1);
  const { ticket, committed } = ends.receiver.open(grantOf());
  committed.catch(() => {});
  await withFault('flip', async () => {
    const session = await ends.sender.open(ticket);
    await Promise.allSettled([session.push([0, LAYERS], TOKENS, SOURCE_PAGES)]);
    await session.commit({ firstTokens: [], prefill: stats(100) }).catch(() => {});
    assert.is((await failure(committed)).code, 'CHECKSUM_MISMATCH');
  });
  await ends.land();
  await ends.close();
});

test('a transfer that ends in an error ends the hand-off; the next one connects anew', async () => {
  const ends = await pair();
  const { ticket, committed } = ends.receiver.open(grantOf());
  committed.catch(() => {});
  await withFault('error', async () => {
    const session = await ends.sender.open(ticket);
    assert.match((await failure(session.push([0, LAYERS], TOKENS, SOURCE_PAGES))).message, /the receiver ended the link/);
    assert.is((await failure(committed)).code, 'HANDOFF_FAILED');
  });
  const next = ends.newSender();
  await ends.land(next);
  await next.close();
  await ends.close();
});

test('a transfer that hangs: the cancelled hand-off keeps its pages until the library has done with them, and no longer', async () => {
  const ends = await pair();
  fillCanonical(ends.source, SOURCE_PAGES, TOKENS, 1);
  const { ticket, committed, failing } = ends.receiver.open(grantOf());
  let settled = false;
  const ending = failure(committed).finally(() => { settled = true; });
  await withFault('hang', async () => {
    const session = await ends.sender.open(ticket);
    const push = session.push([0, LAYERS], TOKENS, SOURCE_PAGES).catch(() => {});
    // Until the pieces are on their way.
    await new Promise((resolve) => setTimeout(resolve, 100));
    ends.receiver.cancel(ticket.session);
    await until(() => failing.aborted, 'the end of the hand-off to be known');
    await new Promise((resolve) => setTimeout(resolve, 100));
    assert.not(settled, 'the pages were given back while a transfer could still write into them');
    assert.is(ends.receiver.stats().draining, 1);
    void push;
  });
  assert.is((await ending).code, 'CANCELLED');
  assert.is(ends.receiver.stats().draining, 0);
  await ends.land();
  await ends.close();
});

test('what is no metadata is no address', async () => {
  const nixl = await open();
  const dial = (address: string) => failure(nixl.connect({ address: Buffer.from(address), key: 'k'.repeat(32), layout: smallLayout() }));
  assert.match((await dial('not metadata')).message, /NIXL cannot use the peer's address: it does not begin with a host's identity/);
  assert.match((await dial('host\nnot metadata')).message, /NIXL cannot use the peer's address: the backend failed/);
  nixl.close();
});

// ---------------------------------------------------------------- which path is taken

test('NIXL is passed over where one side lacks it, and nothing else is taken where it is required', async () => {
  const { receiver, source, near: { nixl }, close } = await pair();
  const open = async (options: { nixl?: Nixl | null; requirePath?: TransferPath }) => {
    const sender = createHandoffSender({ ...endpoint(source, systemClock), ...options });
    try {
      return (await sender.open(receiver.open(grantOf()).ticket)).path;
    } finally {
      await sender.close();
    }
  };
  assert.is(await open({ nixl }), 'nixl');
  assert.is(await open({}), 'tcp');
  assert.match((await failure(open({ requirePath: 'nixl' }))).message, /nixl and nothing else is required \(nixl: this side uses no NIXL/);
  assert.match((await failure(open({ nixl: { ...nixl!, backends: [{ name: 'GDS', memories: ['VRAM'] }] }, requirePath: 'nixl' }))).message, /NIXL has GDS on this side and UCX on decode's/);
  const local = await createHandoffReceiver(`unix:${join(directory, 'local.sock')}`, endpoint(source, systemClock));
  const strict = createHandoffSender({ ...endpoint(source, systemClock), nixl, requirePath: 'nixl' });
  assert.match((await failure(strict.open(local.open(grantOf({ pages: [pageRange(10, 7)] })).ticket))).message, /the path to decode is shm, nixl and nothing else is required/);
  await strict.close();
  await local.close();
  await close();
});

// ---------------------------------------------------------------- what is installed

test('an absent library, one that is none, an old one, a stub, a missing plug-in: one clear error each', async () => {
  assert.is(await openNixl({ use: 'never', library: null, backends: ['UCX'], options: {} }), null);
  const missing = await failure(openNixl({ use: 'auto', library: '/nowhere/libnixl_capi.so', backends: ['UCX'], options: {} }));
  assert.is(missing.code, 'CONFIG_INVALID');
  assert.match(missing.message, /\/nowhere\/libnixl_capi\.so, which does not exist/);
  const declared = 'extern "C" __attribute__((visibility("default")))';
  assert.match(openInNewProcess(buildLibrary(directory, 'libnothing.so', `${declared} int nothing; int nothing;`)), /CONFIG_INVALID .*libnothing\.so has no nixl_capi_create_configured_agent; tpla works with the libnixl_capi\.so of NIXL 0\.10\.1/);
  // Before 0.5 there was no metadata of single memories.
  assert.match(openInNewProcess(buildNixlStandIn(directory, 'libold.so', ['-Dnixl_capi_get_local_partial_md=nixl_capi_get_no_partial_md'])), /libold\.so has no nixl_capi_get_local_partial_md/);
  assert.match(openInNewProcess(buildNixlStandIn(directory, 'libstub.so', ['-DNIXL_STAND_IN_IS_STUB=true'])), /libstub\.so is a stub that was built without NIXL/);
  assert.match(openInNewProcess('libnixl_capi_of_nobody.so'), /CONFIG_INVALID NIXL cannot be loaded: libnixl_capi_of_nobody\.so/);
  assert.match(openInNewProcess(LIBRARY, ['Mooncake']), /CONFIG_INVALID NIXL has no plug-in Mooncake here, but GDS, POSIX, UCX; see transfer\.nixl\.backends/);
  assert.match(openInNewProcess(LIBRARY, ['GDS']), /CONFIG_INVALID NIXL's backend GDS does not carry host memory/);
  assert.match(openInNewProcess(LIBRARY, ['POSIX']), /CONFIG_INVALID NIXL's backend POSIX carries nothing between processes/);
  assert.match(openInNewProcess(buildNixlStandIn(directory, 'libother.so', ['-DNIXL_STAND_IN_VRAM="TAPE"'])), /libother\.so calls memory type 1 TAPE, not VRAM/);
  assert.is(openInNewProcess('libnixl_capi.so', ['UCX'], { LD_LIBRARY_PATH: directory }).trim(), `loaded ${LIBRARY}`);
  const other = await failure(native().openNixl(join(directory, 'libstub.so'), []));
  assert.match(other.message, /is a stub/);
});

test('libraries beside it that the loader does not find by itself are found', () => {
  const beside = join(directory, 'installation');
  mkdirSync(beside);
  const core = buildLibrary(beside, 'libnixl_core.so', 'extern "C" __attribute__((visibility("default"))) int nixl_core() { return 1; }');
  const file = buildNixlStandIn(beside, 'libnixl_capi.so', ['-Wl,--no-as-needed', core]);
  assert.is(openInNewProcess(file).trim(), `loaded ${file}`);
  rmSync(core);
  assert.match(openInNewProcess(file), /CONFIG_INVALID NIXL cannot be loaded: .*libnixl_core\.so: cannot open shared object file/);
});

test('where NIXL may be absent its reason is told; where it is found, what it is', async () => {
  let reason = '';
  assert.is(await openNixl({ use: 'auto', library: join(directory, 'libnothing.so'), backends: ['UCX'], options: {} }, (text) => { reason = text; }), null);
  assert.match(reason, /has no nixl_capi_create_configured_agent/);
  assert.is(findNixl([join(directory, 'absent.so'), LIBRARY]), LIBRARY);
  assert.is(findNixl([]), 'libnixl_capi.so');
  const nixl = await open();
  assert.is(describeNixl(nixl), 'version unknown: UCX (DRAM); plug-ins GDS, POSIX, UCX');
  nixl.close();
  const wheel = join(directory, 'site-packages');
  mkdirSync(join(wheel, '.nixl_cu12.mesonpy.libs'), { recursive: true });
  mkdirSync(join(wheel, 'nixl_cu12-1.0.1.dist-info'));
  assert.is(nixlVersion(join(wheel, '.nixl_cu12.mesonpy.libs', 'libnixl_capi.so')), '1.0.1');
});

test('doctor says what it found; bench-transfer measures it through its table of paths', async () => {
  const env = { TPLA_NIXL_LIBRARY: LIBRARY };
  const found = JSON.parse((await tpla(['doctor', '--json'], { env })).stdout) as { libraries: { name: string; path: string | null; detail: string }[] };
  assert.equal(found.libraries.find(({ name }) => name === 'NIXL'), { name: 'NIXL', path: LIBRARY, detail: 'version unknown: UCX (DRAM); plug-ins GDS, POSIX, UCX' });
  const { status, stdout, stderr } = await tpla(['bench-transfer', '--path', 'nixl', '--tokens', '256', '--layers', '4', '--iterations', '2', '--warmup', '1', '--json'], { env });
  assert.is(status, 0, stderr);
  const { rows } = JSON.parse(stdout) as { rows: { path: string; gb_per_s: number }[] };
  assert.equal(rows.map((row) => row.path), ['plain-sockets', 'nixl']);
  assert.ok(rows.every((row) => row.gb_per_s > 0));
});

test.run();
