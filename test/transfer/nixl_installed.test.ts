// time limit: 300 s
// Over the NIXL that is installed, or that TPLA_NIXL_LIBRARY names, with its backend UCX; what only a stand-in can be made to do is in nixl.test.ts.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { systemClock } from '../../src/clock.js';
import { nixlLibraryFromEnv } from '../../src/config/env.js';
import type { Nixl } from '../../src/native/types.js';
import { findNixl, NIXL_BY_NAME, openNixl } from '../../src/transfer/nixl.js';
import { createHandoffSender } from '../../src/transfer/sender.js';
import { tpla } from '../support/cli.js';
import { endpoint, failure, smallLayout } from '../support/handoff.js';
import { grantOf, type LibraryUnderTest, openPair, testBetweenProcesses, testInOneProcess } from '../support/handoff_library_exercises.js';
import { openInNewProcess } from '../support/nixl_library.js';

const LIBRARY = nixlLibraryFromEnv() ?? findNixl();
const all = suite('transfer/nixl_installed');
const isInstalled = LIBRARY !== NIXL_BY_NAME;
if (!isInstalled) console.log('skipped: no NIXL is installed in the standard places; TPLA_NIXL_LIBRARY names a libnixl_capi.so elsewhere');
const test = isInstalled ? all : all.skip;

/** Peer failures are what is tested here: what UCX and NIXL print about them says nothing. */
const quiet = { UCX_LOG_LEVEL: 'fatal', NIXL_LOG_LEVEL: 'fatal' };
const open = async () => (await openNixl({ use: 'always', library: LIBRARY, backends: ['UCX'], options: quiet }))!;
const library: LibraryUnderTest = { path: 'nixl', holdsPages: true, link: `nixl=${LIBRARY}`, env: quiet, open: async () => ({ nixl: await open() }) };

testInOneProcess(test, library);
testBetweenProcesses(test, library);

test('it tells which UCX is under it, and decode passes it over for one of another release series', async () => {
  const { near: { nixl }, receiver, source, close } = await openPair(library);
  assert.match(nixl!.ucx!.version, /^1\.\d+\.\d+$/);
  assert.ok(nixl!.ucx!.resources.some((resource) => resource.startsWith('tcp/')), nixl!.ucx!.resources.join(' '));
  const other: Nixl = { ...nixl!, ucx: { ...nixl!.ucx!, version: '1.11.0' } };
  const flexible = createHandoffSender({ ...endpoint(source, systemClock), nixl: other });
  assert.is((await flexible.open(receiver.open(grantOf()).ticket)).path, 'tcp');
  const strict = createHandoffSender({ ...endpoint(source, systemClock), nixl: other, requirePath: 'nixl' });
  assert.match((await failure(strict.open(receiver.open(grantOf()).ticket))).message, /NIXL has UCX 1\.11\.0 under it on this side and 1\.\d+\.\d+ on decode's/);
  await flexible.close();
  await strict.close();
  await close();
});

test('what is no metadata of NIXL is refused', async () => {
  const nixl = await open();
  const address = Buffer.from('host\nnot metadata');
  assert.match((await failure(nixl.connect({ address, key: 'k'.repeat(32), layout: smallLayout() }))).message, /NIXL cannot use the peer's address/);
  nixl.close();
});

test('a plug-in that is not there, one for files alone: one clear error each', async () => {
  const empty = mkdtempSync(join(tmpdir(), 'tpla-nixl-'));
  assert.match(openInNewProcess(LIBRARY, ['UCX'], { ...quiet, NIXL_PLUGIN_DIR: empty }), /CONFIG_INVALID NIXL (has no plug-in UCX here|cannot load its plug-in UCX)/);
  rmSync(empty, { recursive: true });
  assert.match(openInNewProcess(LIBRARY, ['Bogus'], quiet), /CONFIG_INVALID NIXL has no plug-in Bogus here, but .*UCX/);
  const nixl = await open();
  if (nixl.plugins.includes('POSIX')) assert.match(openInNewProcess(LIBRARY, ['POSIX'], quiet), /CONFIG_INVALID NIXL's backend POSIX carries nothing between processes/);
  nixl.close();
});

test('doctor says what it found; bench-transfer measures it beside UCX, over one UCX', async () => {
  const env = { ...quiet, TPLA_NIXL_LIBRARY: LIBRARY };
  const found = JSON.parse((await tpla(['doctor', '--json'], { env })).stdout) as { libraries: { name: string; path: string | null; detail: string }[] };
  const row = (name: string) => found.libraries.find((library) => library.name === name)!;
  assert.match(row('NIXL').detail, /UCX \(DRAM.*\); plug-ins .*UCX; under it UCX 1\.\d+\.\d+: .*tcp on /);
  const size = ['--tokens', '256', '--layers', '4', '--iterations', '2', '--warmup', '1', '--json'];
  const { status, stdout, stderr } = await tpla(['bench-transfer', '--path', 'ucx,nixl', ...size], { env });
  assert.is(status, 0, stderr);
  const { rows } = JSON.parse(stdout) as { rows: { path: string; carried_by?: string }[] };
  const carriers = rows.flatMap((each) => each.carried_by ?? []);
  assert.equal(rows.map((each) => each.path), ['plain-sockets', 'ucx', 'plain-sockets', 'nixl']);
  assert.match(carriers[0]!, /; rows leave from host memory over tcp\/\S+/);
  assert.match(carriers[1]!, /; rows leave from host memory; it does not tell over which transport$/);
  assert.is(/UCX (1\.\d+\.\d+):/.exec(carriers[0]!)![1], /under it UCX (1\.\d+\.\d+):/.exec(carriers[1]!)![1]);
});

all.run();
