import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { judge } from '../../../src/bench/attention/run.js';
import type { DecodeProblem, LogitVariantsProblem } from '../../../src/native/attention.js';
import { native } from '../../../src/native/loader.js';
import { randomVariants } from '../../support/logit_variants.js';
import { Draw } from '../../support/random.js';

const CPU = { kind: 'cpu', threads: 2 } as const;
const CHECK = { repeats: 2, runs: 0, reference: 'auto' } as const;

function problem(fields: Partial<DecodeProblem>): DecodeProblem {
  return {
    kind: 'decode', kvLens: Int32Array.of(40), qLens: Int32Array.of(1), heads: 3, latent: 128, rope: 64, pageTokens: 16, pageGapBytes: 0, kvDType: 'f32', causal: true,
    latentScale: false, queryScale: 1, path: 'auto', ...fields,
  };
}

test('the CPU engine applies any combination of variants as the float64 reference does', async () => {
  for (let seed = 1; seed <= 40; seed++) {
    const draw = new Draw(seed);
    const kvLens = Int32Array.from({ length: draw.integer(1, 4) }, () => (draw.chance(1 / 6) ? 0 : draw.integer(1, 400)));
    const drawn = problem({ kvLens, qLens: kvLens.map(() => draw.integer(1, 4)), heads: draw.integer(1, 9), causal: draw.chance(3 / 4), variants: randomVariants(draw, kvLens) });
    const { check } = await native().attention.run(CPU, drawn, { ...CHECK, seed });
    assert.ok(check);
    assert.is(judge(check, 'cpu', 'decode'), 'ok', `seed ${seed}: ${JSON.stringify(check)}`);
  }
});

test('block lists that do not fit the batch, or are not ascending, are refused', async () => {
  const mask = (maskCounts: number[], maskBlocks: number[], maskBlock = 16): LogitVariantsProblem => (
    { softcap: 0, window: 0, alibi: false, maskBlock, maskCounts: Int32Array.from(maskCounts), maskBlocks: Int32Array.from(maskBlocks) });
  for (const [variants, expected] of [
    [mask([1, 1], [0, 1]), /variants\.maskCounts: expected as many counts as kvLens has lengths/],
    [mask([3], [0, 1]), /variants\.maskBlocks: expected as many blocks as maskCounts says/],
    [mask([2], [1, 1]), /variants\.maskBlocks: .*ascending/],
    [mask([1], [-1]), /variants\.maskBlocks: .*from 0/],
    [{ ...mask([1], [0]), softcap: '5' } as unknown as LogitVariantsProblem, /variants\.softcap: expected a number/],
  ] as const) {
    await Promise.resolve().then(() => native().attention.plan(CPU, problem({ variants }))).then(
      () => assert.unreachable(JSON.stringify(variants)),
      (error: Error & { code: string }) => {
        assert.is(error.code, 'REQUEST_INVALID');
        assert.match(error.message, expected);
      },
    );
  }
});

test('ordinary keys and values are refused on the CPU, saying what runs there', async () => {
  await native().attention.plan(CPU, { ...problem({}), kind: 'gqa', kvHeads: 1, headDim: 64, layout: 'nhd' }).then(
    () => assert.unreachable('a kernel that CPUs do not have'),
    (error: Error) => assert.match(error.message, /ordinary keys and values runs on GPUs only/),
  );
});

test.run();
