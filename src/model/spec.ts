import type { SharedWidths } from './shared_widths.js';

/**
 * A model in the terms the engine computes with: `config.json` normalised, every default resolved.
 * The same object crosses into the addon, which reads the fields by these names.
 */
export interface ModelSpec {
  /** Checkpoint family; decides gating defaults and tensor names. */
  architecture: 'deepseek_v2' | 'deepseek_v3';
  vocabSize: number;
  hiddenSize: number;
  layers: number;
  heads: number;
  /** null: queries are projected directly (V2-Lite). */
  qLoraRank: number | null;
  /** Latent width r, `kv_lora_rank`. */
  kvLoraRank: number;
  qkNopeHeadDim: number;
  qkRopeHeadDim: number;
  vHeadDim: number;
  /** Width of the dense MLP. */
  intermediateSize: number;
  moe: MoeSpec | null;
  rope: RopeSpec;
  /** (nope + rope)^-1/2, times the YaRN correction squared where the config asks for it. */
  softmaxScale: number;
  rmsNormEps: number;
  tiedEmbeddings: boolean;
  contextLength: number;
  /** Block shape of fp8 weights (`weight_scale_inv`), null where weights are plain. */
  weightBlock: [number, number] | null;
  tpla: TplaSpec | null;
}

export interface MoeSpec {
  experts: number;
  sharedExperts: number;
  topK: number;
  intermediateSize: number;
  /** Layers 0..firstDenseLayers-1 have a dense MLP. */
  firstDenseLayers: number;
  /** From then on every layerFreq-th layer is MoE. */
  layerFreq: number;
  scoring: 'softmax' | 'sigmoid';
  selection: 'greedy' | 'group_limited_greedy' | 'noaux_tc';
  groups: number;
  topGroups: number;
  normTopK: boolean;
  routedScale: number;
}

export interface RopeSpec {
  theta: number;
  /** Pairs are (2i, 2i+1) as DeepSeek stores them; false: (i, i + dim/2). */
  interleaved: boolean;
  yarn: YarnSpec | null;
}

export interface YarnSpec {
  factor: number;
  originalContext: number;
  betaFast: number;
  betaSlow: number;
  /** Multiplies cos and sin. 1 where mscale equals mscale_all_dim. */
  cosScale: number;
}

/**
 * What `reparam` wrote. The canonical latent is ordered [shared | slice 0 | … | slice g-1];
 * decode rank i of g reads shared ∪ slice i and the whole rope key.
 */
export interface TplaSpec {
  groups: number;
  /** Width s of the replicated subspace; (kvLoraRank - s) is divisible by groups. A layer of which all is replicated is as published. */
  shared: SharedWidths;
  norm: 'exact' | 'sliced';
  /** Per layer and rank, sqrt(alpha_i / g) of the sliced norm; empty with the exact norm. */
  normScale: number[][];
  /**
   * `self_attn.tpla.transform.weight` [r, r] is applied after the norm and its gain: c' = T c. Caches hold c', and kv_b_proj of such
   * a checkpoint takes c' (its columns are multiplied by the inverse), so prefill stays exact, from cached KV too.
   */
  transform: boolean;
  /**
   * `self_attn.tpla.rank{i}.w_uk` [heads, nope, w] and `.w_uv` [heads, v, w], w = shared + slice, replace the slices of kv_b_proj
   * in decode: rank i scores q_nope W_UK,i against its columns [shared | slice i], and every rank's W_UV,i term is summed as it is.
   * Without them rank i uses kv_b_proj's columns, and the values of the shared columns are averaged over the ranks (each counts 1/g).
   */
  rankWeights: boolean;
  /** Hash over everything that decides the latent basis; part of every KV block's identity. */
  fingerprint: string;
}

/** Who a KV block belongs to; two workers may exchange blocks only if all of it is equal. */
export interface ModelIdentity {
  /** Served name, what clients pass as `model`. */
  name: string;
  /** Hash of config and tensor headers. */
  fingerprint: string;
  /** Latent basis; 'none' for a checkpoint as published. */
  reparam: string;
}
