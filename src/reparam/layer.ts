import { Matrix } from 'ml-matrix';
import { native } from '../native/loader.js';
import type { FitStep, FitTarget, FittedLayer, LayerFit, LayerSample, LayerShape, LayerWeights, RankDesign, Sensitivity } from '../native/reparam.js';
import { awareBasis, freeBasis, hadamardBasis, identityBasis, matrixOf, pcaBasis, rowsOf, square, varianceShares, CALIBRATED_BASES, type Basis, type BasisKind } from './basis.js';
import type { Stage, StageClock } from './stages.js';
import { hasRankWeights, isPublishedScale, rankWidth, type Method } from './method.js';

/** What decode uses of one layer after reparameterisation. */
export interface LayerDesign {
  basis: Basis;
  /** Where the basis started from, and how queries were made. */
  basisKind: BasisKind;
  queries: Method['queries'];
  /** Whether descent was kept: it is where it lowered the error on sequences that it did not see. */
  descended: boolean;
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
  target: FitTarget;
  clock: StageClock;
  /** Where several methods are fitted to the same sample, what they all ask first. */
  statistics?: { known: Sensitivity | null };
}

/** Of the calibration sequences, the part that only measures. */
const TEST_SHARE = 1 / 8;
const RIDGE = 1e-2;
const STAGE_OF: Record<FitStep['kind'] | 'error', Stage> = { scales: 'regress', queries: 'regress', values: 'regress', refine: 'descend', error: 'measure' };
/** Steps are as long as the way to go: this times the root of the relative error that descent starts from, at most MOST_RATE. */
const RATE_PER_ERROR = 0.06;
const MOST_RATE = 0.01;
const REFINE_BATCH = 256;

/** Of so many calibration sequences those that are fitted on: the first. */
function trainCount(sequences: number): number {
  return Math.max(1, sequences - Math.max(1, Math.floor(sequences * TEST_SHARE)));
}

/** The calibration sequences that nothing is fitted on. */
export function heldOut<T>(sequences: T[]): T[] {
  return sequences.slice(trainCount(sequences.length));
}

export async function designLayer(input: LayerInput, method: Method, options: FitOptions): Promise<LayerDesign> {
  const fit = input.sample === null ? null : openFit(input, options);
  try {
    const sensitivity = fit === null ? null : await statisticsOf(fit, options);
    const definite = method.basis === 'best' ? await bestForm(input, method, options, fit!, sensitivity!) : { ...method, basis: method.basis };
    return await designWith(input, definite, options, fit, sensitivity);
  } finally {
    fit?.close();
  }
}

async function statisticsOf(fit: LayerFit, { clock, statistics }: FitOptions): Promise<Sensitivity> {
  const found = statistics?.known ?? (await clock.time('statistics', () => fit.sensitivity()));
  if (statistics !== undefined) statistics.known = found;
  return found;
}

function openFit({ shape, weights, sample }: LayerInput, { target, clock }: FitOptions): LayerFit {
  const train = trainCount(sample!.sequences.length - 1);
  return clock.timeNow('upload', () => new (native().LayerFit)(shape, weights, sample!, { train, target }));
}

/** The calibrated basis, with logits cut or regressed, whose closed forms leave the least error on sequences that nothing was fitted on. */
async function bestForm(input: LayerInput, method: Method, options: FitOptions, fit: LayerFit, sensitivity: Sensitivity): Promise<DefiniteMethod> {
  let best: { form: DefiniteMethod; error: number } | null = null;
  for (const basis of CALIBRATED_BASES) {
    for (const queries of method.scale === 'none' ? (['regressed', 'sliced'] as const) : (['sliced'] as const)) {
      const form = { ...method, basis, queries };
      const { error } = await designWith(input, { ...form, refine: 0 }, options, fit, sensitivity);
      if (best === null || error! < best.error) best = { form, error: error! };
    }
  }
  return best!.form;
}

type DefiniteMethod = Method & { basis: BasisKind };

async function designWith(input: LayerInput, method: DefiniteMethod, options: FitOptions, fit: LayerFit | null, sensitivity: Sensitivity | null): Promise<LayerDesign> {
  const { latent } = input.shape;
  const covariance = sensitivity === null ? null : square(sensitivity.tokenCovariance, latent);
  let basis = options.clock.timeNow('basis', () => chooseBasis(method, latent, options.seed, sensitivity, covariance));
  const shares = covariance === null ? null : varianceShares(basis, covariance, options.groups, method.shared);
  const normScale = method.norm === 'sliced' ? shares!.slices.map((share) => Math.sqrt(alpha(share, method.scale) / options.groups)) : null;
  const start = await cutRanks(input, basis, method, options, isPublishedScale(method) && normScale === null ? shares!.slices.map((share) => alpha(share, method.scale)) : null);
  const known = { basisKind: method.basis, queries: method.queries, normScale, shares };
  if (fit === null) return { ...known, basis, ranks: hasRankWeights(method) ? start : null, descended: false, error: null };

  let fitted = await timedRun(fit, start, closedForms(method), options.clock);
  let descended = false;
  if (method.refine > 0) {
    const moved = await timedRun(fit, fitted.design, descent(method, options.seed, fitted.trainError), options.clock);
    descended = moved.testError < fitted.testError;
    if (descended) {
      fitted = moved;
      basis = options.clock.timeNow('basis', () => movedBasis(moved.design, method.shared, latent));
    }
  }
  return { ...known, basis, ranks: hasRankWeights(method) ? fitted.design : null, descended, error: fitted.testError };
}

async function timedRun(fit: LayerFit, start: RankDesign[], steps: FitStep[], clock: StageClock): Promise<FittedLayer> {
  const fitted = await fit.run(start, steps);
  for (const [kind, spent] of Object.entries(fitted.seconds)) clock.add(STAGE_OF[kind as keyof typeof fitted.seconds], spent);
  return fitted;
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
async function cutRanks({ shape, weights }: LayerInput, basis: Basis, method: Method, { groups, target, clock }: FitOptions, scales: number[] | null): Promise<RankDesign[]> {
  const { heads, nope, v, latent } = shape;
  const inverse = rowsOf(basis.inverse);
  const [uk, uv] = await clock.time('rotate', async () => [
    await native().multiply(weights.uk, inverse, heads * nope, latent, latent, target),
    await native().multiply(weights.uv, inverse, heads * v, latent, latent, target),
  ] as const);
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

function closedForms(method: Method): FitStep[] {
  const steps: FitStep[] = [];
  if (method.scale === 'fitted' || method.scale === 'head') steps.push({ kind: 'scales', perHead: method.scale === 'head' });
  if (method.queries === 'regressed') steps.push({ kind: 'queries' });
  if (method.values === 'ridge') steps.push({ kind: 'values', ridge: RIDGE });
  return steps;
}

function descent(method: Method, seed: number, error: number): FitStep[] {
  const steps: FitStep[] = [{ kind: 'refine', steps: method.refine, rate: Math.min(MOST_RATE, RATE_PER_ERROR * Math.sqrt(error)), batch: REFINE_BATCH, basis: true, shared: method.shared, seed }];
  if (method.values === 'ridge') steps.push({ kind: 'values', ridge: RIDGE });
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
