import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { TplaError } from '../errors.js';
import type { Checkpoint } from '../model/checkpoint.js';
import type { ModelSpec } from '../model/spec.js';
import type { Tokenizer } from '../model/tokenizer.js';
import { writeSafetensors } from '../model/safetensors_writer.js';
import { readSafetensors } from '../model/safetensors.js';
import { native } from '../native/loader.js';
import type { LayerSample } from '../native/reparam.js';
import { shuffle, uniform } from '../random.js';
import { readTensor } from './tensor_file.js';

export interface CalibrationOptions {
  file: string;
  /** Tokens per sequence. */
  context: number;
  /** In total; null for as many as do good, within QUERY_BYTES. */
  tokens: number | null;
  /** Queries sampled per sequence; null for all, within SAMPLE_BYTES. */
  queries: number | null;
  seed: number;
}

/** Calibration text as token sequences. */
export interface CalibrationText {
  sequences: Int32Array[];
  /** Queries sampled per sequence. */
  queries: number;
  /** SHA-256 of the file. */
  hash: string;
  file: string;
}

/** More text than this no longer improves the fit; less overfits it. */
export const MOST_TOKENS = 65536;
/** Bound on one layer's queries of the whole text, the largest thing that calibration holds beside weights. */
export const QUERY_BYTES = 2e9;

/** Bound on one layer's sampled queries. Descent has so many unknowns that it takes all the queries it can get. */
export const SAMPLE_BYTES = 5e8;

function tokenCount({ tokens }: CalibrationOptions, spec: ModelSpec): number {
  return tokens ?? Math.min(MOST_TOKENS, Math.floor(QUERY_BYTES / queryBytes(spec)));
}

function queryCount({ queries }: CalibrationOptions, spec: ModelSpec, sequences: number, context: number): number {
  return Math.min(context, queries ?? Math.max(1, Math.floor(SAMPLE_BYTES / queryBytes(spec) / sequences)));
}

function queryBytes({ heads, qkNopeHeadDim, qkRopeHeadDim }: ModelSpec): number {
  return heads * (qkNopeHeadDim + qkRopeHeadDim) * 4;
}

/** What a fit needs at least: as many sampled queries as it has unknowns per output, times this. */
const QUERIES_PER_COLUMN = 4;

/** Cuts the text into sequences; throws REQUEST_INVALID when it is too short to fit `columns` columns per head. */
export async function readCalibrationText(tokenizer: Tokenizer, spec: ModelSpec, options: CalibrationOptions, columns: number): Promise<CalibrationText> {
  let text: Buffer;
  try {
    text = readFileSync(options.file);
  } catch (error) {
    throw new TplaError('IO_FAILED', `calibration text ${options.file} cannot be read: ${(error as Error).message}`, { cause: error });
  }
  const ids = await tokenizer.encode(text.toString('utf8'), { addSpecialTokens: false });
  const begin = tokenizer.bosTokenId === null ? [] : [tokenizer.bosTokenId];
  const context = Math.min(options.context, spec.contextLength);
  const body = context - begin.length;
  const sequences: Int32Array[] = [];
  for (let at = 0; at + body <= ids.length; at += body) sequences.push(Int32Array.from([...begin, ...ids.slice(at, at + body)]));
  const chosen = shuffle(sequences, uniform(options.seed)).slice(0, Math.max(2, Math.floor(tokenCount(options, spec) / context)));
  const perSequence = queryCount(options, spec, Math.max(1, chosen.length), context);
  const queries = chosen.length * perSequence;
  if (chosen.length < 2 || queries < QUERIES_PER_COLUMN * columns) {
    throw new TplaError('REQUEST_INVALID', `calibration text ${options.file} is too short: ${ids.length} tokens give ${queries} queries; fitting ${columns} columns per head takes at least ${QUERIES_PER_COLUMN * columns} in 2 sequences of ${context} tokens`);
  }
  return { sequences: chosen, queries: perSequence, hash: createHash('sha256').update(text).digest('hex'), file: options.file };
}

/** Positions whose queries are sampled, per sequence ascending: evenly spread, with a random phase. */
export function sampledPositions(lengths: number[], perSequence: number, seed: number): number[][] {
  const random = uniform(seed);
  return lengths.map((length) => {
    const count = Math.min(perSequence, length);
    const phase = random();
    return [...new Set(Array.from({ length: count }, (_, i) => Math.min(length - 1, Math.floor(((i + phase) * length) / count))))];
  });
}

const PAGE_TOKENS = 64;

/**
 * Runs the calibration text through the exact model, layer by layer, and stores what each layer's attention sees in a file of its own.
 * Weights are read through once, in order; a layer's activations of the whole text are in memory at a time.
 */
export async function captureLayers(
  checkpoint: Checkpoint,
  text: CalibrationText,
  options: { seed: number; threads: number; isWanted: (layer: number) => boolean; pathOf: (layer: number) => string; onLayer: (layer: number) => void },
): Promise<void> {
  const { spec } = checkpoint;
  const addon = native();
  const lengths = text.sequences.map((sequence) => sequence.length);
  const positions = sampledPositions(lengths, text.queries, options.seed);
  const bounds = lengths.reduce((sums, length) => [...sums, sums[sums.length - 1]! + length], [0]);
  const queryTokens = Int32Array.from(positions.flatMap((local, i) => local.map((position) => bounds[i]! + position)));
  const pagesOf = lengths.map((length) => Math.ceil(length / PAGE_TOKENS));
  const firstPage = pagesOf.reduce((sums, pages) => [...sums, sums[sums.length - 1]! + pages], [0]);

  const weights = new addon.Weights(checkpoint.files, checkpoint.tensors);
  // One layer's pages would do; the engine writes them all, so the arena is as long as the model is deep. Pages cost nothing until touched.
  const arena = new addon.KvArena({ form: 'mla', ranks: 1, layers: spec.layers, latent: spec.kvLoraRank, rope: spec.qkRopeHeadDim, shared: 0, dtype: 'f32', pageTokens: PAGE_TOKENS }, firstPage[lengths.length]!);
  const engine = new addon.Engine({ spec, weights, arena, threads: options.threads });
  try {
    const items = text.sequences.map((tokens, i) => ({ tokens, position: 0, pages: Int32Array.from({ length: pagesOf[i]! }, (_, page) => firstPage[i]! + page), logits: 'none' as const }));
    await engine.captureQueries(items, queryTokens, (layer, queries) => {
      weights.release();
      options.onLayer(layer);
      if (!options.isWanted(layer)) return;
      const gain = weights.read(`model.layers.${layer}.self_attn.kv_a_layernorm.weight`);
      const { latents, ropeKeys } = collectKv((page) => arena.page(0, layer, page), { spec, lengths, firstPage, gain });
      const sample: LayerSample = { sequences: Int32Array.from(bounds), latents, ropeKeys, queryTokens, queries };
      saveSample(options.pathOf(layer), sample, spec);
    });
  } finally {
    engine.close();
    arena.close();
    weights.close();
  }
}

/** Latents without the norm's gain, and rope keys, in token order. */
function collectKv(
  page: (index: number) => Uint8Array,
  { spec, lengths, firstPage, gain }: { spec: Checkpoint['spec']; lengths: number[]; firstPage: number[]; gain: Float32Array },
): { latents: Float32Array; ropeKeys: Float32Array } {
  const [r, rope] = [spec.kvLoraRank, spec.qkRopeHeadDim];
  const tokens = lengths.reduce((sum, length) => sum + length, 0);
  const latents = new Float32Array(tokens * r);
  const ropeKeys = new Float32Array(tokens * rope);
  let token = 0;
  lengths.forEach((length, i) => {
    for (let t = 0; t < length; t++, token++) {
      const bytes = page(firstPage[i]! + Math.floor(t / PAGE_TOKENS));
      const row = new Float32Array(bytes.buffer, bytes.byteOffset + (t % PAGE_TOKENS) * (r + rope) * 4, r + rope);
      for (let j = 0; j < r; j++) latents[token * r + j] = gain[j] === 0 ? 0 : row[j]! / gain[j]!;
      ropeKeys.set(row.subarray(r), token * rope);
    }
  });
  return { latents, ropeKeys };
}

// ---------------------------------------------------------------- samples on disk

/** Bytes of one layer's sample, but for its header. */
export function sampleBytes({ heads, qkNopeHeadDim, qkRopeHeadDim, kvLoraRank }: Pick<ModelSpec, 'heads' | 'qkNopeHeadDim' | 'qkRopeHeadDim' | 'kvLoraRank'>, { sequences, queries }: Pick<CalibrationText, 'sequences' | 'queries'>): number {
  const tokens = sequences.reduce((sum, { length }) => sum + length, 0);
  return 4 * (tokens * (kvLoraRank + qkRopeHeadDim) + sequences.length * queries * (1 + heads * (qkNopeHeadDim + qkRopeHeadDim)) + sequences.length + 1);
}

export function saveSample(path: string, sample: LayerSample, spec: Checkpoint['spec']): void {
  const tokens = sample.sequences[sample.sequences.length - 1]!;
  const bytes = (array: Float32Array | Int32Array) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  writeSafetensors(path, [
    { name: 'sequences', dtype: 'I32', shape: [sample.sequences.length], data: bytes(sample.sequences) },
    { name: 'query_tokens', dtype: 'I32', shape: [sample.queryTokens.length], data: bytes(sample.queryTokens) },
    { name: 'latents', dtype: 'F32', shape: [tokens, spec.kvLoraRank], data: bytes(sample.latents) },
    { name: 'rope_keys', dtype: 'F32', shape: [tokens, spec.qkRopeHeadDim], data: bytes(sample.ropeKeys) },
    { name: 'queries', dtype: 'F32', shape: [sample.queryTokens.length, spec.heads, spec.qkNopeHeadDim + spec.qkRopeHeadDim], data: bytes(sample.queries) },
  ]);
}

export function loadSample(path: string): LayerSample {
  const file = readSafetensors(path);
  const floats = (name: string) => new Float32Array(readTensor(file, name));
  const integers = (name: string) => new Int32Array(readTensor(file, name));
  return { sequences: integers('sequences'), latents: floats('latents'), ropeKeys: floats('rope_keys'), queryTokens: integers('query_tokens'), queries: floats('queries') };
}
