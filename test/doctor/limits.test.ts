import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { limitFindings } from '../../src/doctor/examine.js';
import { cgroupLimits, processLimit, readLimits } from '../../src/doctor/limits.js';

const test = suite('doctor/limits');
const dir = mkdtempSync(join(tmpdir(), 'tpla-limits-'));
test.after(() => rmSync(dir, { recursive: true }));

function write(path: string, text: string): void {
  mkdirSync(join(dir, path, '..'), { recursive: true });
  writeFileSync(join(dir, path), text);
}

test('soft limits of /proc/PID/limits', () => {
  const text = 'Limit                     Soft Limit           Hard Limit           Units     \nMax locked memory         8388608              unlimited            bytes     \nMax open files            unlimited            unlimited            files     \n';
  assert.is(processLimit(text, 'Max locked memory'), 8388608);
  assert.is(processLimit(text, 'Max open files'), null);
  assert.is(processLimit(text, 'Max nonsense'), null);
});

test('the tightest cgroup from the own one up to the root', () => {
  write('v2/memory.max', 'max\n');
  write('v2/system.slice/memory.max', '1000000\n');
  write('v2/system.slice/cpu.max', '150000 100000\n');
  write('v2/system.slice/tpla.service/memory.max', '2000000\n');
  write('v2/system.slice/tpla.service/cpu.max', 'max 100000\n');
  assert.equal(cgroupLimits(join(dir, 'v2'), '0::/system.slice/tpla.service'), { memory: 1000000, cpus: 1.5 });
  assert.equal(cgroupLimits(join(dir, 'v2'), '0::/'), { memory: null, cpus: null });
});

test('cgroup v1', () => {
  write('v1/memory/memory.limit_in_bytes', '4294967296\n');
  write('v1/cpu/cpu.cfs_quota_us', '200000\n');
  write('v1/cpu/cpu.cfs_period_us', '100000\n');
  assert.equal(cgroupLimits(join(dir, 'v1'), '4:memory:/x'), { memory: 4294967296, cpus: 2 });
  write('free/memory/memory.limit_in_bytes', '9223372036854771712\n');
  write('free/cpu/cpu.cfs_quota_us', '-1\n');
  assert.equal(cgroupLimits(join(dir, 'free'), ''), { memory: null, cpus: null });
});

test('this machine has memory, and findings name what to run', () => {
  const limits = readLimits();
  assert.ok(limits.memory_bytes > 0);
  const tight = limitFindings({ ...limits, memlock_bytes: 65536, open_files: 1024 }).map(({ text }) => text);
  assert.is(tight.length, 2);
  assert.match(tight[0]!, 'ulimit -l unlimited');
  assert.match(tight[1]!, 'only 1024 open files');
  assert.equal(limitFindings({ ...limits, memlock_bytes: null, open_files: null }), []);
});

test.run();
