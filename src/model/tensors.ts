import { isMoeLayer } from './config.js';
import { rankColumns, sharedIn } from './shared_widths.js';
import type { ModelSpec } from './spec.js';

/** One tensor that a checkpoint of a given shape has to hold. */
export interface ExpectedTensor {
  name: string;
  shape: number[];
  /** Large projections may be fp8 with block scales; norms, gates and embeddings never are. */
  quantizable: boolean;
}

/** Every tensor the engine reads, by its name in the published checkpoints. */
export function* expectedTensors(spec: ModelSpec): Generator<ExpectedTensor> {
  yield plain('model.embed_tokens.weight', [spec.vocabSize, spec.hiddenSize]);
  for (let layer = 0; layer < spec.layers; layer++) {
    const at = `model.layers.${layer}.`;
    yield plain(`${at}input_layernorm.weight`, [spec.hiddenSize]);
    yield* attentionTensors(spec, layer, `${at}self_attn.`);
    yield plain(`${at}post_attention_layernorm.weight`, [spec.hiddenSize]);
    yield* isMoeLayer(spec, layer) ? moeTensors(spec, `${at}mlp.`) : mlpTensors(`${at}mlp.`, spec.hiddenSize, spec.intermediateSize);
  }
  yield plain('model.norm.weight', [spec.hiddenSize]);
  if (!spec.tiedEmbeddings) yield plain('lm_head.weight', [spec.vocabSize, spec.hiddenSize]);
}

function* attentionTensors(spec: ModelSpec, layer: number, at: string): Generator<ExpectedTensor> {
  const { hiddenSize, heads, kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim, qLoraRank, tpla } = spec;
  const queries = heads * (qkNopeHeadDim + qkRopeHeadDim);
  if (qLoraRank === null) {
    yield matrix(`${at}q_proj.weight`, queries, hiddenSize);
  } else {
    yield matrix(`${at}q_a_proj.weight`, qLoraRank, hiddenSize);
    yield plain(`${at}q_a_layernorm.weight`, [qLoraRank]);
    yield matrix(`${at}q_b_proj.weight`, queries, qLoraRank);
  }
  yield matrix(`${at}kv_a_proj_with_mqa.weight`, kvLoraRank + qkRopeHeadDim, hiddenSize);
  yield plain(`${at}kv_a_layernorm.weight`, [kvLoraRank]);
  yield matrix(`${at}kv_b_proj.weight`, heads * (qkNopeHeadDim + vHeadDim), kvLoraRank);
  yield matrix(`${at}o_proj.weight`, hiddenSize, heads * vHeadDim);
  if (tpla === null) return;
  const shared = sharedIn(tpla.shared, layer);
  if (shared === kvLoraRank) return;
  if (tpla.transform) yield plain(`${at}tpla.transform.weight`, [kvLoraRank, kvLoraRank]);
  if (tpla.rankWeights) {
    const width = rankColumns(kvLoraRank, shared, tpla.groups);
    for (let rank = 0; rank < tpla.groups; rank++) {
      yield plain(`${at}tpla.rank${rank}.w_uk`, [heads, qkNopeHeadDim, width]);
      yield plain(`${at}tpla.rank${rank}.w_uv`, [heads, vHeadDim, width]);
    }
  }
}

function* mlpTensors(at: string, hidden: number, intermediate: number): Generator<ExpectedTensor> {
  yield matrix(`${at}gate_proj.weight`, intermediate, hidden);
  yield matrix(`${at}up_proj.weight`, intermediate, hidden);
  yield matrix(`${at}down_proj.weight`, hidden, intermediate);
}

function* moeTensors(spec: ModelSpec, at: string): Generator<ExpectedTensor> {
  const moe = spec.moe!;
  yield plain(`${at}gate.weight`, [moe.experts, spec.hiddenSize]);
  if (moe.selection === 'noaux_tc') yield plain(`${at}gate.e_score_correction_bias`, [moe.experts]);
  for (let expert = 0; expert < moe.experts; expert++) yield* mlpTensors(`${at}experts.${expert}.`, spec.hiddenSize, moe.intermediateSize);
  if (moe.sharedExperts > 0) yield* mlpTensors(`${at}shared_experts.`, spec.hiddenSize, moe.intermediateSize * moe.sharedExperts);
}

function matrix(name: string, rows: number, columns: number): ExpectedTensor {
  return { name, shape: [rows, columns], quantizable: true };
}

function plain(name: string, shape: number[]): ExpectedTensor {
  return { name, shape, quantizable: false };
}

/** Name and shape of the fp32 block scales beside an fp8 matrix. */
export function scaleTensor(tensor: ExpectedTensor, block: [number, number]): ExpectedTensor {
  return plain(`${tensor.name}_scale_inv`, tensor.shape.map((size, axis) => Math.ceil(size / block[axis]!)));
}
