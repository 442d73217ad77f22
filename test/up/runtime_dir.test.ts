import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { makeRuntimeDir, sweepRuntimeDirs } from '../../src/up/runtime_dir.js';

const test = suite('up/runtime_dir');
const base = mkdtempSync(join(tmpdir(), 'tpla-base-'));
test.after(() => rmSync(base, { recursive: true }));

/** A pid that has just ended. */
const deadPid = (): number => spawnSync('true').pid;

test('a directory of its own, for its user alone', () => {
  const [first, second] = [makeRuntimeDir(base), makeRuntimeDir(base)];
  assert.is.not(first, second);
  assert.is(statSync(first).mode & 0o777, 0o700);
});

test('what a dead supervisor left is swept; what lives, answers or is not ours stays', async () => {
  const mine = makeRuntimeDir(base);
  const dead = join(base, `tpla-${deadPid()}-abcdef`);
  const answering = join(base, `tpla-${deadPid()}-ghijkl`);
  const foreign = join(base, 'tpla-notes');
  for (const path of [dead, answering, foreign]) mkdirSync(path);
  writeFileSync(join(dead, 'decode-0.yaml'), '');
  const server = createServer().listen(join(answering, 'decode-0.sock'));
  await new Promise((resolve) => server.once('listening', resolve));
  assert.equal(await sweepRuntimeDirs(base), [dead]);
  assert.equal([mine, dead, answering, foreign].map((path) => existsSync(path)), [true, false, true, true]);
  await new Promise((resolve) => server.close(resolve));
  assert.equal(await sweepRuntimeDirs(base), [answering]);
  assert.ok(readdirSync(base).includes('tpla-notes'));
});

test.run();
