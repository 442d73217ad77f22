/**
 * Measures the CPU engine against what the same machine gives in the same run:
 *
 *   npx tsx scripts/bench_engine.ts                       a random model of DeepSeek-V2-Lite's layer shape
 *   npx tsx scripts/bench_engine.ts --model models/demo   a checkpoint
 *   npx tsx scripts/bench_engine.ts --isa avx512 --activations bf16 --threads 4 --json
 *
 * Prefill is judged by arithmetic (share of the fused multiply-adds, or tile products, that the cores can do), decode by memory (share of
 * the bandwidth of a plain read). Ratios of a busy machine are lower bounds.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import Table from 'cli-table3';
import { loadCheckpoint } from '../src/model/checkpoint.js';
import { isMoeLayer, parseModelConfig, type JsonObject } from '../src/model/config.js';
import { writeSafetensors } from '../src/model/safetensors_writer.js';
import type { ModelSpec } from '../src/model/spec.js';
import { expectedTensors } from '../src/model/tensors.js';
import { native as loadNative } from '../src/native/loader.js';
import type { CpuRates, Engine, EngineOptions, KvLayout, Weights } from '../src/native/types.js';

const { values: flags } = parseArgs({
  options: {
    model: { type: 'string' },
    layers: { type: 'string', default: '3' },
    experts: { type: 'string', default: '16' },
    isa: { type: 'string' },
    activations: { type: 'string', default: 'f32' },
    threads: { type: 'string', default: '0' },
    prompts: { type: 'string', default: '128,512,2048' },
    batches: { type: 'string', default: '1,4,16,64' },
    context: { type: 'string', default: '512' },
    seconds: { type: 'string', default: '2' },
    json: { type: 'boolean', default: false },
  },
});

const native = loadNative();
const PAGE = 64;

/** One layer as DeepSeek-V2-Lite has them, with fewer experts and a smaller vocabulary so that it fits beside other work. */
const V2_LITE: JsonObject = {
  architectures: ['DeepseekV2ForCausalLM'], model_type: 'deepseek_v2', vocab_size: 16384, hidden_size: 2048, num_hidden_layers: Number(flags.layers),
  num_attention_heads: 16, num_key_value_heads: 16, q_lora_rank: null, kv_lora_rank: 512, qk_nope_head_dim: 128, qk_rope_head_dim: 64, v_head_dim: 128,
  intermediate_size: 10944, moe_intermediate_size: 1408, n_routed_experts: Number(flags.experts), n_shared_experts: 2, num_experts_per_tok: 6,
  first_k_dense_replace: 1, moe_layer_freq: 1, n_group: 1, topk_group: 1, norm_topk_prob: false, routed_scaling_factor: 1, scoring_func: 'softmax',
  topk_method: 'greedy', hidden_act: 'silu', rms_norm_eps: 1e-6, tie_word_embeddings: false, max_position_embeddings: 8192, rope_theta: 10000,
  bos_token_id: 0, eos_token_id: 1, torch_dtype: 'bfloat16',
};

/** Random bf16 weights; their values do not matter, only that they are neither zero nor huge. */
function writeRandomModel(dir: string, config: JsonObject): void {
  const { spec } = parseModelConfig(config, 'benchmark model');
  const noise = new Uint16Array(1 << 20);
  let state = 1;
  for (let i = 0; i < noise.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    noise[i] = (state >>> 31 << 15) | 0x3c00 | ((state >>> 20) & 0xff);
  }
  const tensors = [...expectedTensors(spec)].map(({ name, shape }) => {
    const data = new Uint16Array(shape.reduce((product, size) => product * size, 1));
    for (let at = 0; at < data.length; at += noise.length) data.set(noise.subarray(0, Math.min(noise.length, data.length - at)), at);
    return { name, shape, dtype: 'BF16', data: new Uint8Array(data.buffer) };
  });
  writeFileSync(join(dir, 'config.json'), JSON.stringify(config));
  writeSafetensors(join(dir, 'model.safetensors'), tensors);
}

interface Cost {
  /** Weights outside the experts, and of one expert, over all layers of each kind. */
  commonParameters: number;
  moeLayers: number;
  expertParameters: number;
}

function costOf(spec: ModelSpec): Cost {
  const { hiddenSize: d, heads, qkNopeHeadDim: nope, qkRopeHeadDim: rope, vHeadDim: v, kvLoraRank: r, moe } = spec;
  const queries = heads * (nope + rope);
  const q = spec.qLoraRank === null ? d * queries : spec.qLoraRank * (d + queries);
  const attention = q + d * (r + rope) + heads * v * d;
  let commonParameters = d * spec.vocabSize;
  let moeLayers = 0;
  for (let layer = 0; layer < spec.layers; layer++) {
    commonParameters += attention;
    if (!isMoeLayer(spec, layer)) {
      commonParameters += 3 * d * spec.intermediateSize;
      continue;
    }
    moeLayers++;
    commonParameters += d * moe!.experts + 3 * d * moe!.intermediateSize * moe!.sharedExperts;
  }
  return { commonParameters, moeLayers, expertParameters: moe ? 3 * d * moe.intermediateSize : 0 };
}

/** Multiply-adds count 2. Expansion of latents and causal attention included; logits of one token only. */
function prefillFlops(spec: ModelSpec, tokens: number): number {
  const cost = costOf(spec);
  const head = spec.hiddenSize * spec.vocabSize;
  const linear = 2 * tokens * (cost.commonParameters - head + cost.moeLayers * (spec.moe?.topK ?? 0) * cost.expertParameters) + 2 * head;
  const expand = 2 * tokens * spec.kvLoraRank * spec.heads * (spec.qkNopeHeadDim + spec.vHeadDim) * spec.layers;
  const attend = tokens * (tokens + 1) * spec.heads * (spec.qkNopeHeadDim + spec.qkRopeHeadDim + spec.vHeadDim) * spec.layers;
  return linear + expand + attend;
}

/** Weights read once per step, experts as often as a uniform choice would hit them, and every sequence's KV. */
function decodeBytes(spec: ModelSpec, weightBytes: number, batch: number, context: number, kvBytesPerToken: number): number {
  const cost = costOf(spec);
  const kvB = spec.kvLoraRank * spec.heads * (spec.qkNopeHeadDim + spec.vHeadDim) * spec.layers;
  const experts = spec.moe ? spec.moe.experts * (1 - (1 - spec.moe.topK / spec.moe.experts) ** batch) : 0;
  return weightBytes * (cost.commonParameters + kvB + cost.moeLayers * experts * cost.expertParameters) + batch * context * kvBytesPerToken;
}

async function bestSeconds(body: () => Promise<unknown>): Promise<number> {
  let best = Infinity;
  const end = performance.now() + 1000 * Number(flags.seconds);
  do {
    const begin = performance.now();
    await body();
    best = Math.min(best, (performance.now() - begin) / 1000);
  } while (performance.now() < end);
  return best;
}

function randomTokens(count: number, vocab: number): Int32Array {
  return Int32Array.from({ length: count }, (_, i) => (i * 7919 + 13) % vocab);
}

interface PrefillRow {
  tokens: number;
  tokensPerSecond: number;
  flopsPerSecond: number;
}

interface DecodeRow {
  batch: number;
  stepMs: number;
  bytesPerSecond: number;
}

function makeEngine(spec: ModelSpec, weights: Weights, pages: number): { engine: Engine; kvBytesPerToken: number } {
  const layout: KvLayout = { form: 'mla', ranks: 1, layers: spec.layers, latent: spec.kvLoraRank, rope: spec.qkRopeHeadDim, shared: 0, dtype: 'bf16', pageTokens: PAGE };
  const arena = new native.KvArena(layout, pages);
  const options: EngineOptions = { spec, weights, arena, threads: Number(flags.threads), isa: flags.isa, activations: flags.activations as EngineOptions['activations'] };
  return { engine: new native.Engine(options), kvBytesPerToken: arena.bytesPerTokenPerRank };
}

async function measurePrefill(spec: ModelSpec, weights: Weights): Promise<PrefillRow[]> {
  const lengths = flags.prompts.split(',').map(Number).filter((tokens) => tokens <= spec.contextLength);
  const pages = Math.ceil(Math.max(...lengths) / PAGE);
  const { engine } = makeEngine(spec, weights, pages);
  const table = Int32Array.from({ length: pages }, (_, i) => i);
  const rows: PrefillRow[] = [];
  for (const tokens of lengths) {
    const prompt = randomTokens(tokens, spec.vocabSize);
    const seconds = await bestSeconds(() => engine.prefill([{ tokens: prompt, position: 0, pages: table, logits: 'last' }]));
    rows.push({ tokens, tokensPerSecond: tokens / seconds, flopsPerSecond: prefillFlops(spec, tokens) / seconds });
  }
  engine.close();
  return rows;
}

async function measureDecode(spec: ModelSpec, weights: Weights, weightBytes: number): Promise<DecodeRow[]> {
  const batches = flags.batches.split(',').map(Number);
  const context = Math.min(Number(flags.context), spec.contextLength);
  const perSequence = Math.ceil(context / PAGE);
  const { engine, kvBytesPerToken } = makeEngine(spec, weights, perSequence * Math.max(...batches));
  const rows: DecodeRow[] = [];
  for (const batch of batches) {
    const items = Array.from({ length: batch }, (_, i) => ({
      token: (i * 7919) % spec.vocabSize,
      position: context - 1,
      pages: [Int32Array.from({ length: perSequence }, (_unused, j) => i * perSequence + j)],
    }));
    const seconds = await bestSeconds(() => engine.decode(items));
    rows.push({ batch, stepMs: seconds * 1000, bytesPerSecond: decodeBytes(spec, weightBytes, batch, context, kvBytesPerToken) / seconds });
  }
  engine.close();
  return rows;
}

function percent(part: number, whole: number): string {
  return whole > 0 ? `${((100 * part) / whole).toFixed(0)} %` : '-';
}

function print(rates: CpuRates, prefill: PrefillRow[], decode: DecodeRow[]): void {
  console.log(`${rates.isa}, ${rates.threads} threads, activations ${flags.activations}: fp32 ${(rates.fp32FlopsPerSecond / 1e9).toFixed(0)} GFLOP/s, ` +
    `bf16 ${(rates.bf16FlopsPerSecond / 1e9).toFixed(0)} GFLOP/s, read ${(rates.readBytesPerSecond / 1e9).toFixed(1)} GB/s, copy ${(rates.copyBytesPerSecond / 1e9).toFixed(1)} GB/s`);
  const compute = new Table({ head: ['prefill tokens', 'tokens/s', 'GFLOP/s', 'of fp32 peak', 'of bf16 peak'], style: { head: [], border: [] } });
  for (const row of prefill) {
    compute.push([row.tokens, row.tokensPerSecond.toFixed(0), (row.flopsPerSecond / 1e9).toFixed(1), percent(row.flopsPerSecond, rates.fp32FlopsPerSecond), percent(row.flopsPerSecond, rates.bf16FlopsPerSecond)]);
  }
  console.log(compute.toString());
  const memory = new Table({ head: ['decode batch', 'ms per step', 'tokens/s', 'GB/s', 'of read bandwidth'], style: { head: [], border: [] } });
  for (const row of decode) {
    memory.push([row.batch, row.stepMs.toFixed(2), ((1000 * row.batch) / row.stepMs).toFixed(0), (row.bytesPerSecond / 1e9).toFixed(2), percent(row.bytesPerSecond, rates.readBytesPerSecond)]);
  }
  console.log(memory.toString());
}

async function main(): Promise<void> {
  const dir = flags.model ?? mkdtempSync(join(tmpdir(), 'tpla-bench-'));
  try {
    if (!flags.model) writeRandomModel(dir, V2_LITE);
    const { spec, files, tensors } = loadCheckpoint(dir);
    const weights = new native.Weights(files, tensors);
    const weightBytes = weights.bytes / tensors.reduce((sum, tensor) => sum + tensor.shape.reduce((product, size) => product * size, 1), 0);
    const before = native.measureCpu(Number(flags.threads), flags.isa);
    const prefill = await measurePrefill(spec, weights);
    const decode = await measureDecode(spec, weights, weightBytes);
    const after = native.measureCpu(Number(flags.threads), flags.isa);
    const best = (key: 'fp32FlopsPerSecond' | 'bf16FlopsPerSecond' | 'readBytesPerSecond' | 'copyBytesPerSecond'): number => Math.max(before[key], after[key]);
    const rates: CpuRates = {
      ...before,
      fp32FlopsPerSecond: best('fp32FlopsPerSecond'),
      bf16FlopsPerSecond: best('bf16FlopsPerSecond'),
      readBytesPerSecond: best('readBytesPerSecond'),
      copyBytesPerSecond: best('copyBytesPerSecond'),
    };
    if (flags.json) console.log(JSON.stringify({ rates, activations: flags.activations, prefill, decode }));
    else print(rates, prefill, decode);
  } finally {
    if (!flags.model) rmSync(dir, { recursive: true, force: true });
  }
}

await main();
