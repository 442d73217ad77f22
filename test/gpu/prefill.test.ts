// time limit: 600 s
import { suite } from 'uvu';
import { native } from '../../src/native/loader.js';
import * as assert from 'uvu/assert';
import { Draw } from '../support/random.js';
import { GPU, mustBeRight, randomPrefill } from './problems.js';

const test = suite('prefill attention on the GPU');
const { capability } = await native().attention.describeGpu(GPU.index);

if (capability === '9.0') {
  test('forty random batches against float64, ten launches with the same bits', async () => {
    for (let seed = 1; seed <= 40; seed++) await mustBeRight(randomPrefill(new Draw(seed)), { seed });
  });
} else {
  test(`compute capability ${capability} is refused with what is needed`, async () => {
    await native().attention.plan(GPU, randomPrefill(new Draw(1))).then(
      () => assert.unreachable('a kernel that this GPU does not have'),
      (error: Error & { code: string }) => {
        assert.is(error.code, 'REQUEST_INVALID');
        assert.match(error.message, 'compute capability 9.0');
      },
    );
  });
}

test.run();
