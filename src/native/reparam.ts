/** The part of the addon that fits TPLA's per-rank weights to exact MLA, one layer at a time. */

export interface LayerShape {
  heads: number;
  nope: number;
  rope: number;
  v: number;
  latent: number;
  hidden: number;
  softmaxScale: number;
}

/** What calibration saw of one layer; everything row-major fp32. */
export interface LayerSample {
  /** First token of each sequence, and the number of tokens at the end. */
  sequences: Int32Array;
  /** [tokens, latent]: normalised, without the norm's gain. */
  latents: Float32Array;
  /** [tokens, rope], rotated. */
  ropeKeys: Float32Array;
  /** Token of each query, ascending; a query attends to its sequence up to that token. */
  queryTokens: Int32Array;
  /** [queries, heads, nope + rope], rope part rotated. */
  queries: Float32Array;
}

/** Weights of the layer in the sample's coordinates, the norm's gain folded in. */
export interface LayerWeights {
  /** [heads, nope, latent] */
  uk: Float32Array;
  /** [heads, v, latent] */
  uv: Float32Array;
  /** [hidden, heads · v] */
  wo: Float32Array;
}

/** One rank: u = basis·latent is cached; logit = q_nope·uk·u + q_pe·k_pe; the head's value is Σ over ranks of uv·Σ p u. */
export interface RankDesign {
  /** [width, latent] */
  basis: Float32Array;
  /** [heads, nope, width] */
  uk: Float32Array;
  /** [heads, v, width] */
  uv: Float32Array;
}

/** Symmetric [latent, latent] matrices; see native/reparam/layer_fit.h. */
export interface Sensitivity {
  tokenCovariance: Float32Array;
  attentionCovariance: Float32Array;
  key: Float32Array;
  value: Float32Array;
  outputMoment: Float32Array;
}

export type FitStep =
  /** One factor per rank (and head) on uk. */
  | { kind: 'scales'; perHead: boolean }
  /** uk by regression of the exact logit on the rank's columns. */
  | { kind: 'queries' }
  /** uv by ridge regression of the exact head value on all ranks' outputs. */
  | { kind: 'values'; ridge: number }
  /** Adam on the squared output error of the layer; `rate` is relative to a parameter's root mean square, `batch` the queries that a step looks at. */
  | { kind: 'refine'; steps: number; rate: number; batch: number; basis: boolean; shared: number; seed: number };

export interface FittedLayer {
  design: RankDesign[];
  trainError: number;
  testError: number;
  /** By kind of step, and `error` for measuring. */
  seconds: Partial<Record<FitStep['kind'] | 'error', number>>;
}

export interface LayerFit {
  sensitivity(): Promise<Sensitivity>;
  /** Applies the steps in order; errors are ‖output − exact‖² / ‖exact‖² of the layer's attention. */
  run(design: RankDesign[], steps: FitStep[]): Promise<FittedLayer>;
  close(): void;
}

/** What computes a fit; `threads` 0 for all cores. `library` false leaves cuBLASLt out. */
export type FitTarget = { device: 'cpu'; threads: number } | { device: 'cuda'; index: number; library?: boolean };

export interface ReparamModule {
  /** Sequences [0, train) are fitted on, the others measure. */
  LayerFit: new (shape: LayerShape, weights: LayerWeights, sample: LayerSample, options: { train: number; target: FitTarget }) => LayerFit;
  /** a [m, k] · b [k, n], fp32. */
  multiply(a: Float32Array, b: Float32Array, m: number, k: number, n: number, target: FitTarget): Promise<Float32Array>;
  /** What a target computes with, in words; throws GPU_UNAVAILABLE. */
  reparamDevice(target: FitTarget): string;
}
