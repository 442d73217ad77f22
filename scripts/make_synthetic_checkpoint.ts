/**
 * Writes a checkpoint of DeepSeek-V3's layer shape with random weights, as large as wanted, to show how tools behave at size.
 *
 *   npx tsx scripts/make_synthetic_checkpoint.ts OUT [--layers 4] [--experts 32] [--dtype F8_E4M3|BF16] [--tokenizer models/demo]
 *
 * Every layer has DeepSeek-V3's attention (128 heads, latent 512) and expert width; the number of layers and experts decides the size.
 * Each layer is a shard. Weights repeat a random block of some megabytes, so that writing costs no more than the disk.
 */
import { randomFillSync } from 'node:crypto';
import { copyFileSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { parseModelConfig } from '../src/model/config.js';
import { DTYPE_BYTES } from '../src/model/safetensors.js';
import { SafetensorsWriter, type TensorHeader } from '../src/model/safetensors_writer.js';
import { expectedTensors, scaleTensor, type ExpectedTensor } from '../src/model/tensors.js';

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: { layers: { type: 'string', default: '4' }, experts: { type: 'string', default: '32' }, dtype: { type: 'string', default: 'F8_E4M3' }, tokenizer: { type: 'string', default: 'models/demo' } },
});
const out = positionals[0];
if (out === undefined) throw new Error('name the output directory');
const fp8 = flags.dtype === 'F8_E4M3';
const vocabulary = 4096;
const config = {
  architectures: ['DeepseekV3ForCausalLM'], model_type: 'deepseek_v3', vocab_size: vocabulary, hidden_size: 7168, num_hidden_layers: Number(flags.layers), num_attention_heads: 128,
  num_key_value_heads: 128, q_lora_rank: 1536, kv_lora_rank: 512, qk_nope_head_dim: 128, qk_rope_head_dim: 64, v_head_dim: 128, intermediate_size: 18432,
  moe_intermediate_size: 2048, n_routed_experts: Number(flags.experts), n_shared_experts: 1, num_experts_per_tok: 8, first_k_dense_replace: 0, n_group: 1, topk_group: 1,
  norm_topk_prob: true, routed_scaling_factor: 2.5, scoring_func: 'sigmoid', topk_method: 'noaux_tc', hidden_act: 'silu', rms_norm_eps: 1e-6, max_position_embeddings: 4096,
  rope_theta: 10000, tie_word_embeddings: true, bos_token_id: 0, eos_token_id: 1,
  ...(fp8 ? { quantization_config: { quant_method: 'fp8', fmt: 'e4m3', weight_block_size: [128, 128] } } : {}),
};

const BLOCK = 8 << 20;
const random = { bf16: gaussianBf16(), fp8: e4m3Block() };

/** Values of about unit variance; the standard deviation of a matrix is set by its scales (fp8) or by an exponent shift (bf16). */
function gaussianBf16(): Buffer {
  const block = Buffer.alloc(BLOCK);
  randomFillSync(block);
  for (let i = 0; i < BLOCK; i += 2) block.writeUInt16LE((block.readUInt16LE(i) & 0x807f) | 0x3c00, i);
  return block;
}

function e4m3Block(): Buffer {
  const block = randomFillSync(Buffer.alloc(BLOCK));
  for (let i = 0; i < BLOCK; i++) block[i] = (block[i]! & 0x8f) | 0x30;
  return block;
}

function headersOf(tensor: ExpectedTensor): TensorHeader[] {
  if (fp8 && tensor.quantizable) return [{ name: tensor.name, dtype: 'F8_E4M3', shape: tensor.shape }, { ...scaleTensor(tensor, [128, 128]), dtype: 'F32' }];
  return [{ name: tensor.name, dtype: tensor.name.endsWith('bias') ? 'F32' : 'BF16', shape: tensor.shape }];
}

function write(writer: SafetensorsWriter, { name, dtype, shape }: TensorHeader): void {
  const count = shape.reduce((product, size) => product * size, 1);
  if (dtype === 'F32') {
    const values = new Float32Array(count).fill(name.endsWith('scale_inv') ? 2 ** -6 : 0);
    return writer.write(name, new Uint8Array(values.buffer));
  }
  if (shape.length === 1) return writer.write(name, new Uint8Array(new Uint16Array(count).fill(0x3f80).buffer));
  const block = dtype === 'BF16' ? random.bf16 : random.fp8;
  // An odd offset per tensor keeps matrices from being copies of one another.
  for (let left = count * DTYPE_BYTES[dtype]!, at = (name.length * 7919 * 64) % BLOCK; left > 0; at = 0) {
    const piece = block.subarray(at, Math.min(BLOCK, at + left));
    writer.write(name, piece);
    left -= piece.length;
  }
}

mkdirSync(out, { recursive: true });
const { spec } = parseModelConfig(config, 'synthetic');
const shards = new Map<string, TensorHeader[]>();
for (const tensor of expectedTensors(spec)) {
  const layer = /^model\.layers\.(\d+)\./.exec(tensor.name)?.[1] ?? 'rest';
  shards.set(layer, [...(shards.get(layer) ?? []), ...headersOf(tensor)]);
}
const weightMap: Record<string, string> = {};
let total = 0;
for (const [layer, headers] of shards) {
  const file = `model-${layer}.safetensors`;
  const writer = new SafetensorsWriter(join(out, file), headers);
  for (const header of headers) {
    write(writer, header);
    weightMap[header.name] = file;
    total += header.shape.reduce((product, size) => product * size, DTYPE_BYTES[header.dtype]!);
  }
  writer.finish();
}
writeFileSync(join(out, 'model.safetensors.index.json'), JSON.stringify({ metadata: { total_size: total }, weight_map: weightMap }));
writeFileSync(join(out, 'config.json'), JSON.stringify(config, null, 2));
for (const file of ['tokenizer.json', 'tokenizer_config.json']) copyFileSync(join(flags.tokenizer, file), join(out, file));
console.log(`${out}: ${(total / 1e9).toFixed(2)} GB in ${shards.size} shards`);
