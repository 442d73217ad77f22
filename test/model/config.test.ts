import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import { isMoeLayer, parseModelConfig, type JsonObject } from '../../src/model/config.js';
import { TINY_V2, TINY_V3 } from '../support/checkpoint.js';

const test = suite('model/config');

/** The published configs, as far as they matter. */
const V3: JsonObject = {
  architectures: ['DeepseekV3ForCausalLM'], model_type: 'deepseek_v3', attention_bias: false, attention_dropout: 0, bos_token_id: 0, eos_token_id: 1,
  ep_size: 1, first_k_dense_replace: 3, hidden_act: 'silu', hidden_size: 7168, intermediate_size: 18432, kv_lora_rank: 512,
  max_position_embeddings: 163840, moe_intermediate_size: 2048, moe_layer_freq: 1, n_group: 8, n_routed_experts: 256, n_shared_experts: 1,
  norm_topk_prob: true, num_attention_heads: 128, num_experts_per_tok: 8, num_hidden_layers: 61, num_key_value_heads: 128, num_nextn_predict_layers: 1,
  q_lora_rank: 1536, qk_nope_head_dim: 128, qk_rope_head_dim: 64,
  quantization_config: { activation_scheme: 'dynamic', fmt: 'e4m3', quant_method: 'fp8', weight_block_size: [128, 128] },
  rms_norm_eps: 1e-6,
  rope_scaling: { beta_fast: 32, beta_slow: 1, factor: 40, mscale: 1, mscale_all_dim: 1, original_max_position_embeddings: 4096, type: 'yarn' },
  rope_theta: 10000, routed_scaling_factor: 2.5, scoring_func: 'sigmoid', tie_word_embeddings: false, topk_group: 4, topk_method: 'noaux_tc',
  v_head_dim: 128, vocab_size: 129280,
};

const V2_LITE: JsonObject = {
  architectures: ['DeepseekV2ForCausalLM'], model_type: 'deepseek_v2', attention_bias: false, bos_token_id: 100000, eos_token_id: 100001,
  first_k_dense_replace: 1, hidden_act: 'silu', hidden_size: 2048, intermediate_size: 10944, kv_lora_rank: 512, max_position_embeddings: 163840,
  moe_intermediate_size: 1408, moe_layer_freq: 1, n_group: 1, n_routed_experts: 64, n_shared_experts: 2, norm_topk_prob: false,
  num_attention_heads: 16, num_experts_per_tok: 6, num_hidden_layers: 27, num_key_value_heads: 16, q_lora_rank: null, qk_nope_head_dim: 128,
  qk_rope_head_dim: 64, rms_norm_eps: 1e-6,
  rope_scaling: { beta_fast: 32, beta_slow: 1, factor: 40, mscale: 0.707, mscale_all_dim: 0.707, original_max_position_embeddings: 4096, type: 'yarn' },
  rope_theta: 10000, routed_scaling_factor: 1, scoring_func: 'softmax', tie_word_embeddings: false, topk_group: 1, topk_method: 'greedy',
  v_head_dim: 128, vocab_size: 102400,
};

const KIMI_K2: JsonObject = {
  ...V3, model_type: 'kimi_k2', n_group: 1, topk_group: 1, n_routed_experts: 384, num_attention_heads: 64, num_key_value_heads: 64, routed_scaling_factor: 2.827,
  first_k_dense_replace: 1, max_position_embeddings: 131072, rope_theta: 50000, vocab_size: 163840, bos_token_id: 163584, eos_token_id: 163585,
  rope_scaling: { beta_fast: 1, beta_slow: 1, factor: 32, mscale: 1, mscale_all_dim: 1, original_max_position_embeddings: 4096, type: 'yarn' },
};

const YOUTU: JsonObject = {
  architectures: ['YoutuForCausalLM'], model_type: 'youtu_llm', hidden_size: 2048, intermediate_size: 6144, num_hidden_layers: 32, num_attention_heads: 16,
  num_key_value_heads: 16, kv_lora_rank: 512, q_lora_rank: 1536, qk_nope_head_dim: 128, qk_rope_head_dim: 64, v_head_dim: 128, vocab_size: 128256,
  max_position_embeddings: 131072, rms_norm_eps: 1e-6, tie_word_embeddings: true, hidden_act: 'silu', attention_bias: false, mlp_bias: false,
  rope_theta: 1600000, rope_scaling: null, bos_token_id: 128000, eos_token_id: [128001, 128009],
};

const near = (actual: number, expected: number) => assert.ok(Math.abs(actual - expected) < 1e-12 * Math.abs(expected), `${actual} is not ${expected}`);

function refusal(config: unknown): TplaError {
  try {
    parseModelConfig(config, '/m/config.json');
  } catch (error) {
    assert.instance(error, TplaError);
    return error as TplaError;
  }
  throw new Error('the config was accepted');
}

test('DeepSeek-V3: fp8 blocks, group-limited noaux_tc, YaRN softmax correction', () => {
  const { spec, bosTokenId, eosTokenIds } = parseModelConfig(V3, 'config.json');
  assert.is(spec.architecture, 'deepseek_v3');
  assert.equal(spec.weightBlock, [128, 128]);
  assert.equal(spec.moe, {
    experts: 256, sharedExperts: 1, topK: 8, intermediateSize: 2048, firstDenseLayers: 3, layerFreq: 1, scoring: 'sigmoid', selection: 'noaux_tc',
    groups: 8, topGroups: 4, normTopK: true, routedScale: 2.5,
  });
  near(spec.softmaxScale, 192 ** -0.5 * (0.1 * Math.log(40) + 1) ** 2);
  assert.equal(spec.rope, { theta: 10000, interleaved: true, yarn: { factor: 40, originalContext: 4096, betaFast: 32, betaSlow: 1, cosScale: 1 } });
  assert.is(bosTokenId, 0);
  assert.equal(eosTokenIds, [1]);
  assert.not(isMoeLayer(spec, 2));
  assert.ok(isMoeLayer(spec, 3));
  assert.is(spec.tpla, null);
});

test('DeepSeek-V2-Lite: no q_lora, softmax gate, mscale 0.707', () => {
  const { spec } = parseModelConfig(V2_LITE, 'config.json');
  assert.is(spec.architecture, 'deepseek_v2');
  assert.is(spec.qLoraRank, null);
  near(spec.softmaxScale, 192 ** -0.5 * (0.0707 * Math.log(40) + 1) ** 2);
  assert.is(spec.rope.yarn?.cosScale, 1);
  assert.is(spec.moe?.selection, 'greedy');
  assert.is(spec.weightBlock, null);
});

test('Kimi-K2 under both of its model types, and Youtu-LLM', () => {
  const kimi = parseModelConfig(KIMI_K2, 'config.json').spec;
  assert.equal(parseModelConfig({ ...KIMI_K2, model_type: 'deepseek_v3' }, 'config.json').spec, kimi);
  assert.is(kimi.moe?.experts, 384);
  const youtu = parseModelConfig(YOUTU, 'config.json');
  assert.is(youtu.spec.moe, null);
  assert.is(youtu.spec.tiedEmbeddings, true);
  assert.is(youtu.spec.rope.theta, 1600000);
  assert.is(youtu.spec.rope.yarn, null);
  assert.equal(youtu.eosTokenIds, [128001, 128009]);
});

test('rope_parameters of transformers 5 mean the same as rope_theta with rope_scaling', () => {
  const { rope_scaling, rope_theta, ...rest } = V3;
  const { type, ...scaling } = rope_scaling as JsonObject;
  const modern = parseModelConfig({ ...rest, rope_parameters: { ...scaling, rope_type: type, rope_theta } }, 'config.json').spec;
  assert.equal(modern, parseModelConfig(V3, 'config.json').spec);
  const plain = parseModelConfig({ ...YOUTU, rope_theta: undefined, rope_parameters: { rope_type: 'default', rope_theta: 5e5 } }, 'config.json').spec;
  assert.is(plain.rope.theta, 5e5);
});

test('YaRN: without mscale_all_dim the softmax scale is left alone and cos takes the default mscale', () => {
  const { spec } = parseModelConfig({ ...V3, rope_scaling: { type: 'yarn', factor: 40, original_max_position_embeddings: 4096 } }, 'config.json');
  near(spec.softmaxScale, 192 ** -0.5);
  near(spec.rope.yarn!.cosScale, 0.1 * Math.log(40) + 1);
  const ratio = parseModelConfig({ ...V3, rope_scaling: { ...(V3.rope_scaling as JsonObject), mscale: 0.5 } }, 'config.json').spec;
  near(ratio.rope.yarn!.cosScale, (0.05 * Math.log(40) + 1) / (0.1 * Math.log(40) + 1));
});

test('the class name stands in for a missing model_type', () => {
  assert.is(parseModelConfig({ ...TINY_V2, model_type: undefined }, 'config.json').spec.architecture, 'deepseek_v2');
});

test('what reparam adds', () => {
  const tpla = { groups: 2, shared: 8, norm: 'exact', transform: true, rank_weights: true, fingerprint: 'abc' };
  assert.equal(parseModelConfig({ ...TINY_V3, tpla }, 'config.json').spec.tpla, { groups: 2, shared: 8, norm: 'exact', normScale: [], transform: true, rankWeights: true, fingerprint: 'abc' });
  const widths = (shared: unknown) => parseModelConfig({ ...TINY_V3, tpla: { ...tpla, shared } }, 'config.json').spec.tpla!.shared;
  assert.equal(widths([0, 32, 8]), [0, 32, 8]);
  assert.is(widths([8, 8, 8]), 8, 'equal widths read as one');
  assert.match(refusal({ ...TINY_V3, tpla: { ...tpla, shared: [0, 8] } }).message, 'tpla.shared: 2 shared widths for 3 layers');
  assert.match(refusal({ ...TINY_V3, tpla: { ...tpla, shared: [0, 8, 7] } }).message, 'less the shared 7 is not divisible by 2 groups');
  assert.match(refusal({ ...TINY_V3, tpla: { ...tpla, shared: [0, 8, '8'] } }).message, 'expected a width, or one for each layer');
  assert.match(refusal({ ...TINY_V3, tpla: { ...tpla, shared: 34 } }).message, 'less the shared 34');
  assert.match(refusal({ ...TINY_V3, tpla: { ...tpla, shared: 7 } }).message, 'a latent of 32 less the shared 7 is not divisible by 2 groups');
  assert.match(refusal({ ...TINY_V3, tpla: { ...tpla, norm: 'sliced' } }).message, 'tpla.norm_scale: expected 3 rows of 2 positive numbers');
});

const UNSUPPORTED: [string, JsonObject, string][] = [
  ['another family', { model_type: 'llama' }, 'model_type "llama"; supported: deepseek_v2, deepseek_v3, kimi_k2'],
  ['no model_type at all', { model_type: undefined, architectures: undefined }, 'a config without model_type'],
  ['sparse attention by its type', { model_type: 'deepseek_v32' }, 'sparse attention'],
  ['sparse attention by its fields', { index_topk: 2048 }, 'sparse attention'],
  ['rope type', { rope_scaling: { type: 'linear', factor: 2 } }, 'rope type "linear"; supported: default, yarn'],
  ['rope type, new spelling', { rope_parameters: { rope_type: 'longrope', rope_theta: 1e4 } }, 'rope type "longrope"'],
  ['untruncated YaRN', { rope_scaling: { type: 'yarn', factor: 2, truncate: false } }, 'YaRN with truncate false'],
  ['gate', { scoring_func: 'softmax' }, 'scoring_func "softmax" with topk_method "noaux_tc"'],
  ['gate method', { topk_method: 'expert_choice' }, 'topk_method "expert_choice"'],
  ['activation', { hidden_act: 'gelu' }, 'activation "gelu"'],
  ['attention bias', { attention_bias: true }, 'attention_bias true'],
  ['grouped keys', { num_key_value_heads: 2 }, 'num_key_value_heads 2'],
  ['quantisation method', { quantization_config: { quant_method: 'awq' } }, 'quantisation method "awq"'],
  ['fp8 without blocks', { quantization_config: { quant_method: 'fp8' } }, 'weight_block_size null'],
  ['fp8 format', { quantization_config: { quant_method: 'fp8', fmt: 'e5m2', weight_block_size: [128, 128] } }, 'fp8 format "e5m2"'],
];
for (const [what, change, message] of UNSUPPORTED) {
  test(`refuses by name: ${what}`, () => {
    const error = refusal({ ...TINY_V3, ...change });
    assert.is(error.code, 'MODEL_UNSUPPORTED');
    assert.match(error.message, message);
  });
}

test('all problems come at once', () => {
  const error = refusal({ ...TINY_V3, hidden_act: 'relu', attention_bias: true, vocab_size: '32k', qk_rope_head_dim: 7, num_experts_per_tok: 9 });
  assert.is(error.code, 'MODEL_UNSUPPORTED');
  for (const part of ['/m/config.json', 'activation "relu"', 'attention_bias', 'vocab_size: expected an integer of at least 1, found "32k"', 'qk_rope_head_dim is 7', 'num_experts_per_tok 9']) assert.match(error.message, part);
});

test('a damaged config is invalid rather than unsupported', () => {
  assert.is(refusal({ ...TINY_V3, kv_lora_rank: undefined }).code, 'CHECKPOINT_INVALID');
  assert.match(refusal({ ...TINY_V3, kv_lora_rank: undefined }).message, 'kv_lora_rank: expected an integer of at least 1, found nothing');
  assert.match(refusal([]).message, 'expected a JSON object');
});

test.run();
