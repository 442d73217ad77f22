import { spawnSync } from 'node:child_process';
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { Examination } from '../../src/doctor/examine.js';
import { tpla } from '../support/cli.js';

const test = suite('doctor');
const dir = mkdtempSync(join(tmpdir(), 'tpla-doctor-'));
test.after(() => rmSync(dir, { recursive: true }));

const ROOT = fileURLToPath(new URL('../../', import.meta.url));

/** A CUDA driver with two GPUs that reach each other, or (`broken`) one that does not start. */
const FAKE_DRIVER = `
#include <cstddef>
#include <cstdio>
#include <cstring>
#ifdef BROKEN
enum { kInit = 999 };
#else
enum { kInit = 0 };
#endif
extern "C" {
int cuInit(unsigned) { return kInit; }
int cuDriverGetVersion(int* version) { *version = 12080; return 0; }
int cuGetErrorString(int, const char** text) { *text = "unknown error of the day"; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int index) { *device = index + 40; return 0; }
int cuDeviceGetName(char* name, int size, int device) { snprintf(name, size, "Fake GPU %d", device - 40); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = size_t(80) << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : -1; return 0; }
int cuDeviceCanAccessPeer(int* access, int a, int b) { *access = a != b; return 0; }
}`;

function fakeDriver(name: string, ...flags: string[]): Record<string, string> {
  const at = join(dir, name);
  mkdirSync(at);
  writeFileSync(join(at, 'driver.cpp'), FAKE_DRIVER);
  const compiled = spawnSync('g++', ['-shared', '-fPIC', ...flags, '-o', 'libcuda.so.1', 'driver.cpp'], { cwd: at });
  assert.is(compiled.status, 0, compiled.stderr.toString());
  return { LD_LIBRARY_PATH: at };
}

async function doctor(env: Record<string, string> = {}): Promise<Examination> {
  const { status, stdout, stderr } = await tpla(['doctor', '--json'], { env });
  assert.is(status, 0, stderr);
  return JSON.parse(stdout) as Examination;
}

test('this machine, as JSON', async () => {
  const found = await doctor();
  assert.is(found.addon.loaded, true);
  assert.ok(found.cpu!.cores >= 1 && found.cpu!.cores <= availableParallelism());
  const flags = /^(?:flags|Features)\s*: (.*)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1]?.split(' ') ?? [];
  assert.equal(found.cpu?.features.filter((feature) => !flags.includes(feature)), []);
  assert.is(found.cpu?.features.includes('avx2'), flags.includes('avx2'));
  assert.ok(['portable', 'blas', 'avx2', 'avx512', 'avx512_bf16', 'amx'].includes(found.cpu?.kernel ?? ''), found.cpu?.kernel);
  assert.equal(found.libraries.map(({ name }) => name), ['libcuda', 'cuBLASLt', 'NCCL', 'cuFile', 'io_uring', 'UCX', 'NIXL']);
  assert.ok(Array.isArray(found.rdma_devices));
  for (const { detail } of found.libraries) assert.is.not(detail, '');
  if (found.cuda?.devices.length === 0) assert.is.not(found.cuda.reason, null);
});

test('GPUs and the links between them, as their driver tells', async () => {
  const env = fakeDriver('two');
  const found = await doctor(env);
  assert.match(found.cuda?.driver ?? '', /^CUDA 12\.8/);
  assert.is(found.cuda?.reason, null);
  assert.equal(found.cuda?.devices, [0, 1].map((index) => ({
    index, name: `Fake GPU ${index}`, capability: '9.0', memory_bytes: 80 * 2 ** 30, multiprocessors: 132, peers: [1 - index],
  })));
  assert.is(found.libraries.find(({ name }) => name === 'libcuda')?.path, join(dir, 'two', 'libcuda.so.1'));
  const { stdout } = await tpla(['doctor'], { env });
  assert.match(stdout, /0 {2}Fake GPU 0 +9\.0 +80 GiB +132 +1\n/);
});

test('a driver that does not start, or is none, is told with its reason', async () => {
  assert.is((await doctor(fakeDriver('broken', '-DBROKEN'))).cuda?.reason, 'the CUDA driver does not start: unknown error of the day (999)');
  const at = join(dir, 'stub');
  mkdirSync(at);
  writeFileSync(join(at, 'stub.cpp'), 'extern "C" int cuInit(unsigned) { return 0; }');
  assert.is(spawnSync('g++', ['-shared', '-fPIC', '-o', 'libcuda.so.1', 'stub.cpp'], { cwd: at }).status, 0);
  assert.match((await doctor({ LD_LIBRARY_PATH: at })).cuda?.reason ?? '', 'lacks functions of the driver API');
});

test('without an addon it still reports limits, says how to build one, and ends with 69', () => {
  const root = join(dir, 'package');
  mkdirSync(join(root, 'bin'), { recursive: true });
  for (const name of ['package.json', 'bin/tpla.js']) copyFileSync(join(ROOT, name), join(root, name));
  spawnSync('cp', ['-r', join(ROOT, 'dist'), root]);
  symlinkSync(join(ROOT, 'node_modules'), join(root, 'node_modules'));
  const run = spawnSync(process.execPath, [join(root, 'bin/tpla.js'), 'doctor', '--json'], { encoding: 'utf8' });
  assert.is(run.status, 69, run.stderr);
  const found = JSON.parse(run.stdout) as Examination;
  assert.is(found.addon.loaded, false);
  assert.match(found.findings[0]?.text ?? '', 'npm run build:native');
  assert.ok(found.limits.memory_bytes > 0);
});

test.run();
