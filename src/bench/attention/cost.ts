import { CHUNK, type AttentionShape, type ChunkShape } from './shape.js';
import { countVisible } from './variants.js';

/** The least a shape takes: what must move through device memory once, and multiplications and additions. */
export interface AttentionCost {
  bytes: number;
  flops: number;
}

export function costOfShape(shape: AttentionShape): AttentionCost {
  if (shape.kind === 'pod') {
    const parts = [costOfShape(shape.prefill), costOfShape(shape.decode)];
    return { bytes: sum(parts.map(({ bytes }) => bytes)), flops: sum(parts.map(({ flops }) => flops)) };
  }
  const queries = sum(shape.qLens);
  const visible = 'variants' in shape && shape.variants ? countVisible(shape.variants, shape.qLens, shape.kvLens, shape.causal) : undefined;
  const keys = visible?.tokens ?? sum(shape.kvLens);
  const pairs = visible?.pairs ?? sum(shape.kvLens.map((keyCount, i) => visiblePairs(shape.qLens[i] as number, keyCount, shape.causal)));
  if (shape.kind === 'prefill') {
    const values = shape.keyDim + shape.valueDim;
    return { bytes: (queries + keys) * shape.heads * values * 2, flops: 2 * pairs * shape.heads * values };
  }
  if (shape.kind === 'chunk') return costOfChunk(shape, queries, keys, pairs);
  if (shape.kind === 'gqa') {
    return { bytes: (keys * shape.kvHeads + queries * shape.heads) * shape.headDim * 2 * 2, flops: 2 * pairs * shape.heads * shape.headDim * 2 };
  }
  const width = shape.latent + shape.rope;
  return {
    bytes: keys * kvTokenBytes(shape.kvDType, shape.latent, shape.rope) + queries * shape.heads * (width + shape.latent) * 2,
    flops: 2 * pairs * shape.heads * (width + shape.latent),
  };
}

/** Cached tokens, queries, values and the weights of the up-projection move once; operations are those of the form that takes fewer. */
function costOfChunk({ kvDType, heads }: ChunkShape, queries: number, keys: number, pairs: number): AttentionCost {
  const { latent, rope, head } = CHUNK;
  const weights = heads * 2 * head * latent;
  const absorbed = pairs * heads * (2 * latent + rope) + queries * weights;
  const unabsorbed = pairs * heads * (2 * head + rope) + keys * weights;
  return {
    bytes: keys * kvTokenBytes(kvDType, latent, rope) + queries * heads * (2 * head + rope) * 2 + weights * 2,
    flops: 2 * Math.min(absorbed, unabsorbed),
  };
}

/** One cached token of one layer: in fp8, one fp32 scale per 128 latent values and the rope values in bf16. */
export function kvTokenBytes(dtype: 'bf16' | 'fp8' | 'f32', latent: number, rope: number): number {
  if (dtype === 'f32') return (latent + rope) * 4;
  if (dtype === 'bf16') return (latent + rope) * 2;
  return Math.ceil(latent / 4) * 4 + Math.ceil(latent / 128) * 4 + rope * 2;
}

/** Pairs of a query and a key it sees. With `causal`, query i sees keys - queries + i + 1 of them. */
function visiblePairs(queries: number, keys: number, causal: boolean): number {
  if (!causal) return queries * keys;
  const blind = Math.max(0, queries - keys);
  const seeing = queries - blind;
  const first = keys - queries + blind + 1;
  return seeing * first + (seeing * (seeing - 1)) / 2;
}

function sum(values: number[]): number {
  return values.reduce((total, value) => total + value, 0);
}
