/** A disk that fills up, for real: a small tmpfs. Needs the right to mount; without it the tests are skipped. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import { SafetensorsWriter } from '../../src/model/safetensors_writer.js';
import { convert } from '../../src/reparam/convert.js';
import { METHODS } from '../../src/reparam/method.js';
import { SILENT } from '../../src/report/progress.js';
import { writeCheckpoint } from '../support/checkpoint.js';
import { writeTokenizer } from '../support/tokenizer.js';

const test = suite('reparam/disk full');
const dir = mkdtempSync(join(tmpdir(), 'tpla-full-'));
const disk = mkdtempSync(join(dir, 'disk-'));
const mounted = spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=128k', 'tmpfs', disk]).status === 0;
if (!mounted) console.log('skipping a full disk: this process may not mount a tmpfs');
const check = mounted ? test : test.skip;

test.after(() => {
  if (mounted) spawnSync('umount', [disk]);
  rmSync(dir, { recursive: true });
});

check('a conversion that cannot fit is refused before it starts', async () => {
  const model = join(dir, 'model');
  writeCheckpoint(model);
  writeTokenizer(model);
  try {
    await convert({ model, out: join(disk, 'out'), methodName: 'identity', method: METHODS.identity!, widths: null, groups: 2, calibration: null, output: 'auto', seed: 1, device: 'cpu', threads: 1 }, SILENT);
    assert.unreachable();
  } catch (error) {
    assert.is((error as TplaError).code, 'IO_FAILED');
    assert.match((error as Error).message, /the disk is full: about [\d.]+ GB are needed/);
  }
  assert.equal(readdirSync(disk), []);
});

check('a file that runs out of room half-way leaves nothing behind', () => {
  const path = join(disk, 'x.safetensors');
  const bytes = 256 * 1024;
  const writer = new SafetensorsWriter(path, [{ name: 'a', dtype: 'U8', shape: [bytes] }]);
  assert.ok(statSync(`${path}.partial`).size > 0);
  try {
    for (let at = 0; at < bytes; at += 4096) writer.write('a', new Uint8Array(4096));
    assert.unreachable();
  } catch (error) {
    assert.is((error as TplaError).code, 'IO_FAILED', String(error));
    assert.match((error as Error).message, 'x.safetensors cannot be written: the disk is full');
  }
  writer.abort();
  assert.equal(readdirSync(disk), []);
  writeFileSync(join(disk, 'room'), 'again');
});

test('a directory that is not there', () => {
  assert.throws(() => new SafetensorsWriter(join(dir, 'none', 'x.safetensors'), []), (error: TplaError) => error.code === 'IO_FAILED' && error.message.includes('cannot be written: ENOENT'));
});

test.run();
