import type { Checkpoint } from '../model/checkpoint.js';
import { quantizeBlocks, toBf16, toF16 } from '../model/dtype.js';
import type { TensorHeader } from '../model/safetensors_writer.js';
import { native } from '../native/loader.js';
import type { FitTarget, LayerShape, LayerWeights } from '../native/reparam.js';
import type { Weights } from '../native/types.js';
import { rowsOf } from './basis.js';
import type { LayerDesign } from './layer.js';

export type StoredTensor = TensorHeader & { data: Uint8Array };

/** What changed matrices are stored as; `auto` keeps the source's format, bf16 in place of fp8. */
export type OutputDType = 'auto' | 'f32' | 'bf16' | 'fp8';

/** Attention weights of one layer as published, in fp32. */
export interface SourceLayer {
  /** [latent + rope, hidden] */
  kvA: Float32Array;
  gain: Float32Array;
  /** [heads, nope + v, latent] with the gain folded in. */
  kvB: Float32Array;
}

export function layerShape({ spec }: Checkpoint): LayerShape {
  return { heads: spec.heads, nope: spec.qkNopeHeadDim, rope: spec.qkRopeHeadDim, v: spec.vHeadDim, latent: spec.kvLoraRank, hidden: spec.hiddenSize, softmaxScale: spec.softmaxScale };
}

export function readMatrix(checkpoint: Checkpoint, weights: Weights, name: string): Float32Array {
  const entry = checkpoint.tensors.find((tensor) => tensor.name === name)!;
  return entry.dtype === 'F8_E4M3' ? weights.read(name, { name: `${name}_scale_inv`, block: checkpoint.spec.weightBlock! }) : weights.read(name);
}

export function readSourceLayer(checkpoint: Checkpoint, weights: Weights, layer: number): SourceLayer {
  const at = `model.layers.${layer}.self_attn.`;
  const gain = readMatrix(checkpoint, weights, `${at}kv_a_layernorm.weight`);
  const kvB = readMatrix(checkpoint, weights, `${at}kv_b_proj.weight`);
  for (let i = 0; i < kvB.length; i++) kvB[i] = kvB[i]! * gain[i % gain.length]!;
  return { kvA: readMatrix(checkpoint, weights, `${at}kv_a_proj_with_mqa.weight`), gain, kvB };
}

/** The weights a fit needs: W_UK and W_UV taken apart, and W_O. */
export function fitWeights(checkpoint: Checkpoint, weights: Weights, layer: number, { kvB }: SourceLayer): LayerWeights {
  const { heads, nope, v, latent } = layerShape(checkpoint);
  const part = (begin: number, count: number) => {
    const out = new Float32Array(heads * count * latent);
    for (let head = 0; head < heads; head++) out.set(kvB.subarray((head * (nope + v) + begin) * latent, (head * (nope + v) + begin + count) * latent), head * count * latent);
    return out;
  };
  return { uk: part(0, nope), uv: part(nope, v), wo: readMatrix(checkpoint, weights, `model.layers.${layer}.self_attn.o_proj.weight`) };
}

/**
 * The tensors of a layer that reparameterisation replaces or adds. The norm's gain is folded away. An orthogonal basis commutes with
 * the norm and goes into W_DKV; any other is applied after it, and W_DKV stays as it is.
 */
export async function layerTensors(checkpoint: Checkpoint, layer: number, source: SourceLayer, design: LayerDesign, options: { transform: boolean; output: OutputDType; target: FitTarget }): Promise<StoredTensor[]> {
  const { heads, nope, v, latent, rope, hidden } = layerShape(checkpoint);
  const at = `model.layers.${layer}.self_attn.`;
  const { basis } = design;
  const tensors: StoredTensor[] = [];
  const formatOf = (name: string) => storedFormat(checkpoint, name, options.output);

  if (options.transform) {
    tensors.push({ name: `${at}tpla.transform.weight`, dtype: 'F32', shape: [latent, latent], data: bytes(rowsOf(basis.matrix)) });
  } else {
    const name = `${at}kv_a_proj_with_mqa.weight`;
    const rotated = new Float32Array(source.kvA);
    rotated.set(await native().multiply(rowsOf(basis.matrix), source.kvA.slice(0, latent * hidden), latent, latent, hidden, options.target));
    tensors.push(...stored(name, [latent + rope, hidden], rotated, formatOf(name)));
  }
  const norm = `${at}kv_a_layernorm.weight`;
  tensors.push(...stored(norm, [latent], new Float32Array(latent).fill(1), formatOf(norm)));
  const kvB = `${at}kv_b_proj.weight`;
  const rows = heads * (nope + v);
  tensors.push(...stored(kvB, [rows, latent], await native().multiply(source.kvB, rowsOf(basis.inverse), rows, latent, latent, options.target), formatOf(kvB)));

  const rankFormat = formatOf(kvB) === 'F8_E4M3' ? 'BF16' : formatOf(kvB);
  design.ranks?.forEach((rank, i) => {
    const width = rank.basis.length / latent;
    tensors.push(...stored(`${at}tpla.rank${i}.w_uk`, [heads, nope, width], rank.uk, rankFormat), ...stored(`${at}tpla.rank${i}.w_uv`, [heads, v, width], rank.uv, rankFormat));
  });
  return tensors;
}

function storedFormat(checkpoint: Checkpoint, name: string, output: OutputDType): string {
  const entry = checkpoint.tensors.find((tensor) => tensor.name === name)!;
  if (entry.shape.length === 1 || output === 'auto') return entry.dtype === 'F8_E4M3' ? 'BF16' : entry.dtype;
  return { f32: 'F32', bf16: 'BF16', fp8: 'F8_E4M3' }[output];
}

function stored(name: string, shape: number[], values: Float32Array, dtype: string): StoredTensor[] {
  if (dtype === 'F8_E4M3') {
    const [rows, columns] = shape as [number, number];
    const { codes, scales } = quantizeBlocks(values, rows, columns, [128, 128]);
    return [{ name, dtype, shape, data: codes }, { name: `${name}_scale_inv`, dtype: 'F32', shape: [Math.ceil(rows / 128), Math.ceil(columns / 128)], data: bytes(scales) }];
  }
  const data = dtype === 'F32' ? bytes(values) : dtype === 'F16' ? bytes(toF16(values)) : bytes(toBf16(values));
  return [{ name, dtype, shape, data }];
}

function bytes(array: Float32Array | Uint16Array): Uint8Array {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}
