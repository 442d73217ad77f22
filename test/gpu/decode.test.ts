// time limit: 600 s
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { AttentionPath } from '../../src/native/attention.js';
import { native } from '../../src/native/loader.js';
import { randomVariants } from '../support/logit_variants.js';
import { Draw } from '../support/random.js';
import { GPU, LATENTS, mustBeRight, randomDecode } from './problems.js';

const test = suite('decode attention on the GPU');

const SHAPES_PER_LATENT = 15;

for (const path of ['auto', 'sm80'] satisfies AttentionPath[]) {
  for (const latent of LATENTS) {
    test(`latent ${latent}, path ${path}: ${SHAPES_PER_LATENT} random shapes against float64, ten launches with the same bits`, async () => {
      for (let seed = 1; seed <= SHAPES_PER_LATENT; seed++) {
        await mustBeRight(randomDecode(new Draw(seed * 1000 + latent), path, latent), { seed });
      }
    });
  }
}

test(`latent 288, which only kernels for compute capability 9.0 take: ${SHAPES_PER_LATENT} random shapes; elsewhere one error says so`, async () => {
  const { capability } = await native().attention.describeGpu(GPU.index);
  for (let seed = 1; seed <= SHAPES_PER_LATENT; seed++) {
    const problem = { ...randomDecode(new Draw(seed * 1000 + 288), 'auto', 288), kvDType: seed % 2 ? 'bf16' as const : 'fp8' as const };
    if (capability.startsWith('9.')) await mustBeRight(problem, { seed });
    else await native().attention.plan(GPU, problem).then(() => assert.unreachable('288 was taken'), (error) => assert.match(String(error.message), /compute capability 9\.0/));
  }
});

for (const path of ['auto', 'sm80'] satisfies AttentionPath[]) {
  test(`chunks of up to 512 query tokens, path ${path}: more rows than blocks take side by side`, async () => {
    for (let seed = 1; seed <= 12; seed++) {
      const draw = new Draw(seed * 311);
      const qLens = Int32Array.from({ length: draw.integer(1, 3) }, () => draw.integer(5, 512));
      const kvLens = qLens.map((len) => len + draw.integer(0, 1500));
      const problem = randomDecode(draw, path, draw.of(LATENTS));
      await mustBeRight({ ...problem, qLens, kvLens, heads: draw.of([8, 16, 40]) }, { seed, repeats: 4 });
    }
  });
}

for (const path of ['auto', 'sm80'] satisfies AttentionPath[]) {
  test(`logit variants, path ${path}: random shapes and combinations; what no query sees is NaN or does not exist`, async () => {
    for (let seed = 1; seed <= 60; seed++) {
      const draw = new Draw(seed * 77);
      const problem = randomDecode(draw, path, draw.of(LATENTS));
      await mustBeRight({ ...problem, variants: randomVariants(draw, problem.kvLens) }, { seed });
    }
  });
}

for (const path of ['auto', 'sm80'] satisfies AttentionPath[]) {
  test(`fp8 KV, path ${path}: random shapes of every latent against float64, ten launches with the same bits`, async () => {
    for (const latent of LATENTS) {
      for (let seed = 1; seed <= SHAPES_PER_LATENT; seed++) {
        await mustBeRight({ ...randomDecode(new Draw(seed * 1000 + latent + 7), path, latent), kvDType: 'fp8' }, { seed });
      }
    }
  });
}

test('the longest sequence of a batch may be far longer than the others', async () => {
  for (const heads of [16, 128]) {
    for (const latent of [512, 256]) {
      await mustBeRight({
        kind: 'decode', kvLens: Int32Array.of(1, 60000, 0, 17, 300), qLens: Int32Array.of(1, 1, 1, 1, 1), heads, latent, rope: 64, pageTokens: 64, pageGapBytes: 0,
        kvDType: 'bf16', causal: true, latentScale: false, queryScale: 1, path: 'auto',
      }, { seed: heads + latent, repeats: 4 });
    }
  }
});

test('every length zero gives zeros', async () => {
  for (const path of ['auto', 'sm80'] satisfies AttentionPath[]) {
    await mustBeRight({ ...randomDecode(new Draw(5), path, 256), kvLens: Int32Array.of(0, 0), qLens: Int32Array.of(2, 2) }, { seed: 5 });
  }
});

test.run();
