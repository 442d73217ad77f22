/** The native fits against float64 written out plainly. */
import { Matrix, solve } from 'ml-matrix';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { native } from '../../src/native/loader.js';
import type { FitTarget, LayerFit, LayerSample, LayerShape, LayerWeights, RankDesign } from '../../src/native/reparam.js';
import { gaussian } from '../support/checkpoint.js';

const test = suite('reparam/layer_fit');
const TARGET: FitTarget = { device: 'cpu', threads: 2 };
const SHAPE: LayerShape = { heads: 3, nope: 5, rope: 4, v: 6, latent: 12, hidden: 10, softmaxScale: 0.4 };
/** The first is longer than one stretch of queries. */
const SEQUENCES = [0, 150, 177, 190];
const TOKENS = 190;
const random = gaussian(11);
const fill = (count: number, scale = 1) => Float32Array.from({ length: count }, () => scale * random());

/** Latents with a falling spectrum, as trained models have. */
const sample: LayerSample = {
  sequences: Int32Array.from(SEQUENCES),
  latents: Float32Array.from({ length: TOKENS * SHAPE.latent }, (_, i) => random() * 2 * 0.8 ** (i % SHAPE.latent) + 0.3),
  ropeKeys: fill(TOKENS * SHAPE.rope),
  queryTokens: Int32Array.from({ length: TOKENS }, (_, i) => i),
  queries: fill(TOKENS * SHAPE.heads * (SHAPE.nope + SHAPE.rope)),
};
const weights: LayerWeights = {
  uk: fill(SHAPE.heads * SHAPE.nope * SHAPE.latent, 0.4),
  uv: fill(SHAPE.heads * SHAPE.v * SHAPE.latent, 0.4),
  wo: fill(SHAPE.hidden * SHAPE.heads * SHAPE.v, 0.3),
};

function open(train = 3): LayerFit {
  return new (native().LayerFit)(SHAPE, weights, sample, { train, target: TARGET });
}

/** Rank i holds `width` coordinates from `begin`, weights cut out of the exact ones. */
function slice(begin: number, width: number): RankDesign {
  const columns = (from: Float32Array) => Float32Array.from({ length: (from.length / SHAPE.latent) * width }, (_, i) => from[Math.floor(i / width) * SHAPE.latent + begin + (i % width)]!);
  return { basis: Float32Array.from({ length: width * SHAPE.latent }, (_, i) => (i % SHAPE.latent === begin + Math.floor(i / SHAPE.latent) ? 1 : 0)), uk: columns(weights.uk), uv: columns(weights.uv) };
}

interface Attended {
  p: number[];
  u: number[];
}

/** Attention of one head and query over a rank's columns. */
function attend(rank: RankDesign, query: number, head: number): Attended {
  const width = rank.basis.length / SHAPE.latent;
  const begin = SEQUENCES.findLast((first) => first <= query)!;
  const q = sample.queries.subarray((query * SHAPE.heads + head) * (SHAPE.nope + SHAPE.rope));
  const rows = Array.from({ length: query - begin + 1 }, (_, t) =>
    Array.from({ length: width }, (_, j) => sum(SHAPE.latent, (c) => rank.basis[j * SHAPE.latent + c]! * sample.latents[(begin + t) * SHAPE.latent + c]!)));
  const scores = rows.map((u, t) =>
    SHAPE.softmaxScale * (sum(SHAPE.nope, (d) => q[d]! * sum(width, (j) => rank.uk[(head * SHAPE.nope + d) * width + j]! * u[j]!)) + sum(SHAPE.rope, (d) => q[SHAPE.nope + d]! * sample.ropeKeys[(begin + t) * SHAPE.rope + d]!)));
  const top = Math.max(...scores);
  const total = sum(scores.length, (t) => Math.exp(scores[t]! - top));
  const p = scores.map((score) => Math.exp(score - top) / total);
  return { p, u: Array.from({ length: width }, (_, j) => sum(p.length, (t) => p[t]! * rows[t]![j]!)) };
}

function headValue(design: RankDesign[], query: number, head: number): number[] {
  return Array.from({ length: SHAPE.v }, (_, d) => design.reduce((value, rank) => {
    const width = rank.basis.length / SHAPE.latent;
    const { u } = attend(rank, query, head);
    return value + sum(width, (j) => rank.uv[(head * SHAPE.v + d) * width + j]! * u[j]!);
  }, 0));
}

function relativeError(design: RankDesign[], begin: number, end: number): number {
  const exact = [slice(0, SHAPE.latent)];
  let wrong = 0;
  let total = 0;
  for (let query = SEQUENCES[begin]!; query < SEQUENCES[end]!; query++) {
    const heads = (d: RankDesign[]) => Array.from({ length: SHAPE.heads }, (_, head) => headValue(d, query, head)).flat();
    const got = heads(design);
    const want = heads(exact);
    for (let i = 0; i < SHAPE.hidden; i++) {
      const row = (x: number[]) => sum(x.length, (j) => weights.wo[i * x.length + j]! * x[j]!);
      wrong += (row(got) - row(want)) ** 2;
      total += row(want) ** 2;
    }
  }
  return wrong / total;
}

function sum(count: number, term: (i: number) => number): number {
  let total = 0;
  for (let i = 0; i < count; i++) total += term(i);
  return total;
}

const near = (actual: number, expected: number, relative: number, what = '') =>
  assert.ok(Math.abs(actual - expected) <= relative * Math.max(Math.abs(expected), 1e-6), `${what} ${actual} is not ${expected}`);

test('the whole latent on one rank is exact', async () => {
  const { trainError } = await open().run([slice(0, SHAPE.latent)], []);
  assert.ok(trainError < 1e-10, String(trainError));
});

test('the error of two slices, as float64 computes it; sequences after `train` measure only', async () => {
  const design = [slice(0, 6), slice(6, 6)];
  const { trainError, testError } = await open(2).run(design, []);
  near(trainError, relativeError(design, 0, 2), 1e-4, 'train');
  near(testError, relativeError(design, 2, 3), 1e-4, 'test');
});

test('scales are the least squares under exact attention', async () => {
  const design = [slice(0, 6), slice(6, 6)];
  const { design: fitted } = await open().run(design, [{ kind: 'scales', perHead: true }]);
  const exact = slice(0, SHAPE.latent);
  for (const [i, rank] of design.entries()) {
    let cross = 0;
    let own = 0;
    for (let query = 0; query < TOKENS; query++) {
      const { p } = attend(exact, query, 1);
      const begin = SEQUENCES.findLast((first) => first <= query)!;
      const q = sample.queries.subarray((query * SHAPE.heads + 1) * (SHAPE.nope + SHAPE.rope));
      const logit = (from: RankDesign, t: number) => {
        const width = from.basis.length / SHAPE.latent;
        return sum(width, (j) => sum(SHAPE.nope, (d) => q[d]! * from.uk[(SHAPE.nope + d) * width + j]!) * sum(SHAPE.latent, (c) => from.basis[j * SHAPE.latent + c]! * sample.latents[(begin + t) * SHAPE.latent + c]!));
      };
      const covariance = (a: RankDesign, b: RankDesign) =>
        sum(p.length, (t) => p[t]! * logit(a, t) * logit(b, t)) - sum(p.length, (t) => p[t]! * logit(a, t)) * sum(p.length, (t) => p[t]! * logit(b, t));
      cross += covariance(exact, rank);
      own += covariance(rank, rank);
    }
    const at = SHAPE.nope * 6 + 3;
    near(fitted[i]!.uk[at]! / rank.uk[at]!, cross / own, 1e-3, `rank ${i}`);
  }
});

test('values are the ridge regression around the given ones', async () => {
  const design = [slice(0, 6), slice(6, 6)];
  const ridge = 0.01;
  const { design: fitted } = await open().run(design, [{ kind: 'values', ridge }]);
  const head = 2;
  const outputs = Array.from({ length: TOKENS }, (_, query) => design.flatMap((rank) => attend(rank, query, head).u));
  const rest = Array.from({ length: TOKENS }, (_, query) => {
    const want = headValue([slice(0, SHAPE.latent)], query, head);
    const got = headValue(design, query, head);
    return want.map((x, d) => x - got[d]!);
  });
  const z = new Matrix(outputs);
  const gram = z.transpose().mmul(z);
  for (let i = 0; i < gram.rows; i++) gram.set(i, i, gram.get(i, i) * (1 + ridge));
  const correction = solve(gram, z.transpose().mmul(new Matrix(rest)));
  design.forEach((rank, i) => {
    for (let d = 0; d < SHAPE.v; d++) {
      for (let j = 0; j < 6; j++) {
        const at = (head * SHAPE.v + d) * 6 + j;
        assert.ok(Math.abs(fitted[i]!.uv[at]! - (rank.uv[at]! + correction.get(i * 6 + j, d))) < 2e-3, `rank ${i} [${d}, ${j}]`);
      }
    }
  });
});

test('each fit lowers the error, descent most; shared rows stay one', async () => {
  const fit = open();
  const shared = (begin: number, width: number) => {
    const [common, own] = [slice(0, 2), slice(begin, width)];
    const join = (a: Float32Array, b: Float32Array, rows: number) => Float32Array.from({ length: a.length + b.length }, (_, i) => {
      const row = Math.floor(i / (2 + width));
      const column = i % (2 + width);
      return rows === 0 ? 0 : column < 2 ? a[row * 2 + column]! : b[row * width + column - 2]!;
    });
    return { basis: Float32Array.from([...common.basis, ...own.basis]), uk: join(common.uk, own.uk, 1), uv: join(common.uv, own.uv, 1) };
  };
  const design = [shared(2, 5), { ...shared(7, 5) }];
  for (let row = 0; row < SHAPE.heads * SHAPE.v; row++) for (let j = 0; j < 2; j++) design[1]!.uv[row * 7 + j] = 0;
  const plain = await fit.run(design, []);
  const queries = await fit.run(design, [{ kind: 'queries' }]);
  const values = await fit.run(design, [{ kind: 'queries' }, { kind: 'values', ridge: 1e-3 }]);
  const refined = await fit.run(values.design, [{ kind: 'refine', steps: 150, rate: 0.02, batch: 256, basis: true, shared: 2, seed: 1 }]);
  assert.ok(queries.trainError < plain.trainError, `${queries.trainError} ${plain.trainError}`);
  assert.ok(values.trainError < queries.trainError * 0.9, `${values.trainError} ${queries.trainError}`);
  assert.ok(refined.trainError < values.trainError * 0.5, `${refined.trainError} ${values.trainError}`);
  assert.equal(refined.design[0]!.basis.subarray(0, 24), refined.design[1]!.basis.subarray(0, 24));
  near(refined.trainError, relativeError(refined.design, 0, 3), 1e-3, 'refined');
});

test('descent ends below the closed forms; the seed decides its bits', async () => {
  // Large enough for products that processors with matrix units make there.
  const shape: LayerShape = { heads: 4, nope: 16, rope: 16, v: 16, latent: 64, hidden: 48, softmaxScale: 0.18 };
  const [sequences, length] = [10, 96];
  const tokens = sequences * length;
  const falling = (count: number) => Float32Array.from({ length: count }, (_, i) => random() * 2 * 0.95 ** (i % shape.latent));
  const wide: LayerSample = {
    sequences: Int32Array.from({ length: sequences + 1 }, (_, i) => i * length), latents: falling(tokens * shape.latent), ropeKeys: fill(tokens * shape.rope),
    queryTokens: Int32Array.from({ length: tokens }, (_, i) => i), queries: fill(tokens * shape.heads * (shape.nope + shape.rope)),
  };
  const exact: LayerWeights = { uk: fill(shape.heads * shape.nope * shape.latent, 0.15), uv: fill(shape.heads * shape.v * shape.latent, 0.15), wo: fill(shape.hidden * shape.heads * shape.v, 0.2) };
  const half = (rank: number): RankDesign => {
    const columns = (from: Float32Array) => from.filter((_, i) => Math.floor((i % 64) / 32) === rank);
    return { basis: Float32Array.from({ length: 32 * 64 }, (_, i) => (i % 64 === rank * 32 + Math.floor(i / 64) ? 1 : 0)), uk: columns(exact.uk), uv: columns(exact.uv) };
  };
  const descend = async (seed: number) => {
    const fit = new (native().LayerFit)(shape, exact, wide, { train: 8, target: TARGET });
    const closed = await fit.run([half(0), half(1)], [{ kind: 'queries' }, { kind: 'values', ridge: 1e-2 }]);
    const refined = await fit.run(closed.design, [{ kind: 'refine', steps: 60, rate: 0.004, batch: 256, basis: true, shared: 0, seed }]);
    return { closed, refined };
  };
  const [first, again, other] = [await descend(1), await descend(1), await descend(2)];
  assert.ok(first.refined.trainError < first.closed.trainError * 0.9, `${first.refined.trainError} ${first.closed.trainError}`);
  assert.equal(first.refined.design, again.refined.design);
  assert.not.equal(first.refined.design, other.refined.design);
});

test('products of small and large matrices', async () => {
  for (const [m, k, n] of [[7, 33, 70], [130, 300, 1030], [33, 47, 65]] as const) {
    const [a, b] = [fill(m * k), fill(k * n)];
    const c = await native().multiply(a, b, m, k, n, TARGET);
    for (const [i, j] of [[0, 0], [m - 1, n - 1], [m >> 1, n >> 1], [m - 1, 1]] as const) {
      const exact = sum(k, (l) => a[i * k + l]! * b[l * n + j]!);
      assert.ok(Math.abs(c[i * n + j]! - exact) < 1e-6 * k, `${m} x ${k} x ${n} [${i}, ${j}]: ${c[i * n + j]} is not ${exact}`);
    }
  }
});

test('arguments that do not fit are refused by name', () => {
  assert.throws(() => new (native().LayerFit)(SHAPE, { ...weights, uk: new Float32Array(3) }, sample, { train: 1, target: TARGET }), /weights\.uk: expected 180 numbers, got 3/);
  assert.throws(() => new (native().LayerFit)(SHAPE, weights, { ...sample, queryTokens: Int32Array.of(999) }, { train: 1, target: TARGET }), /sample\.queryTokens/);
});

test.run();
