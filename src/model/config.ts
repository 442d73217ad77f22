import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { TplaError } from '../errors.js';
import { sharedProblem, sharedWidths, type SharedWidths } from './shared_widths.js';
import type { ModelSpec, MoeSpec, RopeSpec, TplaSpec, YarnSpec } from './spec.js';

/** `config.json` as read, and in the engine's terms. */
export interface ModelConfig {
  spec: ModelSpec;
  bosTokenId: number | null;
  eosTokenIds: number[];
  raw: JsonObject;
}

export type JsonObject = Record<string, unknown>;

const FAMILIES: Record<string, ModelSpec['architecture']> = {
  deepseek_v2: 'deepseek_v2',
  deepseek_v3: 'deepseek_v3',
  kimi_k2: 'deepseek_v3',
  youtu: 'deepseek_v3',
  youtu_llm: 'deepseek_v3',
};

const CLASSES: Record<string, string> = {
  DeepseekV2ForCausalLM: 'deepseek_v2',
  DeepseekV3ForCausalLM: 'deepseek_v3',
  YoutuForCausalLM: 'youtu_llm',
};

export function loadModelConfig(dir: string): ModelConfig {
  const path = join(dir, 'config.json');
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (error) {
    throw new TplaError('CHECKPOINT_INVALID', `${path} cannot be read (${(error as Error).message}). Expected a Hugging Face model directory.`, { cause: error });
  }
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw new TplaError('CHECKPOINT_INVALID', `${path} is not valid JSON: ${(error as Error).message}`, { cause: error });
  }
  return parseModelConfig(json, path);
}

/**
 * Resolves every default of `config.json`. Whatever the engine cannot compute is refused here, before any weight is read,
 * and all at once. `path` names the file in errors.
 */
export function parseModelConfig(json: unknown, path: string): ModelConfig {
  if (json === null || typeof json !== 'object' || Array.isArray(json)) {
    throw new TplaError('CHECKPOINT_INVALID', `${path}: expected a JSON object, found ${JSON.stringify(json)?.slice(0, 40)}`);
  }
  const raw = json as JsonObject;
  const fields = new Fields(raw, '');
  const architecture = readArchitecture(fields);
  const spec = readSpec(fields, architecture ?? 'deepseek_v3');
  const eos = raw.eos_token_id;
  const config: ModelConfig = {
    spec,
    bosTokenId: typeof raw.bos_token_id === 'number' ? raw.bos_token_id : null,
    eosTokenIds: (Array.isArray(eos) ? eos : [eos]).filter((id): id is number => Number.isInteger(id)),
    raw,
  };
  fields.throwProblems(path);
  return config;
}

function readArchitecture(fields: Fields): ModelSpec['architecture'] | undefined {
  const declared = fields.raw.model_type;
  const classes = fields.raw.architectures;
  const className = Array.isArray(classes) ? String(classes[0]) : '';
  const type = typeof declared === 'string' ? declared : CLASSES[className];
  if (type !== undefined && Object.hasOwn(FAMILIES, type)) return FAMILIES[type];
  if (!fields.isSparse()) {
    const named = typeof declared === 'string' ? `model_type "${declared}"` : className ? `architecture "${className}"` : 'a config without model_type';
    fields.unsupported(`${named}; supported: ${Object.keys(FAMILIES).join(', ')}`);
  }
  return undefined;
}

function readSpec(fields: Fields, architecture: ModelSpec['architecture']): ModelSpec {
  refuseVariants(fields);
  const qkNopeHeadDim = fields.integer('qk_nope_head_dim');
  const qkRopeHeadDim = fields.integer('qk_rope_head_dim');
  if (qkRopeHeadDim % 2 !== 0) fields.invalid(`qk_rope_head_dim is ${qkRopeHeadDim}; rope pairs need an even width`);
  const layers = fields.integer('num_hidden_layers');
  const heads = fields.integer('num_attention_heads');
  const kvLoraRank = fields.integer('kv_lora_rank');
  const contextLength = fields.integer('max_position_embeddings');
  const { rope, softmaxCorrection } = readRope(fields, contextLength);
  return {
    architecture,
    vocabSize: fields.integer('vocab_size'),
    hiddenSize: fields.integer('hidden_size'),
    layers,
    heads,
    qLoraRank: fields.raw.q_lora_rank == null ? null : fields.integer('q_lora_rank'),
    kvLoraRank,
    qkNopeHeadDim,
    qkRopeHeadDim,
    vHeadDim: fields.integer('v_head_dim'),
    intermediateSize: fields.integer('intermediate_size'),
    moe: readMoe(fields, architecture, layers),
    rope,
    softmaxScale: (qkNopeHeadDim + qkRopeHeadDim) ** -0.5 * softmaxCorrection,
    rmsNormEps: fields.number('rms_norm_eps', 1e-6),
    tiedEmbeddings: fields.boolean('tie_word_embeddings', false),
    contextLength,
    weightBlock: readQuantization(fields),
    tpla: readTpla(fields, { layers, kvLoraRank }),
  };
}

function refuseVariants(fields: Fields): void {
  if (fields.isSparse()) fields.unsupported('sparse attention (DeepSeek-V3.2 indexer: index_topk, index_n_heads, index_head_dim)');
  if (fields.boolean('attention_bias', false)) fields.unsupported('attention_bias true; attention projections must have no bias');
  if (fields.boolean('mlp_bias', false)) fields.unsupported('mlp_bias true; MLP projections must have no bias');
  if (fields.raw.use_mla === false) fields.unsupported('use_mla false; only multi-head latent attention is implemented');
  const activation = fields.raw.hidden_act ?? 'silu';
  if (activation !== 'silu') fields.unsupported(`activation "${String(activation)}"; supported: silu`);
  const kvHeads = fields.raw.num_key_value_heads;
  if (kvHeads != null && kvHeads !== fields.raw.num_attention_heads) {
    fields.unsupported(`num_key_value_heads ${String(kvHeads)} beside num_attention_heads ${String(fields.raw.num_attention_heads)}; MLA has as many of both`);
  }
}

// ---------------------------------------------------------------- rope

/**
 * Both spellings: `rope_theta` + `rope_scaling` {type | rope_type}, and `rope_parameters` with everything inside.
 * The YaRN corrections are those of DeepSeek's published modelling code: the softmax scale takes
 * (0.1·mscale_all_dim·ln(factor) + 1)², cos and sin take the ratio of the two mscales.
 */
function readRope(fields: Fields, contextLength: number): { rope: RopeSpec; softmaxCorrection: number } {
  const modern = fields.object('rope_parameters');
  const classic = fields.object('rope_scaling');
  const scaling = modern ?? classic;
  const theta = scaling?.raw.rope_theta !== undefined ? scaling.number('rope_theta') : fields.number('rope_theta', 10000);
  if (theta <= 1) fields.invalid(`rope_theta is ${theta}; expected a number above 1`);
  const rope: RopeSpec = { theta, interleaved: fields.boolean('rope_interleave', true), yarn: null };
  const plain = { rope, softmaxCorrection: 1 };
  if (scaling === null) return plain;

  const type = String(scaling.raw.rope_type ?? scaling.raw.type ?? 'default');
  if (type === 'default') return plain;
  if (type !== 'yarn') {
    fields.unsupported(`rope type "${type}"; supported: default, yarn`);
    return plain;
  }
  if (scaling.raw.truncate === false) fields.unsupported('YaRN with truncate false; the correction range is rounded outwards');
  const partial = scaling.raw.partial_rotary_factor ?? fields.raw.partial_rotary_factor ?? 1;
  if (partial !== 1) fields.unsupported(`partial_rotary_factor ${String(partial)}`);

  const originalContext = scaling.integer('original_max_position_embeddings', contextLength);
  const factor = scaling.number('factor', contextLength / originalContext);
  if (factor < 1) fields.invalid(`${scaling.at}factor is ${factor}; expected at least 1`);
  const mscale = scaling.number('mscale', 0);
  const mscaleAllDim = scaling.number('mscale_all_dim', 0);
  const correction = (m: number) => (factor > 1 ? 0.1 * m * Math.log(factor) + 1 : 1);
  const cosScale = mscale && mscaleAllDim ? correction(mscale) / correction(mscaleAllDim) : correction(1);
  const yarn: YarnSpec = {
    factor,
    originalContext,
    betaFast: scaling.number('beta_fast', 32),
    betaSlow: scaling.number('beta_slow', 1),
    cosScale: scaling.number('attention_factor', cosScale),
  };
  return { rope: { ...rope, yarn }, softmaxCorrection: mscaleAllDim ? correction(mscaleAllDim) ** 2 : 1 };
}

// ---------------------------------------------------------------- mixture of experts

function readMoe(fields: Fields, architecture: ModelSpec['architecture'], layers: number): MoeSpec | null {
  if (fields.raw.n_routed_experts == null) return null;
  const v3 = architecture === 'deepseek_v3';
  const scoring = String(fields.raw.scoring_func ?? (v3 ? 'sigmoid' : 'softmax'));
  const selection = String(fields.raw.topk_method ?? (v3 ? 'noaux_tc' : 'greedy'));
  const known = (scoring === 'softmax' && (selection === 'greedy' || selection === 'group_limited_greedy')) || (scoring === 'sigmoid' && selection === 'noaux_tc');
  if (!known) {
    fields.unsupported(`expert gate scoring_func "${scoring}" with topk_method "${selection}"; supported: softmax with greedy or group_limited_greedy, sigmoid with noaux_tc`);
  }
  const moe: MoeSpec = {
    experts: fields.integer('n_routed_experts'),
    sharedExperts: fields.raw.n_shared_experts == null ? 0 : fields.integer('n_shared_experts', undefined, 0),
    topK: fields.integer('num_experts_per_tok'),
    intermediateSize: fields.integer('moe_intermediate_size'),
    firstDenseLayers: fields.integer('first_k_dense_replace', 0, 0),
    layerFreq: fields.integer('moe_layer_freq', 1),
    scoring: scoring as MoeSpec['scoring'],
    selection: selection as MoeSpec['selection'],
    groups: fields.raw.n_group == null ? 1 : fields.integer('n_group'),
    topGroups: fields.raw.topk_group == null ? 1 : fields.integer('topk_group'),
    normTopK: fields.boolean('norm_topk_prob', v3),
    routedScale: fields.number('routed_scaling_factor', 1),
  };
  if (moe.experts % moe.groups !== 0) fields.invalid(`n_routed_experts ${moe.experts} is not divisible by n_group ${moe.groups}`);
  if (moe.topGroups > moe.groups) fields.invalid(`topk_group ${moe.topGroups} is more than n_group ${moe.groups}`);
  const eligible = selection === 'greedy' ? moe.experts : (moe.experts / moe.groups) * moe.topGroups;
  if (moe.topK > eligible) fields.invalid(`num_experts_per_tok ${moe.topK} is more than the ${eligible} experts that can be chosen`);
  return moe.firstDenseLayers >= layers ? null : moe;
}

/** Whether layer `layer` has experts instead of a dense MLP. */
export function isMoeLayer(spec: ModelSpec, layer: number): boolean {
  return spec.moe !== null && layer >= spec.moe.firstDenseLayers && layer % spec.moe.layerFreq === 0;
}

// ---------------------------------------------------------------- quantisation and reparameterisation

function readQuantization(fields: Fields): [number, number] | null {
  const quantization = fields.object('quantization_config');
  if (quantization === null) return null;
  const method = String(quantization.raw.quant_method ?? 'unnamed');
  const format = quantization.raw.fmt ?? 'e4m3';
  const block = quantization.raw.weight_block_size;
  if (method !== 'fp8') fields.unsupported(`quantisation method "${method}"; supported: fp8 (e4m3 with 128×128 block scales)`);
  else if (format !== 'e4m3') fields.unsupported(`fp8 format "${String(format)}"; supported: e4m3`);
  else if (!Array.isArray(block) || block[0] !== 128 || block[1] !== 128) {
    fields.unsupported(`fp8 weight_block_size ${JSON.stringify(block ?? null)}; supported: [128,128]`);
  }
  return [128, 128];
}

/** The `tpla` section that reparam adds to `config.json`. */
function readTpla(fields: Fields, shape: { layers: number; kvLoraRank: number }): TplaSpec | null {
  const section = fields.object('tpla');
  if (section === null) return null;
  const groups = section.integer('groups');
  const shared = readShared(section);
  const norm = String(section.raw.norm ?? 'exact');
  if (norm !== 'exact' && norm !== 'sliced') fields.invalid(`tpla.norm is "${norm}"; expected exact or sliced`);
  const misfit = sharedProblem(shared, { layers: shape.layers, latent: shape.kvLoraRank, groups });
  if (misfit !== null) fields.invalid(`tpla.shared: ${misfit}`);
  const normScale = (section.raw.norm_scale ?? []) as number[][];
  const scales = Array.isArray(normScale) && normScale.every((row) => Array.isArray(row) && row.length === groups && row.every((x) => typeof x === 'number' && x > 0));
  if (!scales || (norm === 'sliced' && normScale.length !== shape.layers)) {
    fields.invalid(`tpla.norm_scale: expected ${norm === 'sliced' ? shape.layers : 'no'} rows of ${groups} positive numbers`);
  }
  const fingerprint = section.raw.fingerprint;
  if (typeof fingerprint !== 'string' || fingerprint === '') fields.invalid('tpla.fingerprint is missing');
  return {
    groups,
    shared,
    norm: norm as TplaSpec['norm'],
    normScale: norm === 'sliced' ? normScale : [],
    transform: section.boolean('transform', false),
    rankWeights: section.boolean('rank_weights', false),
    fingerprint: String(fingerprint),
  };
}

/** A number, or one for each layer. */
function readShared(section: Fields): SharedWidths {
  const { shared } = section.raw;
  if (!Array.isArray(shared)) return section.integer('shared', 0, 0);
  if (shared.every((width) => Number.isSafeInteger(width) && width >= 0)) return sharedWidths(shared as number[]);
  section.invalid(`tpla.shared is ${JSON.stringify(shared)}; expected a width, or one for each layer`);
  return 0;
}

// ---------------------------------------------------------------- reading fields

interface Problems {
  unsupported: string[];
  invalid: string[];
}

/** Reads typed fields of one JSON object and gathers what is wrong; a wrong field reads as a harmless value. */
class Fields {
  constructor(
    readonly raw: JsonObject,
    /** Prefix of field names in messages, e.g. `rope_scaling.`. */
    readonly at: string,
    private readonly problems: Problems = { unsupported: [], invalid: [] },
  ) {}

  unsupported(what: string): void {
    this.problems.unsupported.push(what);
  }

  invalid(what: string): void {
    this.problems.invalid.push(what);
  }

  isSparse(): boolean {
    return this.raw.model_type === 'deepseek_v32' || ['index_topk', 'index_n_heads', 'index_head_dim'].some((name) => this.raw[name] != null);
  }

  number(name: string, fallback?: number): number {
    const value = this.raw[name] ?? fallback;
    if (typeof value === 'number' && Number.isFinite(value)) return value;
    this.invalid(`${this.at}${name}: expected a number, found ${describe(this.raw[name])}`);
    return 1;
  }

  integer(name: string, fallback?: number, minimum = 1): number {
    const value = this.raw[name] ?? fallback;
    if (Number.isInteger(value) && (value as number) >= minimum && (value as number) < 2 ** 31) return value as number;
    this.invalid(`${this.at}${name}: expected an integer of at least ${minimum}, found ${describe(this.raw[name])}`);
    return Math.max(minimum, 1);
  }

  boolean(name: string, fallback: boolean): boolean {
    const value = this.raw[name] ?? fallback;
    if (typeof value === 'boolean') return value;
    this.invalid(`${this.at}${name}: expected true or false, found ${describe(value)}`);
    return fallback;
  }

  object(name: string): Fields | null {
    const value = this.raw[name];
    if (value == null) return null;
    if (typeof value === 'object' && !Array.isArray(value)) return new Fields(value as JsonObject, `${this.at}${name}.`, this.problems);
    this.invalid(`${this.at}${name}: expected an object, found ${describe(value)}`);
    return null;
  }

  throwProblems(path: string): void {
    const { unsupported, invalid } = this.problems;
    if (unsupported.length + invalid.length === 0) return;
    const lines = [...unsupported.map((what) => `not supported: ${what}`), ...invalid];
    throw new TplaError(unsupported.length > 0 ? 'MODEL_UNSUPPORTED' : 'CHECKPOINT_INVALID', `${path} describes a model that cannot be run:\n${lines.map((line) => `  ${line}`).join('\n')}`);
  }
}

function describe(value: unknown): string {
  return value === undefined ? 'nothing' : JSON.stringify(value).slice(0, 60);
}
