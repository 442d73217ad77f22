import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseModelConfig, type JsonObject } from '../../src/model/config.js';
import { toBf16, toE4m3, toF16 } from '../../src/model/dtype.js';
import { writeSafetensors } from '../../src/model/safetensors_writer.js';
import { expectedTensors, scaleTensor } from '../../src/model/tensors.js';
import type { WeightDType } from '../../src/native/types.js';

/** V3 shape in small: q_lora, YaRN, one dense layer, then MoE with noaux_tc. */
export const TINY_V3: JsonObject = {
  architectures: ['DeepseekV3ForCausalLM'],
  model_type: 'deepseek_v3',
  vocab_size: 320, hidden_size: 64, num_hidden_layers: 3, num_attention_heads: 4, num_key_value_heads: 4,
  q_lora_rank: 48, kv_lora_rank: 32, qk_nope_head_dim: 16, qk_rope_head_dim: 8, v_head_dim: 16,
  intermediate_size: 96, moe_intermediate_size: 32, n_routed_experts: 8, n_shared_experts: 1, num_experts_per_tok: 2,
  first_k_dense_replace: 1, moe_layer_freq: 1, n_group: 4, topk_group: 2, norm_topk_prob: true, routed_scaling_factor: 2.5,
  scoring_func: 'sigmoid', topk_method: 'noaux_tc', hidden_act: 'silu', rms_norm_eps: 1e-6, tie_word_embeddings: false,
  max_position_embeddings: 4096, rope_theta: 10000,
  rope_scaling: { type: 'yarn', factor: 4, original_max_position_embeddings: 1024, beta_fast: 32, beta_slow: 1, mscale: 1, mscale_all_dim: 1 },
  bos_token_id: 0, eos_token_id: 1, torch_dtype: 'bfloat16',
};

/** V2-Lite shape in small: queries projected directly, softmax gate, plain rope. */
export const TINY_V2: JsonObject = {
  ...TINY_V3,
  architectures: ['DeepseekV2ForCausalLM'],
  model_type: 'deepseek_v2',
  q_lora_rank: null, n_group: 1, topk_group: 1, norm_topk_prob: false, routed_scaling_factor: 1, n_shared_experts: 2,
  scoring_func: 'softmax', topk_method: 'greedy', rope_scaling: null,
};

export interface GeneratedCheckpoint {
  config?: JsonObject;
  seed?: number;
  /** Of the matrices; with F8_E4M3 those that the published models quantise, bf16 for the rest. */
  dtype?: WeightDType;
  /** More than one writes an index. */
  shards?: number;
  /** Extra tensors that no model of this shape needs. */
  extra?: { name: string; dtype: string; shape: number[]; data: Uint8Array }[];
}

/** Writes a random checkpoint that loads; standard deviations are those of a freshly initialised model. */
export function writeCheckpoint(dir: string, options: GeneratedCheckpoint = {}): void {
  const { config = TINY_V3, seed = 1, dtype = 'BF16', shards = 1, extra = [] } = options;
  const fp8 = dtype === 'F8_E4M3';
  const json = fp8 ? { ...config, quantization_config: { quant_method: 'fp8', fmt: 'e4m3', activation_scheme: 'dynamic', weight_block_size: [128, 128] } } : config;
  const { spec } = parseModelConfig(json, 'test config');
  const random = gaussian(seed);
  const tensors = [...expectedTensors(spec)].flatMap((expected) => {
    const { name, shape } = expected;
    const count = shape.reduce((product, size) => product * size, 1);
    const norm = shape.length === 1;
    const deviation = norm ? 0.1 : 1 / Math.sqrt(shape[shape.length - 1]!);
    const values = Float32Array.from({ length: count }, () => (norm && name.endsWith('norm.weight') ? 1 : 0) + deviation * random());
    if (fp8 && expected.quantizable) {
      const scale = scaleTensor(expected, [128, 128]);
      const scales = Float32Array.from({ length: scale.shape[0]! * scale.shape[1]! }, (_, i) => 2 ** -10 * (1 + (i % 3) / 4));
      const quantized = toE4m3(values.map((x, i) => x / scales[Math.floor(Math.floor(i / shape[1]!) / 128) * scale.shape[1]! + Math.floor((i % shape[1]!) / 128)]!));
      return [{ name, shape, dtype: 'F8_E4M3', data: quantized }, { name: scale.name, shape: scale.shape, dtype: 'F32', data: asBytes(scales) }];
    }
    const stored = name.endsWith('e_score_correction_bias') ? 'F32' : fp8 ? 'BF16' : dtype;
    return [{ name, shape, dtype: stored, data: encode(values, stored) }];
  });
  tensors.push(...extra);

  mkdirSync(dir, { recursive: true });
  writeFileSync(join(dir, 'config.json'), JSON.stringify(json, null, 2));
  if (shards === 1) return writeSafetensors(join(dir, 'model.safetensors'), tensors);
  const perShard = Math.ceil(tensors.length / shards);
  const weightMap: Record<string, string> = {};
  for (let shard = 0; shard < shards; shard++) {
    const part = tensors.slice(shard * perShard, (shard + 1) * perShard);
    const file = `model-${String(shard + 1).padStart(5, '0')}-of-${String(shards).padStart(5, '0')}.safetensors`;
    for (const { name } of part) weightMap[name] = file;
    writeSafetensors(join(dir, file), part);
  }
  writeFileSync(join(dir, 'model.safetensors.index.json'), JSON.stringify({ metadata: {}, weight_map: weightMap }));
}

function encode(values: Float32Array, dtype: string): Uint8Array {
  if (dtype === 'F32') return asBytes(values);
  return asBytes(dtype === 'F16' ? toF16(values) : toBf16(values));
}

export function asBytes(values: Float32Array | Uint16Array): Uint8Array {
  return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}

/** Standard normal numbers from a seed (mulberry32, Box–Muller). */
export function gaussian(seed: number): () => number {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
  return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}
