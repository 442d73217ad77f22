import { createHash } from 'node:crypto';
import { copyFileSync, readdirSync, rmSync, statSync, statfsSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { TplaError } from '../errors.js';
import { loadCheckpoint, type Checkpoint } from '../model/checkpoint.js';
import { readSafetensors } from '../model/safetensors.js';
import { attemptWrite, writeSafetensors } from '../model/safetensors_writer.js';
import { Tokenizer } from '../model/tokenizer.js';
import { native } from '../native/loader.js';
import type { FitTarget, LayerSample, Sensitivity } from '../native/reparam.js';
import type { Weights } from '../native/types.js';
import { captureLayers, loadSample, readCalibrationText, sampleBytes, type CalibrationOptions, type CalibrationText } from './calibration.js';
import { fitTarget, type Device } from './device.js';
import { Journal } from './journal.js';
import { designLayer, type LayerDesign } from './layer.js';
import { fitWeights, layerShape, layerTensors, readSourceLayer, type OutputDType, type StoredTensor } from './layer_tensors.js';
import { writeManifest, type LayerRecord } from './manifest.js';
import { hasRankWeights, hasTransform, needsCalibration, rankWidth, validateMethod, type Method } from './method.js';
import type { Progress } from '../report/progress.js';
import { StageClock, type Stage } from './stages.js';
import { isWritten, planBytes, planShards, writeShard } from './shards.js';

export interface ConversionOptions {
  model: string;
  out: string;
  methodName: string;
  method: Method;
  groups: number;
  /** null only for methods that look at no data. */
  calibration: CalibrationOptions | null;
  output: OutputDType;
  seed: number;
  /** What fits layers; the calibration text goes through the model on the CPU. */
  device: Device;
  threads: number;
}

export interface ConversionResult {
  out: string;
  method: string;
  groups: number;
  shared: number;
  fingerprint: string;
  resumed: boolean;
  layers: LayerRecord[];
  bytes_written: number;
  kv_values_per_token_per_rank: number;
  peak_rss_bytes: number;
  device: FitTarget['device'];
  /** "avx512, 2 threads"; "NVIDIA H100 80GB HBM3, cuBLASLt 13.1.0" */
  device_name: string;
  seconds: number;
  /** Summed over layers. */
  stage_seconds: Partial<Record<Stage, number>>;
}

/**
 * Reparameterises a checkpoint of any size. Layers are fitted one at a time and kept in files of their own, then the shards are
 * copied with the changed tensors in place; whatever is finished survives a kill and is not done again.
 */
export async function convert(options: ConversionOptions, progress: Progress): Promise<ConversionResult> {
  const started = performance.now();
  const source = loadCheckpoint(options.model);
  const { spec } = source;
  if (spec.tpla !== null) throw new TplaError('USAGE', `${source.dir} is already reparameterised (fingerprint ${spec.tpla.fingerprint}); start from the published checkpoint`);
  if (resolve(options.out) === source.dir) throw new TplaError('USAGE', 'the output directory is the model itself; choose another');
  validateMethod(options.method, { groups: options.groups, kvLoraRank: spec.kvLoraRank });
  const target = fitTarget(options.device, options.threads);
  const fit: FitContext = { target, deviceName: native().reparamDevice(target), clock: new StageClock() };
  const text = needsCalibration(options.method) ? await calibrationText(source, options) : null;
  checkSpace(source, text, options);

  const { journal, resumed } = Journal.open(resolve(options.out), planOf(source, text, options));
  const layers = await convertLayers(source, text, options, fit, journal, progress);
  const fingerprint = fingerprintOf(options, layers);
  const written = fit.clock.timeNow('shards', () => writeShards(source, journal, progress));
  finish(source, journal, { fingerprint, layers, text, options });
  return {
    out: journal.dir, method: options.methodName, groups: options.groups, shared: options.method.shared, fingerprint, resumed, layers,
    bytes_written: written,
    kv_values_per_token_per_rank: rankWidth(options.method, { groups: options.groups, kvLoraRank: spec.kvLoraRank }) + spec.qkRopeHeadDim,
    peak_rss_bytes: process.resourceUsage().maxRSS * 1024, device: target.device, device_name: fit.deviceName,
    seconds: (performance.now() - started) / 1000, stage_seconds: fit.clock.seconds,
  };
}

/** What layers are fitted with, and the clock of it all. */
export interface FitContext {
  target: FitTarget;
  deviceName: string;
  clock: StageClock;
  /** Per layer, for methods that are fitted to the same sample one after the other. */
  statistics?: { known: Sensitivity | null }[];
}

async function calibrationText(source: Checkpoint, options: ConversionOptions): Promise<CalibrationText> {
  if (options.calibration === null) throw new TplaError('USAGE', `method ${options.methodName} is fitted on text; name one with --calibration FILE`);
  const columns = rankWidth(options.method, { groups: options.groups, kvLoraRank: source.spec.kvLoraRank }) * options.groups;
  return readCalibrationText(Tokenizer.load(source.dir), source.spec, options.calibration, columns);
}

/**
 * Everything that decides what is written; a directory holds the work of one plan only. The device is no part of it: it changes a fit
 * by rounding, so a conversion may be resumed on another. The fingerprint is that of the bytes that were written.
 */
function planOf(source: Checkpoint, text: CalibrationText | null, options: ConversionOptions): object {
  const { method, groups, output, seed, calibration } = options;
  return {
    version: 1, source: source.identity.fingerprint, method, groups, output, seed,
    calibration: text === null ? null : { hash: text.hash, context: calibration!.context, tokens: calibration!.tokens, queries: calibration!.queries, seed: calibration!.seed },
  };
}

/** What is written: the shards, and until a layer is fitted its sample of the calibration text. */
function checkSpace(source: Checkpoint, text: CalibrationText | null, options: ConversionOptions): void {
  let place = resolve(options.out);
  let stat: ReturnType<typeof statfsSync> | null = null;
  while (stat === null) {
    try {
      stat = statfsSync(place);
    } catch {
      if (dirname(place) === place) return;
      place = dirname(place);
    }
  }
  const already = directoryBytes(resolve(options.out));
  const samples = text === null ? 0 : sampleBytes(source.spec, text) * (source.spec.layers - Journal.finished(resolve(options.out), /^layer-\d+\.json$/));
  const needed = source.shards.reduce((sum, { bytes }) => sum + bytes, 0) * 1.05 + samples - already;
  const free = stat.bavail * stat.bsize;
  if (free < needed) throw new TplaError('IO_FAILED', `${options.out}: the disk is full: about ${(needed / 1e9).toFixed(2)} GB are needed, ${(free / 1e9).toFixed(2)} GB are free`);
}

function directoryBytes(dir: string): number {
  try {
    return readdirSync(dir, { withFileTypes: true }).reduce((sum, entry) => sum + (entry.isDirectory() ? directoryBytes(join(dir, entry.name)) : statSync(join(dir, entry.name)).size), 0);
  } catch {
    return 0;
  }
}

// ---------------------------------------------------------------- layers

const layerName = (layer: number) => `layer-${String(layer).padStart(4, '0')}`;
const captureName = (layer: number) => `capture-${String(layer).padStart(4, '0')}.safetensors`;

async function convertLayers(source: Checkpoint, text: CalibrationText | null, options: ConversionOptions, fit: FitContext, journal: Journal, progress: Progress): Promise<LayerRecord[]> {
  const { spec } = source;
  const isDone = (layer: number) => journal.has(`${layerName(layer)}.json`);
  const todo = Array.from({ length: spec.layers }, (_, layer) => layer).filter((layer) => !isDone(layer));
  if (text !== null && todo.some((layer) => !journal.has(captureName(layer)))) {
    progress.start('calibrate', spec.layers);
    await fit.clock.time('capture', () => captureLayers(source, text, {
      seed: options.seed, threads: options.threads,
      isWanted: (layer) => !isDone(layer) && !journal.has(captureName(layer)),
      pathOf: (layer) => journal.path(captureName(layer)),
      onLayer: () => progress.advance(1),
    }));
    progress.finish();
  }
  progress.start('fit layers', spec.layers);
  progress.advance(spec.layers - todo.length);
  const weights = new (native().Weights)(source.files, source.tensors);
  try {
    for (const layer of todo) {
      await convertLayer(source, weights, layer, text !== null, options, fit, journal);
      weights.release();
      progress.advance(1);
    }
  } finally {
    weights.close();
  }
  progress.finish();
  return Array.from({ length: spec.layers }, (_, layer) => journal.readJson<LayerRecord>(`${layerName(layer)}.json`));
}

async function convertLayer(source: Checkpoint, weights: Weights, layer: number, calibrated: boolean, options: ConversionOptions, fit: FitContext, journal: Journal): Promise<void> {
  const sample = calibrated ? fit.clock.timeNow('read', () => loadSample(journal.path(captureName(layer)))) : null;
  const { tensors, record } = await reparameteriseLayer(source, weights, layer, sample, { ...options, fit });
  fit.clock.timeNow('store', () => writeSafetensors(journal.path(`${layerName(layer)}.safetensors`), tensors));
  journal.writeJson(`${layerName(layer)}.json`, record);
  rmSync(journal.path(captureName(layer)), { force: true });
}

/** New tensors of one layer, and what the manifest says of them. */
export async function reparameteriseLayer(
  source: Checkpoint,
  weights: Weights,
  layer: number,
  sample: LayerSample | null,
  { method, groups, seed, output, fit }: Pick<ConversionOptions, 'method' | 'groups' | 'seed' | 'output'> & { fit: FitContext },
): Promise<{ tensors: StoredTensor[]; record: LayerRecord }> {
  const { target, clock } = fit;
  const published = clock.timeNow('read', () => readSourceLayer(source, weights, layer));
  const input = { shape: layerShape(source), weights: clock.timeNow('read', () => fitWeights(source, weights, layer, published)), sample };
  const design = await designLayer(input, method, { groups, seed: seed + layer, target, clock, statistics: fit.statistics?.[layer] });
  const tensors = await clock.time('store', () => layerTensors(source, layer, published, design, { transform: hasTransform(method), output, target }));
  const hash = createHash('sha256');
  for (const { name, dtype, shape, data } of tensors) hash.update(`${name} ${dtype} ${shape.join('x')}\n`).update(data);
  return { tensors, record: recordOf(layer, design, hash.digest('hex'), fit) };
}

function recordOf(layer: number, { basisKind, queries, descended, shares, normScale, error }: LayerDesign, hash: string, { deviceName }: FitContext): LayerRecord {
  return { layer, hash, basis: basisKind, queries, descended, variance_shares: shares, norm_scale: normScale, output_error: error, fitted_on: deviceName };
}

export function fingerprintOf({ groups, method }: Pick<ConversionOptions, 'groups' | 'method'>, layers: LayerRecord[]): string {
  const hash = createHash('sha256').update(`tpla 1 groups ${groups} shared ${method.shared} norm ${method.norm}\n`);
  for (const layer of layers) hash.update(`${layer.hash} ${layer.norm_scale?.join(',') ?? ''}\n`);
  return hash.digest('hex').slice(0, 32);
}

// ---------------------------------------------------------------- output

function writeShards(source: Checkpoint, journal: Journal, progress: Progress): number {
  const plans = planShards(source, Array.from({ length: source.spec.layers }, (_, layer) => readSafetensors(journal.path(`${layerName(layer)}.safetensors`))));
  const total = plans.reduce((sum, plan) => sum + planBytes(plan), 0);
  progress.start('write shards', total, 'bytes');
  for (const plan of plans) {
    if (isWritten(plan, journal.dir)) progress.advance(planBytes(plan));
    else writeShard(plan, journal.dir, (bytes) => progress.advance(bytes));
  }
  if (plans.length > 1 || plans[0]!.file !== 'model.safetensors') {
    const weightMap = Object.fromEntries(plans.flatMap(({ file, parts }) => parts.map(({ header }) => [header.name, file])));
    journal.writeText('model.safetensors.index.json', `${JSON.stringify({ metadata: { total_size: total }, weight_map: weightMap }, null, 2)}\n`);
  }
  progress.finish();
  return total;
}

/** The rest of the directory; config.json last, since it is what makes a directory load. */
function finish(source: Checkpoint, journal: Journal, { fingerprint, layers, text, options }: { fingerprint: string; layers: LayerRecord[]; text: CalibrationText | null; options: ConversionOptions }): void {
  const { method, groups } = options;
  for (const entry of readdirSync(source.dir, { withFileTypes: true })) {
    if (!entry.isFile() || entry.name === 'config.json' || /\.safetensors(\.index\.json)?$/.test(entry.name)) continue;
    attemptWrite(join(journal.dir, entry.name), () => copyFileSync(join(source.dir, entry.name), join(journal.dir, entry.name)));
  }
  writeManifest(journal, { source, text, fingerprint, layers, method, methodName: options.methodName, groups, calibration: options.calibration });
  const config = { ...source.config, tpla: tplaSection(options, layers, fingerprint) };
  journal.writeText('config.json', `${JSON.stringify(config, null, 2)}\n`);
  journal.close();
}

/** The `tpla` section of config.json. */
export function tplaSection({ groups, method }: Pick<ConversionOptions, 'groups' | 'method'>, layers: LayerRecord[], fingerprint: string): object {
  return {
    groups, shared: method.shared, norm: method.norm, transform: hasTransform(method), rank_weights: hasRankWeights(method),
    ...(method.norm === 'sliced' ? { norm_scale: layers.map(({ norm_scale }) => norm_scale) } : {}),
    fingerprint,
  };
}
