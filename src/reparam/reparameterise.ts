/** One layer, from published weights to what a reparameterised checkpoint stores of it, and what the checkpoint says of all of them. */
import { createHash } from 'node:crypto';
import type { Checkpoint } from '../model/checkpoint.js';
import { sharedWidths } from '../model/shared_widths.js';
import type { FitTarget, LayerSample, Sensitivity } from '../native/reparam.js';
import type { Weights } from '../native/types.js';
import { designLayer, type LayerDesign } from './layer.js';
import { fitWeights, layerShape, layerTensors, readSourceLayer, type OutputDType, type StoredTensor } from './layer_tensors.js';
import type { LayerRecord } from './manifest.js';
import { hasRankWeights, hasTransform, type Method } from './method.js';
import type { StageClock } from './stages.js';

/** What layers are fitted with, and the clock of it all. */
export interface FitContext {
  target: FitTarget;
  deviceName: string;
  clock: StageClock;
  /** Per layer, for methods that are fitted to the same sample one after the other. */
  statistics?: { known: Sensitivity | null }[];
}

export interface LayerOptions {
  method: Method;
  groups: number;
  seed: number;
  output: OutputDType;
  fit: FitContext;
}

/** New tensors of one layer, and what the manifest says of them; of a layer that every rank holds whole nothing changes. */
export async function reparameteriseLayer(
  source: Checkpoint,
  weights: Weights,
  layer: number,
  sample: LayerSample | null,
  { method, groups, seed, output, fit }: LayerOptions,
): Promise<{ tensors: StoredTensor[]; record: LayerRecord }> {
  if (method.shared === source.spec.kvLoraRank) return { tensors: [], record: wholeLayer(layer, method, fit) };
  const { target, clock } = fit;
  const published = clock.timeNow('read', () => readSourceLayer(source, weights, layer));
  const input = { shape: layerShape(source), weights: clock.timeNow('read', () => fitWeights(source, weights, layer, published)), sample };
  const design = await designLayer(input, method, { groups, seed: seed + layer, target, clock, statistics: fit.statistics?.[layer] });
  const tensors = await clock.time('store', () => layerTensors(source, layer, published, design, { transform: hasTransform(method), output, target }));
  const hash = createHash('sha256');
  for (const { name, dtype, shape, data } of tensors) hash.update(`${name} ${dtype} ${shape.join('x')}\n`).update(data);
  return { tensors, record: recordOf(layer, method, design, hash.digest('hex'), fit) };
}

function recordOf(layer: number, { shared }: Method, { basisKind, queries, descended, shares, normScale, error }: LayerDesign, hash: string, { deviceName }: FitContext): LayerRecord {
  return { layer, shared, hash, basis: basisKind, queries, descended, variance_shares: shares, norm_scale: normScale, output_error: error, fitted_on: deviceName };
}

function wholeLayer(layer: number, { shared }: Method, { deviceName }: FitContext): LayerRecord {
  return { layer, shared, hash: '', basis: 'identity', queries: 'sliced', descended: false, variance_shares: null, norm_scale: null, output_error: 0, fitted_on: deviceName };
}

/** What all layers of a checkpoint are made by; `widths` has one shared width for each. */
export interface CheckpointMethod {
  groups: number;
  method: Method;
  widths: readonly number[];
}

export function fingerprintOf({ groups, method, widths }: CheckpointMethod, layers: LayerRecord[]): string {
  const hash = createHash('sha256').update(`tpla 1 groups ${groups} shared ${String(sharedWidths(widths))} norm ${method.norm}\n`);
  for (const layer of layers) hash.update(`${layer.hash} ${layer.norm_scale?.join(',') ?? ''}\n`);
  return hash.digest('hex').slice(0, 32);
}

/** The `tpla` section of config.json. */
export function tplaSection({ groups, method, widths }: CheckpointMethod, layers: LayerRecord[], fingerprint: string): object {
  return {
    groups, shared: sharedWidths(widths), norm: method.norm, transform: hasTransform(method), rank_weights: hasRankWeights(method),
    ...(method.norm === 'sliced' ? { norm_scale: layers.map(({ norm_scale }) => norm_scale) } : {}),
    fingerprint,
  };
}
