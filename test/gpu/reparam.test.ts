/** Layer fits on the GPU against those of the CPU, which test/reparam holds against float64: with cuBLASLt and with products of our own. */
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { native } from '../../src/native/loader.js';
import type { FitStep, FitTarget, FittedLayer, LayerFit, LayerSample, LayerShape, LayerWeights, RankDesign } from '../../src/native/reparam.js';
import { gaussian } from '../support/checkpoint.js';
import { Draw } from '../support/random.js';

const test = suite('reparam on the GPU');
const CPU: FitTarget = { device: 'cpu', threads: 0 };
const GPUS: [string, FitTarget][] = [['with cuBLASLt', { device: 'cuda', index: 0 }], ['alone', { device: 'cuda', index: 0, library: false }]];

/** Largest difference, in parts of the largest entry of what is right. */
function difference(found: Float32Array, right: Float32Array | Float64Array): number {
  let [top, worst] = [0, 0];
  for (let i = 0; i < right.length; i++) {
    top = Math.max(top, Math.abs(right[i]!));
    worst = Math.max(worst, Number.isFinite(found[i]!) ? Math.abs(found[i]! - right[i]!) : Infinity);
  }
  return worst / Math.max(top, 1e-30);
}

interface Problem {
  shape: LayerShape;
  sample: LayerSample;
  weights: LayerWeights;
}

/** Latents with a falling spectrum, as trained models have; sequences of any length, some without queries. */
function problem(seed: number, shape: LayerShape, lengths: number[], queriesOf: (length: number) => number): Problem {
  const random = gaussian(seed);
  const fill = (count: number, scale: number) => Float32Array.from({ length: count }, () => scale * random());
  const bounds = lengths.reduce((sums, length) => [...sums, sums[sums.length - 1]! + length], [0]);
  const queryTokens = lengths.flatMap((length, i) => {
    const count = queriesOf(length);
    return Array.from({ length: count }, (_, q) => bounds[i]! + Math.floor(((q + 0.5) * length) / count));
  });
  const tokens = bounds[bounds.length - 1]!;
  const { heads, nope, rope, v, latent, hidden } = shape;
  return {
    shape,
    sample: {
      sequences: Int32Array.from(bounds), queryTokens: Int32Array.from(queryTokens),
      latents: Float32Array.from({ length: tokens * latent }, (_, i) => random() * 3 * 0.01 ** ((i % latent) / latent) + 0.2),
      ropeKeys: fill(tokens * rope, 1), queries: fill(queryTokens.length * heads * (nope + rope), 1),
    },
    weights: { uk: fill(heads * nope * latent, latent ** -0.5), uv: fill(heads * v * latent, latent ** -0.5), wo: fill(hidden * heads * v, (heads * v) ** -0.5) },
  };
}

function open({ shape, weights, sample }: Problem, target: FitTarget): LayerFit {
  return new (native().LayerFit)(shape, weights, sample, { train: sample.sequences.length - 2, target });
}

/** Ranks that take `shared` columns together and cut the others into slices. */
function slices({ shape: { heads, nope, v, latent }, weights }: Problem, groups: number, shared: number): RankDesign[] {
  const slice = (latent - shared) / groups;
  const width = shared + slice;
  return Array.from({ length: groups }, (_, rank) => {
    const column = (j: number) => (j < shared ? j : j + rank * slice);
    const cut = (from: Float32Array, rows: number, silent: boolean) => Float32Array.from({ length: rows * width }, (_, i) => (silent && i % width < shared ? 0 : from[Math.floor(i / width) * latent + column(i % width)]!));
    return {
      basis: Float32Array.from({ length: width * latent }, (_, i) => (i % latent === column(Math.floor(i / latent)) ? 1 : 0)),
      uk: cut(weights.uk, heads * nope, false), uv: cut(weights.uv, heads * v, rank > 0),
    };
  });
}

const PROBLEMS: [string, Problem, number, number][] = [
  ['odd sizes', problem(3, { heads: 3, nope: 5, rope: 4, v: 7, latent: 18, hidden: 23, softmaxScale: 0.4 }, [33, 70, 1, 45, 64], (length) => Math.min(length, 37)), 2, 4],
  ['the demo model', problem(4, { heads: 8, nope: 32, rope: 32, v: 32, latent: 128, hidden: 256, softmaxScale: 0.125 }, Array(12).fill(300) as number[], () => 96), 4, 32],
  ['many heads', problem(5, { heads: 48, nope: 128, rope: 64, v: 128, latent: 256, hidden: 512, softmaxScale: 0.072 }, Array(4).fill(192) as number[], () => 96), 2, 0],
];

for (const [how, target] of GPUS) {
  test(`products of any shape, ${how}`, async () => {
    const draw = new Draw(7);
    const random = gaussian(8);
    for (let i = 0; i < 40; i++) {
      const [m, k, n] = [draw.integer(1, 300), draw.integer(1, 400), draw.integer(1, 300)] as const;
      const [a, b] = [Float32Array.from({ length: m * k }, random), Float32Array.from({ length: k * n }, random)];
      const right = new Float64Array(m * n);
      for (let row = 0; row < m; row++) for (let d = 0; d < k; d++) for (let col = 0; col < n; col++) right[row * n + col]! += a[row * k + d]! * b[d * n + col]!;
      const worst = difference(await native().multiply(a, b, m, k, n, target), right);
      assert.ok(worst < 1e-5, `${m} x ${k} x ${n}: ${worst}`);
    }
  });

  for (const [what, task, groups, shared] of PROBLEMS) {
    test(`${what}: statistics and closed forms, ${how}`, async () => {
      const [cpu, gpu] = [open(task, CPU), open(task, target)];
      const [right, found] = [await cpu.sensitivity(), await gpu.sensitivity()];
      for (const key of Object.keys(right) as (keyof typeof right)[]) assert.ok(difference(found[key], right[key]) < 2e-5, `${key}: ${difference(found[key], right[key])}`);
      const design = slices(task, groups, shared);
      for (const steps of [[], [{ kind: 'scales', perHead: true }], [{ kind: 'queries' }], [{ kind: 'values', ridge: 1e-3 }], [{ kind: 'queries' }, { kind: 'values', ridge: 1e-3 }]] as FitStep[][]) {
        const name = steps.map(({ kind }) => kind).join(' ');
        near(await gpu.run(design, steps), await cpu.run(design, steps), { weights: 2e-3, error: 2e-4 }, name);
      }
    });

    test(`${what}: descent, and the same bits twice, ${how}`, async () => {
      const [cpu, gpu] = [open(task, CPU), open(task, target)];
      const design = slices(task, groups, shared);
      const refine = (steps: number): FitStep[] => [{ kind: 'queries' }, { kind: 'values', ridge: 1e-3 }, { kind: 'refine', steps, rate: 0.004, batch: 256, basis: true, shared, seed: 5 }];
      near(await gpu.run(design, refine(3)), await cpu.run(design, refine(3)), { weights: 5e-3, error: 2e-3 }, 'three steps');
      const [long, again, right] = [await gpu.run(design, refine(20)), await gpu.run(design, refine(20)), await cpu.run(design, refine(20))];
      // Twenty steps apart by rounding alone: 2.5 % were seen for many heads, whose closed forms leave next to nothing and whose descent wanders there.
      near(long, right, { weights: Infinity, error: 5e-2 }, 'twenty steps');
      assert.equal(long.design[0]!.uk, again.design[0]!.uk);
      assert.is(long.trainError, again.trainError);
    });
  }
}

/** Descent makes small singular values of a gradient as large as the others, so that rounding moves single weights; what counts is where the error ends. */
function near(found: FittedLayer, right: FittedLayer, bound: { weights: number; error: number }, what: string): void {
  for (const key of ['trainError', 'testError'] as const) {
    assert.ok(Math.abs(found[key] - right[key]) <= bound.error * right[key] + 1e-9, `${what}: ${key} ${found[key]}, on the CPU ${right[key]}`);
  }
  if (bound.weights === Infinity) return;
  found.design.forEach((rank, i) => {
    for (const key of ['basis', 'uk', 'uv'] as const) assert.ok(difference(rank[key], right.design[i]![key]) <= bound.weights, `${what}: ${key} of rank ${i}: ${difference(rank[key], right.design[i]![key])}`);
  });
}

test.run();
