import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { native as loadNative } from '../../src/native/loader.js';
import type { SamplingParams } from '../../src/native/types.js';

const native = loadNative();
const PLAIN: SamplingParams = {
  temperature: 1, topK: 0, topP: 1, minP: 0, repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0, seed: 7n, logprobs: -1, logitBias: [],
};
const sampler = (params: Partial<SamplingParams> = {}): InstanceType<typeof native.Sampler> => new native.Sampler({ ...PLAIN, ...params });
const LOGITS = Float32Array.from([1, 3, -2, 0.5, 2.5, 2.9, -Infinity, 0]);

function softmax(logits: ArrayLike<number>, temperature = 1): number[] {
  const values = Array.from(logits, (x) => x / temperature);
  const top = Math.max(...values);
  const exps = values.map((x) => Math.exp(x - top));
  const sum = exps.reduce((a, b) => a + b, 0);
  return exps.map((x) => x / sum);
}

/** Frequencies of `draws` steps. */
function frequencies(params: Partial<SamplingParams>, logits = LOGITS, draws = 20000): number[] {
  const counts = new Array<number>(logits.length).fill(0);
  const subject = sampler(params);
  for (let step = 0; step < draws; step++) counts[subject.sample(logits, step).token]!++;
  return counts.map((count) => count / draws);
}

/** Five standard deviations of a frequency over `draws`: the draws are fixed by the seed, so this either always holds or never. */
function assertDistribution(actual: number[], expected: number[], draws = 20000): void {
  expected.forEach((p, token) => assert.ok(Math.abs(actual[token]! - p) <= 5 * Math.sqrt((p * (1 - p)) / draws), `token ${token}: ${actual[token]}, expected ${p}`));
}

function restricted(tokens: number[], probabilities: number[]): number[] {
  const mass = tokens.reduce((sum, token) => sum + probabilities[token]!, 0);
  return probabilities.map((p, token) => (tokens.includes(token) ? p / mass : 0));
}

function codeOf(run: () => unknown): string | undefined {
  try {
    run();
  } catch (error) {
    return (error as { code?: string }).code;
  }
  return undefined;
}

test('greedy takes the largest logit, the first of equals', () => {
  assert.is(sampler({ temperature: 0 }).sample(LOGITS, 0).token, 1);
  assert.is(sampler({ temperature: 0 }).sample(Float32Array.from([0, 5, 5]), 3).token, 1);
});

test('temperature draws from the tempered softmax', () => {
  for (const temperature of [1, 0.5, 3]) assertDistribution(frequencies({ temperature }), softmax(LOGITS, temperature));
  assertDistribution(frequencies({ temperature: 1e-6 }), [0, 1, 0, 0, 0, 0, 0, 0]);
});

test('top-k, top-p and min-p keep what they say, renormalised', () => {
  const p = softmax(LOGITS);
  assertDistribution(frequencies({ topK: 3 }), restricted([1, 5, 4], p));
  assertDistribution(frequencies({ topK: 100 }), p);
  // Cumulative: 1: 0.36, 5: 0.69, 4: 0.91.
  assertDistribution(frequencies({ topP: 0.3 }), restricted([1], p));
  assertDistribution(frequencies({ topP: 0.5 }), restricted([1, 5], p));
  assertDistribution(frequencies({ topP: 0.7 }), restricted([1, 5, 4], p));
  assertDistribution(frequencies({ topP: 0 }), restricted([1], p));
  assertDistribution(frequencies({ minP: 0.13 }), restricted([0, 1, 4, 5], p));
  // Within the three kept by top-k, two make up 0.5 of the mass.
  assertDistribution(frequencies({ topK: 3, topP: 0.5 }), restricted([1, 5], p));
  assertDistribution(frequencies({ topP: 0.99, minP: 0.5 }), restricted([1, 5, 4], p));
});

test('top-p over a large vocabulary equals sorting all of it', () => {
  let state = 3;
  const logits = Float32Array.from({ length: 50_000 }, () => ((state = (state * 1103515245 + 12345) % 2147483648) / 2147483648) * 12);
  const p = softmax(logits, 0.7);
  const order = [...p.keys()].sort((a, b) => p[b]! - p[a]!);
  let mass = 0;
  const kept = new Set<number>();
  for (const token of order) {
    if (mass >= 0.9) break;
    kept.add(token);
    mass += p[token]!;
  }
  const subject = sampler({ temperature: 0.7, topP: 0.9 });
  const seen = new Set<number>();
  for (let step = 0; step < 300; step++) seen.add(subject.sample(logits, step).token);
  // A token at the very edge may fall on either side of a sum in another order.
  const outside = [...seen].filter((token) => !kept.has(token));
  assert.ok(outside.length <= 1, `${outside.length} tokens outside of the nucleus`);
  assert.ok(seen.size > 200);
});

test('a draw depends on seed and step alone', () => {
  const first = sampler({ seed: 42n });
  const sequence = Array.from({ length: 50 }, (_, step) => first.sample(LOGITS, step).token);
  const second = sampler({ seed: 42n });
  for (const step of [49, 3, 17, 3, 0]) assert.is(second.sample(LOGITS, step).token, sequence[step]);
  const other = sampler({ seed: 43n });
  assert.not.equal(Array.from({ length: 50 }, (_, step) => other.sample(LOGITS, step).token), sequence);
  assert.ok(new Set(Array.from({ length: 64 }, (_, i) => sampler({ seed: BigInt(i) }).sample(new Float32Array(1000), 0).token)).size > 50);
});

test('repetition counts prompt and output, presence and frequency the output only', () => {
  const logits = Float32Array.from([2, 1.9, -1, -1.1]);
  const repetition = sampler({ temperature: 0, repetitionPenalty: 1.2 });
  assert.is(repetition.sample(logits, 0).token, 0);
  repetition.accept(Int32Array.of(0), true);
  assert.is(repetition.sample(logits, 0).token, 1);
  repetition.accept(Int32Array.of(1), false);
  assert.is(repetition.sample(logits, 0).token, 0);
  const negative = sampler({ temperature: 0, repetitionPenalty: 1.2 });
  negative.accept(Int32Array.of(0, 1, 2), true);
  assert.is(negative.sample(Float32Array.from([-5, -5, -1, -1.1]), 0).token, 3);

  const presence = sampler({ temperature: 0, presencePenalty: 0.5 });
  presence.accept(Int32Array.of(0), true);
  assert.is(presence.sample(logits, 0).token, 0);
  presence.accept(Int32Array.of(0), false);
  assert.is(presence.sample(logits, 0).token, 1);
  const frequency = sampler({ temperature: 0, frequencyPenalty: 0.06 });
  frequency.accept(Int32Array.of(0), false);
  assert.is(frequency.sample(logits, 0).token, 0);
  frequency.accept(Int32Array.of(0), false);
  assert.is(frequency.sample(logits, 0).token, 1);
});

test('logit bias adds before everything and leaves the logits as they were', () => {
  const logits = LOGITS.slice();
  const biased = sampler({ temperature: 0, logitBias: [{ token: 7, bias: 100 }, { token: 1, bias: -100 }] });
  assert.is(biased.sample(logits, 0).token, 7);
  assert.equal(logits, LOGITS);
  assert.is(frequencies({ logitBias: [{ token: 1, bias: -Infinity }] }, LOGITS, 500)[1], 0);
});

test('logprobs are those of the unmodified softmax', () => {
  const p = softmax(LOGITS);
  const { token, logprob, top } = sampler({ temperature: 0, logprobs: 3, logitBias: [{ token: 3, bias: 50 }] }).sample(LOGITS, 0);
  assert.is(token, 3);
  assert.ok(Math.abs(logprob - Math.log(p[3]!)) < 1e-6);
  assert.equal(top.map((entry) => entry.token), [1, 5, 4]);
  top.forEach((entry) => assert.ok(Math.abs(entry.logprob - Math.log(p[entry.token]!)) < 1e-6));
  assert.equal(sampler({ logprobs: 0 }).sample(LOGITS, 0).top, []);
  assert.ok(Number.isNaN(sampler().sample(LOGITS, 0).logprob));
  assert.is(sampler({ logprobs: 20 }).sample(LOGITS, 0).top.length, 8);
});

test('bad parameters and inputs are refused', () => {
  for (const params of [{ temperature: -1 }, { temperature: NaN }, { topK: -1 }, { topP: 1.5 }, { minP: -0.1 }, { repetitionPenalty: 0 }, { presencePenalty: NaN }, { logprobs: -2 }, { seed: 1 as never }, { logitBias: [{ token: -1, bias: 1 }] }]) {
    assert.is(codeOf(() => sampler(params)), 'REQUEST_INVALID', Object.keys(params)[0]);
  }
  assert.is(codeOf(() => sampler().accept(Int32Array.of(-1), true)), 'REQUEST_INVALID');
  assert.is(codeOf(() => sampler().sample(new Float32Array(0), 0)), 'REQUEST_INVALID');
  assert.is(codeOf(() => sampler().sample(LOGITS, -1)), 'REQUEST_INVALID');
  assert.is(codeOf(() => sampler({ logitBias: [{ token: 8, bias: 1 }] }).sample(LOGITS, 0)), 'REQUEST_INVALID');
  assert.is(codeOf(() => sampler().sample(new Float32Array(4).fill(NaN), 0)), 'INTERNAL');
  assert.is(codeOf(() => sampler({ temperature: 0 }).sample(new Float32Array(4).fill(-Infinity), 0)), 'INTERNAL');
});

test.run();
