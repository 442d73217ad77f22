// time limit: 600 s
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { native } from '../../src/native/loader.js';
import { Draw } from '../support/random.js';
import { GPU, LATENTS, mustBeRight, randomPod } from './problems.js';

const test = suite('fused prefill and decode on the GPU');
const { capability } = await native().attention.describeGpu(GPU.index);
const FUSED = capability === '9.0' ? 'sm90 fused' : 'sm80, sm80';

for (const latent of LATENTS) {
  test(`latent ${latent}: random batches of both against float64, ten launches with the same bits`, async () => {
    for (let seed = 1; seed <= 10; seed++) await mustBeRight(randomPod(new Draw(seed * 100 + latent), latent), { seed });
  });
}

test('whatever the split of the multiprocessors', async () => {
  for (const decodeMultiprocessors of [1, 60, 131, 1000]) {
    await mustBeRight({ ...randomPod(new Draw(7), 256), decodeMultiprocessors }, { seed: decodeMultiprocessors, repeats: 4 });
  }
});

test('a very long sequence beside short ones, and more sequences than multiprocessors', async () => {
  const pod = randomPod(new Draw(3), 512);
  const uneven = { ...pod.decode, kvLens: Int32Array.of(60000, 1, 0, 300), qLens: Int32Array.of(1, 1, 1, 1), heads: 16 };
  const many = { ...pod.decode, kvLens: Int32Array.from({ length: 1000 }, (_, i) => i % 97), qLens: new Int32Array(1000).fill(1), heads: 8 };
  for (const decode of [uneven, many]) await mustBeRight({ ...pod, decode }, { seed: 3, repeats: 4 });
});

test('what cannot be fused runs as two launches, and says so', async () => {
  const pod = randomPod(new Draw(5), 256);
  assert.is(await native().attention.plan(GPU, pod), FUSED);
  const wide = { ...pod, decode: { ...pod.decode, heads: 128 } };
  const many = { ...pod, decode: { ...pod.decode, kvLens: new Int32Array(1500).fill(3), qLens: new Int32Array(1500).fill(1) } };
  const alone = { ...pod, prefill: { ...pod.prefill, qLens: Int32Array.of(0), kvLens: Int32Array.of(50) } };
  for (const problem of [wide, many, alone]) {
    assert.is(await native().attention.plan(GPU, problem), capability === '9.0' ? 'sm90, sm90' : 'sm80, sm80');
    await mustBeRight(problem, { seed: 5, repeats: 4 });
  }
});

test.run();
