// time limit: 120 s
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { compileShared } from '../support/compile.js';

const test = suite('transfer/zero_copy_order');
const directory = mkdtempSync(join(tmpdir(), 'tpla-zero-copy-'));
test.after(() => rmSync(directory, { recursive: true }));

const SUPPORT = join(import.meta.dirname, '../support');
/** A put takes a few milliseconds; a sender that waits for a completion it has mistaken waits for ever. */
const PATIENCE_MS = 60_000;

test('puts end, whole, when the kernel reports zero-copy sends out of order', async () => {
  const shim = compileShared(join(SUPPORT, 'late_completions.cpp'), join(directory, 'late_completions.so'), ['-ldl']);
  const child = spawn(process.execPath, ['--import', 'tsx', join(SUPPORT, 'zero_copy_child.ts')], { env: { ...process.env, LD_PRELOAD: shim } });
  let said = '';
  child.stdout.on('data', (chunk: Buffer) => { said += chunk.toString(); });
  child.stderr.on('data', (chunk: Buffer) => { said += chunk.toString(); });
  const patience = setTimeout(() => child.kill('SIGKILL'), PATIENCE_MS);
  const [status, signal] = await new Promise<[number | null, NodeJS.Signals | null]>((resolve) => child.on('close', (...end) => resolve(end)));
  clearTimeout(patience);
  assert.is(signal, null, `the sender still waited after ${PATIENCE_MS} ms`);
  assert.is(status, 0, said);
  assert.match(said, /^done$/m);
  const reordered = Number(/completions out of order: (\d+)/.exec(said)?.[1]);
  assert.ok(reordered > 5, `only ${reordered} completions came out of order`);
});

test.run();
