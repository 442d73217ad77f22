import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';

const test = suite('transfer/push_order');
const directory = mkdtempSync(join(tmpdir(), 'tpla-push-order-'));
test.after(() => rmSync(directory, { recursive: true }));

/** The CPUs this process may use, one by one. */
function allowedCpus(): number[] {
  const [, list] = /^Cpus_allowed_list:\s*(\S+)$/m.exec(readFileSync('/proc/self/status', 'utf8'))!;
  return list!.split(',').flatMap((range) => {
    const [from, to = from] = range.split('-').map(Number);
    return Array.from({ length: to! - from! + 1 }, (_, i) => from! + i);
  });
}

function stepsOn(cpus: number[]): string[] {
  const child = join(import.meta.dirname, '../support/push_order_child.ts');
  const args = ['-c', cpus.join(','), process.execPath, '--import', 'tsx', child, `unix:${join(directory, `${cpus.length}.sock`)}`];
  return execFileSync('taskset', args, { encoding: 'utf8', timeout: 60_000 }).trim().split('\n');
}

test('where both sides share few CPUs, decode hears of pushes when the last that was asked for is in place', () => {
  const steps = stepsOn(allowedCpus().slice(0, 2));
  const at = (step: string) => steps.flatMap((found, i) => (found === step ? [i] : []));
  assert.is(at('put in place').length, 4, steps.join());
  assert.is(at('pushed received').length, 4, steps.join());
  assert.ok(at('pushed received')[1]! > at('put in place')[3]!, `decode was told while prefill was putting: ${steps.join()}`);
});

test.run();
