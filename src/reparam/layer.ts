import { Matrix } from 'ml-matrix';
import { native } from '../native/loader.js';
import type { FitStep, LayerFit, LayerSample, LayerShape, LayerWeights, RankDesign, Sensitivity } from '../native/reparam.js';
import { awareBasis, freeBasis, hadamardBasis, identityBasis, matrixOf, pcaBasis, rowsOf, square, varianceShares, CALIBRATED_BASES, type Basis, type BasisKind } from './basis.js';
import { hasRankWeights, isPublishedScale, rankWidth, type Method } from './method.js';

/** What decode uses of one layer after reparameterisation. */
export interface LayerDesign {
  basis: Basis;
  /** Where the basis started from. */
  basisKind: BasisKind;
  /** null where ranks use the columns of kv_b_proj as they are. */
  ranks: RankDesign[] | null;
  /** Per rank sqrt(α_i / g) of the sliced norm; null with the exact one. */
  normScale: number[] | null;
  shares: { shared: number; slices: number[] } | null;
  /** ‖attention output − exact‖² / ‖exact‖² on calibration sequences that nothing was fitted on; null without calibration. */
  error: number | null;
}

export interface LayerInput {
  shape: LayerShape;
  weights: LayerWeights;
  /** null for methods that need none. */
  sample: LayerSample | null;
}

export interface FitOptions {
  groups: number;
  seed: number;
  threads: number;
}

/** Of the calibration sequences, the part that only measures. */
const TEST_SHARE = 1 / 8;
const RIDGE = 1e-3;
const REFINE_RATE = 0.03;

export async function designLayer(input: LayerInput, method: Method, options: FitOptions): Promise<LayerDesign> {
  const fit = input.sample === null ? null : openFit(input, options);
  try {
    const sensitivity = fit === null ? null : await fit.sensitivity();
    const kind = method.basis === 'best' ? await bestBasis(input, method, options, fit!, sensitivity!) : method.basis;
    return await designWith(input, { ...method, basis: kind }, options, fit, sensitivity);
  } finally {
    fit?.close();
  }
}

function openFit({ shape, weights, sample }: LayerInput, { threads }: { threads: number }): LayerFit {
  const sequences = sample!.sequences.length - 1;
  const train = Math.max(1, sequences - Math.max(1, Math.floor(sequences * TEST_SHARE)));
  return new (native().LayerFit)(shape, weights, sample!, { train, threads });
}

async function bestBasis(input: LayerInput, method: Method, options: FitOptions, fit: LayerFit, sensitivity: Sensitivity): Promise<BasisKind> {
  let best: { kind: BasisKind; error: number } | null = null;
  for (const kind of CALIBRATED_BASES) {
    const { error } = await designWith(input, { ...method, basis: kind, refine: 0 }, options, fit, sensitivity);
    if (best === null || error! < best.error) best = { kind, error: error! };
  }
  return best!.kind;
}

type DefiniteMethod = Method & { basis: BasisKind };

async function designWith(input: LayerInput, method: DefiniteMethod, options: FitOptions, fit: LayerFit | null, sensitivity: Sensitivity | null): Promise<LayerDesign> {
  const { latent } = input.shape;
  const covariance = sensitivity === null ? null : square(sensitivity.tokenCovariance, latent);
  let basis = chooseBasis(method, latent, options.seed, sensitivity, covariance);
  const shares = covariance === null ? null : varianceShares(basis, covariance, options.groups, method.shared);
  const normScale = method.norm === 'sliced' ? shares!.slices.map((share) => Math.sqrt(alpha(share, method.scale) / options.groups)) : null;
  const start = await cutRanks(input, basis, method, options, isPublishedScale(method) && normScale === null ? shares!.slices.map((share) => alpha(share, method.scale)) : null);
  if (fit === null) return { basis, basisKind: method.basis, ranks: hasRankWeights(method) ? start : null, normScale, shares, error: null };

  const { design, testError } = await fit.run(start, fitSteps(method, options.seed));
  if (method.refine > 0) basis = movedBasis(design, method.shared, latent);
  return { basis, basisKind: method.basis, ranks: hasRankWeights(method) ? design : null, normScale, shares, error: testError };
}

/** The published formula prints slice over total; the estimate it is meant for, RMS(c) ≈ sqrt(α/g)·RMS(c_i), needs total over slice. */
function alpha(share: number, scale: Method['scale']): number {
  return scale === 'printed' ? share : 1 / share;
}

function chooseBasis(method: DefiniteMethod, latent: number, seed: number, sensitivity: Sensitivity | null, covariance: Matrix | null): Basis {
  switch (method.basis) {
    case 'identity':
      return identityBasis(latent);
    case 'hadamard':
      return hadamardBasis(latent, seed);
    case 'pca':
      return pcaBasis(covariance!);
    case 'aware':
      return awareBasis(sensitivity!, latent, { oblique: false, keyWeight: 1 });
    case 'aware-oblique':
      return awareBasis(sensitivity!, latent, { oblique: true, keyWeight: 1 });
  }
}

/** Ranks that use the exact weights' columns in the new basis; the shared columns' value is counted on rank 0. */
async function cutRanks({ shape, weights }: LayerInput, basis: Basis, method: Method, { groups, threads }: FitOptions, scales: number[] | null): Promise<RankDesign[]> {
  const { heads, nope, v, latent } = shape;
  const inverse = rowsOf(basis.inverse);
  const [uk, uv] = await Promise.all([
    native().multiply(weights.uk, inverse, heads * nope, latent, latent, threads),
    native().multiply(weights.uv, inverse, heads * v, latent, latent, threads),
  ]);
  const width = rankWidth(method, { groups, kvLoraRank: latent });
  return Array.from({ length: groups }, (_, rank) => {
    const column = (j: number) => (j < method.shared ? j : rankColumns(method, rank, width) + j);
    const cut = (from: Float32Array, rows: number, factor: (j: number) => number) => {
      const out = new Float32Array(rows * width);
      for (let i = 0; i < rows; i++) for (let j = 0; j < width; j++) out[i * width + j] = factor(j) * from[i * latent + column(j)]!;
      return out;
    };
    const silent = method.ranks === 'first' && rank > 0;
    const rows = new Matrix(width, latent);
    for (let j = 0; j < width; j++) rows.setRow(j, basis.matrix.getRow(column(j)));
    return {
      basis: rowsOf(rows),
      uk: cut(uk, heads * nope, () => scales?.[rank] ?? 1),
      uv: cut(uv, heads * v, (j) => (silent || (j < method.shared && rank > 0) ? 0 : 1)),
    };
  });
}

/** Offset of rank's own column j (counted from 0 with the shared ones) in the canonical order. */
function rankColumns(method: Method, rank: number, width: number): number {
  return rank * (width - method.shared);
}

function fitSteps(method: Method, seed: number): FitStep[] {
  const steps: FitStep[] = [];
  if (method.scale === 'fitted' || method.scale === 'head') steps.push({ kind: 'scales', perHead: method.scale === 'head' });
  if (method.queries === 'regressed') steps.push({ kind: 'queries' });
  if (method.values === 'ridge') steps.push({ kind: 'values', ridge: RIDGE });
  if (method.refine > 0) {
    steps.push({ kind: 'refine', steps: method.refine, rate: REFINE_RATE, basis: true, shared: method.shared, seed });
    if (method.values === 'ridge') steps.push({ kind: 'values', ridge: RIDGE });
  }
  return steps;
}

/** The canonical basis that ranks with these rows read their columns from. */
function movedBasis(design: RankDesign[], shared: number, latent: number): Basis {
  const rows = design.flatMap(({ basis }, rank) => {
    const all = matrixOf(basis, basis.length / latent, latent).to2DArray();
    return rank === 0 ? all : all.slice(shared);
  });
  return freeBasis(new Matrix(rows));
}
