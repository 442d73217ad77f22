// time limit: 600 s
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { AttentionPath } from '../../src/native/attention.js';
import { native } from '../../src/native/loader.js';
import { Draw } from '../support/random.js';
import { GPU, mustBeRight, randomPrefill } from './problems.js';

const test = suite('prefill attention on the GPU');
const { capability } = await native().attention.describeGpu(GPU.index);

for (const path of ['auto', 'sm80'] satisfies AttentionPath[]) {
  test(`path ${path}: forty random batches against float64, ten launches with the same bits`, async () => {
    for (let seed = 1; seed <= 40; seed++) await mustBeRight(randomPrefill(new Draw(seed), path), { seed });
  });

  test(`path ${path}: a long chunk behind a long prefix`, async () => {
    await mustBeRight({ ...randomPrefill(new Draw(1), path), qLens: Int32Array.of(1000, 1), kvLens: Int32Array.of(9000, 5000), heads: 3 }, { seed: 1, repeats: 4 });
  });
}

test('the kernel that runs is named, and sm90 is refused where the GPU has none', async () => {
  const plan = (path: AttentionPath) => native().attention.plan(GPU, randomPrefill(new Draw(1), path));
  assert.is(await plan('sm80'), 'sm80');
  assert.is(await plan('auto'), capability === '9.0' ? 'sm90' : 'sm80');
  if (capability === '9.0') return;
  await plan('sm90').then(
    () => assert.unreachable('a kernel that this GPU does not have'),
    (error: Error & { code: string }) => {
      assert.is(error.code, 'REQUEST_INVALID');
      assert.match(error.message, 'compute capability 9.0');
    },
  );
});

test.run();
