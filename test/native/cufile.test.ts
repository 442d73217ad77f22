// Over a stand-in library (test/support/cufile_stand_in.cpp), which says what cuFile says on machines of other kinds; test/gpu has the real one.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { addonCandidates } from '../../src/native/loader.js';
import { tpla } from '../support/cli.js';
import { cuFileStandIn } from '../support/cufile_library.js';

const test = suite('native/cufile');
const directory = mkdtempSync(join(tmpdir(), 'tpla-cufile-'));
test.after(() => rmSync(directory, { recursive: true }));

const STAND_IN = cuFileStandIn(directory);
const ADDON = addonCandidates().find((path) => existsSync(path))!;
const LAYOUT = { form: 'mla', ranks: 1, layers: 2, latent: 64, rope: 16, shared: 0, dtype: 'bf16', pageTokens: 16 };

type Outcome = Record<string, unknown> & { code?: string; message?: string };

/** What an expression over the addon gives, or how it fails, in a process of its own. */
function inProcess(expression: string, env: Record<string, string>): Outcome {
  const script = `const addon = require(${JSON.stringify(ADDON)});
    Promise.resolve().then(() => (${expression})).catch(({ code, message }) => ({ code, message })).then((found) => console.log(JSON.stringify(found)));`;
  const { stdout, stderr, status } = spawnSync(process.execPath, ['-e', script], { encoding: 'utf8', env: { ...process.env, CUFILE_LOGFILE_PATH: '/dev/null', ...env } });
  assert.is(status, 0, stderr);
  return JSON.parse(stdout) as Outcome;
}

const describe = (env: Record<string, string> = {}, library = STAND_IN) => inProcess('addon.describeCuFile()', { ...library, ...env });

test('GPUDirect Storage is what cuFile says it has a driver for, else its compatibility mode is named', () => {
  const found = describe();
  assert.equal([found['version'], found['gds'], found['detail']], ['1.15', false, 'cuFile 1.15, compatibility mode: nvidia-fs is not loaded']);
  assert.is(found['path'], join(STAND_IN['LD_LIBRARY_PATH']!, 'libcufile.so.0'));
  const driver = describe({ CUFILE_STAND_IN_NVFS_MAJOR: '2', CUFILE_STAND_IN_NVFS_MINOR: '25', CUFILE_STAND_IN_FILESYSTEMS: '0x10' });
  assert.equal([driver['gds'], driver['detail']], [true, 'cuFile 1.15, GPUDirect Storage by nvidia-fs 2.25']);
  const p2p = describe({ CUFILE_STAND_IN_FEATURES: '0x1f', CUFILE_STAND_IN_FILESYSTEMS: '0x10' });
  assert.equal([p2p['gds'], p2p['detail']], [true, "cuFile 1.15, GPUDirect Storage by the kernel's peer-to-peer DMA"]);
  // The feature alone serves no disk.
  assert.is(describe({ CUFILE_STAND_IN_FEATURES: '0x1f' })['gds'], false);
});

test('a library that does not start, is older, or lacks functions says so', () => {
  const stopped = describe({ CUFILE_STAND_IN_OPEN: '5011', CUFILE_STAND_IN_DRIVER: '999' });
  assert.equal(stopped, { code: 'REQUEST_INVALID', message: 'cuFile does not start: nvidia-fs driver is unhappy (5011), CUDA driver error 999' });
  assert.is(describe({ CUFILE_STAND_IN_OPEN: '5007' }).message, 'cuFile does not start: cuFile error (5007)');
  assert.is(describe({}, cuFileStandIn(directory, '-DOLD'))['detail'], 'cuFile, compatibility mode: nvidia-fs is not loaded');
  assert.match(describe({}, cuFileStandIn(directory, '-DINCOMPLETE')).message!, /libcufile\.so\.0 lacks functions of cuFile/);
});

test('the doctor has it in its own words', async () => {
  const { stdout, status, stderr } = await tpla(['doctor', '--json'], { env: { ...STAND_IN, CUFILE_STAND_IN_NVFS_MAJOR: '2', CUFILE_STAND_IN_NVFS_MINOR: '25', CUFILE_STAND_IN_FILESYSTEMS: '0x10' } });
  assert.is(status, 0, stderr);
  const { libraries } = JSON.parse(stdout) as { libraries: { name: string; path: string | null; detail: string }[] };
  assert.is(libraries.find(({ name }) => name === 'cuFile')!.detail, 'cuFile 1.15, GPUDirect Storage by nvidia-fs 2.25');
});

test('a file that cuFile does not take cannot be opened for it, and another way is left', () => {
  const open = (engine: string) => {
    const options = { path: join(directory, `${engine}.blocks`), layout: LAYOUT, bytes: 1 << 20, threads: 1, depth: 4, engine };
    return `(() => { const file = addon.openBlockFile(${JSON.stringify(options)}); file.close(); return { opened: file.slots }; })()`;
  };
  assert.ok(Number(inProcess(open('cufile'), STAND_IN)['opened']) > 0);
  const refused = inProcess(open('cufile'), { ...STAND_IN, CUFILE_STAND_IN_REGISTER: '5027' });
  assert.is(refused.code, 'REQUEST_INVALID');
  const why = /^cuFile does not take the file: cuFile error \(5027\)(.*)$/.exec(refused.message!);
  assert.match(why![1]!, /^(|; it wants udev's record of the disk, \/run\/udev\/data\/b\d+:\d+, which is not there \(.*\)|; its filesystem has no disk of its own .*)$/);
  const onTmpfs = inProcess(open('cufile').replaceAll(directory, '/dev/shm'), { ...STAND_IN, CUFILE_STAND_IN_REGISTER: '5027' });
  rmSync('/dev/shm/cufile.blocks', { force: true });
  assert.match(onTmpfs.message!, /has no disk of its own .*: take a directory on ext4 or XFS/);
  assert.ok(Number(inProcess(open('auto'), { ...STAND_IN, CUFILE_STAND_IN_REGISTER: '5027' })['opened']) > 0);
});

test.run();
