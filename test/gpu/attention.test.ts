// time limit: 600 s
// Attention kernels on a real GPU. `npm test` skips them where there is none; `npm run test:gpu` fails there.
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { PRESETS } from '../../src/bench/attention/presets.js';
import { benchRows } from '../../src/bench/attention/run.js';
import { native } from '../../src/native/loader.js';

const cuda = native().probe().cuda;
const usable = cuda.compiled && cuda.devices.length > 0;
const required = process.env.TPLA_TEST_GPU === 'required';
const gpuTest = usable ? test : test.skip;
const seeds = (first: number, count: number) => Array.from({ length: count }, (_, i) => first + i);

if (required) test('a GPU is there and the addon can use it', () => assert.ok(usable, cuda.compiled ? cuda.reason ?? 'no GPU' : 'the addon was built without CUDA'));

gpuTest('decode agrees with float64 on random shapes, to the same bits ten times', async () => {
  for (const seed of seeds(1, 60)) {
    const verdict = await native().benchAttention({ operation: 'checkRandom', kind: 'decode', path: 'auto', repeats: 10, seed });
    assert.ok(verdict.ok, JSON.stringify(verdict));
  }
});

gpuTest('the generic decode path agrees too, where it is forced', async () => {
  for (const seed of seeds(1001, 24)) {
    const verdict = await native().benchAttention({ operation: 'checkRandom', kind: 'decode', path: 'sm80', repeats: 3, seed });
    assert.ok(verdict.ok, JSON.stringify(verdict));
  }
});

gpuTest('prefill agrees with float64 on random ragged batches', async () => {
  for (const seed of seeds(1, 30)) {
    const verdict = await native().benchAttention({ operation: 'checkRandom', kind: 'prefill', repeats: 5, seed });
    assert.ok(verdict.ok, JSON.stringify(verdict));
  }
});

gpuTest('a shape no kernel takes is refused with what is taken', async () => {
  const call = native().benchAttention({ operation: 'check', kind: 'decode', latent: 192, heads: 16, qTokens: 1, pageSize: 64, kvLens: Int32Array.of(64), causal: true, path: 'auto', repeats: 1, seed: 1 });
  await call.then(() => assert.unreachable(), (error: Error & { code: string }) => {
    assert.is(error.code, 'REQUEST_INVALID');
    assert.match(error.message, /128, 256, 320 and 512; got 192/);
  });
});

gpuTest('a preset is checked and timed', async () => {
  const { results } = await benchRows(native(), PRESETS.thundermla, { path: 'auto', seed: 1, repeats: 2, others: new Map() });
  for (const result of results) assert.ok(result.ms > 0 && result.error < 8e-3, JSON.stringify(result));
});

test.run();
