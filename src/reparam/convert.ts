import { copyFileSync, readdirSync, rmSync, statSync, statfsSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { TplaError } from '../errors.js';
import { loadCheckpoint, type Checkpoint } from '../model/checkpoint.js';
import { readSafetensors } from '../model/safetensors.js';
import { rankColumns, sharedWidths, type SharedWidths } from '../model/shared_widths.js';
import { attemptWrite, writeSafetensors } from '../model/safetensors_writer.js';
import type { ModelSpec } from '../model/spec.js';
import { Tokenizer } from '../model/tokenizer.js';
import { native } from '../native/loader.js';
import type { FitTarget } from '../native/reparam.js';
import type { Weights } from '../native/types.js';
import { captureLayers, loadSample, readCalibrationText, sampleBytes, type CalibrationOptions, type CalibrationText } from './calibration.js';
import { fitTarget, type Device } from './device.js';
import { Journal } from './journal.js';
import { heldOut } from './layer.js';
import type { OutputDType } from './layer_tensors.js';
import { writeManifest, type LayerRecord } from './manifest.js';
import { needsCalibration, validateMethod, type Method } from './method.js';
import type { Progress } from '../report/progress.js';
import { StageClock, type Stage } from './stages.js';
import { fingerprintOf, reparameteriseLayer, tplaSection, type FitContext, type LayerOptions } from './reparameterise.js';
import { isWritten, planBytes, planShards, writeShard } from './shards.js';
import { checkCandidates, uniformWidth, widthBytes, type WidthBudget, type WidthChoice, type WidthShape } from './width_choice.js';
import { closedForms, WidthSearch } from './width_search.js';

export interface ConversionOptions {
  model: string;
  out: string;
  methodName: string;
  method: Method;
  /** Width of the shared subspace in each layer, or what they may cost; null for the method's own in all. */
  widths: { byLayer: number[] } | { budget: WidthBudget } | null;
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
  shared: SharedWidths;
  /** Where a budget chose the widths. */
  width_choice: WidthChoice | null;
  fingerprint: string;
  resumed: boolean;
  layers: LayerRecord[];
  bytes_written: number;
  /** Mean over layers. */
  kv_values_per_token_per_rank: number;
  /** All layers, bf16. */
  kv_bytes_per_token_per_rank: number;
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
  validateWidths(source, options);
  const target = fitTarget(options.device, options.threads);
  const fit: FitContext = { target, deviceName: native().reparamDevice(target), clock: new StageClock() };
  const text = needsCalibration(options.method) ? await calibrationText(source, options) : null;
  checkSpace(source, text, options);

  const { journal, resumed } = Journal.open(resolve(options.out), planOf(source, text, options));
  await capture(source, text, options, fit, journal, progress);
  const choice = await widthChoice(source, text, options, fit, journal, progress);
  const widths = choice?.shared ?? givenWidths(source, options)!;
  const layers = await convertLayers(source, text !== null, widths, options, fit, journal, progress);
  const fingerprint = fingerprintOf({ ...options, widths }, layers);
  const written = fit.clock.timeNow('shards', () => writeShards(source, journal, progress));
  finish(source, journal, { fingerprint, layers, text, options, widths, choice });
  const bytes = widthBytes(widths, { groups: options.groups, ...spec });
  return {
    out: journal.dir, method: options.methodName, groups: options.groups, shared: sharedWidths(widths), width_choice: choice, fingerprint, resumed, layers,
    bytes_written: written,
    kv_values_per_token_per_rank: bytes / 2 / spec.layers, kv_bytes_per_token_per_rank: bytes,
    peak_rss_bytes: process.resourceUsage().maxRSS * 1024, device: target.device, device_name: fit.deviceName,
    seconds: (performance.now() - started) / 1000, stage_seconds: fit.clock.seconds,
  };
}

async function calibrationText(source: Checkpoint, options: ConversionOptions): Promise<CalibrationText> {
  if (options.calibration === null) throw new TplaError('USAGE', `method ${options.methodName} is fitted on text; name one with --calibration FILE`);
  const { kvLoraRank } = source.spec;
  const sliced = possibleWidths(source, options).filter((shared) => shared < kvLoraRank);
  const columns = Math.max(kvLoraRank, ...sliced.map((shared) => rankColumns(kvLoraRank, shared, options.groups) * options.groups));
  return readCalibrationText(Tokenizer.load(source.dir), source.spec, options.calibration, columns);
}

/**
 * Everything that decides what is written; a directory holds the work of one plan only. The device is no part of it: it changes a fit
 * by rounding, so a conversion may be resumed on another. The fingerprint is that of the bytes that were written.
 */
function planOf(source: Checkpoint, text: CalibrationText | null, options: ConversionOptions): object {
  const { method, widths, groups, output, seed, calibration } = options;
  return {
    version: 1, source: source.identity.fingerprint, method, ...(widths === null ? {} : { widths }), groups, output, seed,
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
  const tried = options.widths !== null && 'budget' in options.widths ? options.widths.budget.candidates.reduce((sum, shared) => sum + fittedBytes(source.spec, shared, options.groups), 0) : 0;
  const needed = source.shards.reduce((sum, { bytes }) => sum + bytes, 0) * 1.05 + samples + tried - already;
  const free = stat.bavail * stat.bsize;
  if (free < needed) throw new TplaError('IO_FAILED', `${options.out}: the disk is full: about ${(needed / 1e9).toFixed(2)} GB are needed, ${(free / 1e9).toFixed(2)} GB are free`);
}

/** About what closed forms take on disk while widths are chosen, all layers, in bf16. */
function fittedBytes({ layers, heads, qkNopeHeadDim, vHeadDim, kvLoraRank }: ModelSpec, shared: number, groups: number): number {
  if (shared === kvLoraRank) return 0;
  return layers * (heads * (qkNopeHeadDim + vHeadDim) * (kvLoraRank + groups * rankColumns(kvLoraRank, shared, groups)) * 2 + kvLoraRank ** 2 * 4);
}

function directoryBytes(dir: string): number {
  try {
    return readdirSync(dir, { withFileTypes: true }).reduce((sum, entry) => sum + (entry.isDirectory() ? directoryBytes(join(dir, entry.name)) : statSync(join(dir, entry.name)).size), 0);
  } catch {
    return 0;
  }
}

// ---------------------------------------------------------------- widths of the shared subspace

const widthShape = ({ spec }: Checkpoint, { groups }: ConversionOptions): WidthShape => ({ ...spec, groups });

/** One a layer; null where a budget is to choose them. */
function givenWidths({ spec }: Checkpoint, { method, widths }: ConversionOptions): number[] | null {
  if (widths === null) return new Array<number>(spec.layers).fill(method.shared);
  return 'byLayer' in widths ? widths.byLayer : null;
}

function possibleWidths(source: Checkpoint, options: ConversionOptions): number[] {
  return givenWidths(source, options) ?? (options.widths as { budget: WidthBudget }).budget.candidates;
}

/** Throws USAGE. */
function validateWidths(source: Checkpoint, options: ConversionOptions): void {
  const { kvLoraRank, layers } = source.spec;
  const possible = possibleWidths(source, options);
  if (options.widths !== null) checkCandidates(possible, widthShape(source, options));
  const sliced = possible.filter((shared) => options.widths === null || shared < kvLoraRank);
  for (const shared of sliced.length > 0 ? new Set(sliced) : [kvLoraRank]) validateMethod({ ...options.method, shared }, { groups: options.groups, kvLoraRank });
  if (options.widths === null) return;
  if (options.method.norm === 'sliced') throw new TplaError('USAGE', 'a sliced norm takes no shared subspace, so that widths by layer are not possible; leave them out or use --norm exact');
  if ('budget' in options.widths) {
    uniformWidth(options.widths.budget, widthShape(source, options));
    if (!needsCalibration(options.method)) throw new TplaError('USAGE', `method ${options.methodName} looks at no text, and a budget's widths are chosen on calibration text; give widths with --shared`);
  } else if (possible.length !== layers) {
    throw new TplaError('USAGE', `--shared has ${possible.length} widths, the model ${layers} layers; give one number, or one for each layer`);
  }
}

// ---------------------------------------------------------------- layers

const layerName = (layer: number) => `layer-${String(layer).padStart(4, '0')}`;
const captureName = (layer: number) => `capture-${String(layer).padStart(4, '0')}.safetensors`;
const lossName = (layer: number, shared: number) => `width-${String(layer).padStart(4, '0')}-${shared}.json`;

/** Stores what attention of each layer sees of the calibration text, of layers that still need it. */
async function capture(source: Checkpoint, text: CalibrationText | null, options: ConversionOptions, fit: FitContext, journal: Journal, progress: Progress): Promise<void> {
  const { spec } = source;
  const given = givenWidths(source, options);
  const isWanted = (layer: number) => given?.[layer] !== spec.kvLoraRank && !journal.has(`${layerName(layer)}.json`) && !journal.has(captureName(layer));
  if (text === null || !Array.from({ length: spec.layers }, (_, layer) => layer).some(isWanted)) return;
  progress.start('calibrate', spec.layers);
  await fit.clock.time('capture', () => captureLayers(source, text, {
    seed: options.seed, threads: options.threads, isWanted, pathOf: (layer) => journal.path(captureName(layer)), onLayer: () => progress.advance(1),
  }));
  progress.finish();
}

/** The widths that a budget buys; null where none was given. */
async function widthChoice(source: Checkpoint, text: CalibrationText | null, options: ConversionOptions, fit: FitContext, journal: Journal, progress: Progress): Promise<WidthChoice | null> {
  if (options.widths === null || !('budget' in options.widths)) return null;
  const done = 'widths.json';
  if (journal.has(done)) return journal.readJson<WidthChoice>(done);
  const { budget } = options.widths;
  const weights = new (native().Weights)(source.files, source.tensors);
  try {
    const search = new WidthSearch({
      source, tokenizer: Tokenizer.load(source.dir), shape: widthShape(source, options), directory: journal.path(''), threads: options.threads,
      sequences: heldOut(text!.sequences),
      ...closedForms(source, weights, { ...options, fit }, (layer) => fit.clock.timeNow('read', () => loadSample(journal.path(captureName(layer))))),
    });
    const losses = await search.losses(budget.candidates, progress, {
      known: (layer, shared) => (journal.has(lossName(layer, shared)) ? journal.readJson<{ kl: number }>(lossName(layer, shared)).kl : null),
      keep: (layer, shared, kl) => journal.writeJson(lossName(layer, shared), { kl }),
    });
    const choice = await search.choose(losses, budget.bytesPerToken);
    journal.writeJson(done, choice);
    journal.remove(/^width-/);
    return choice;
  } finally {
    weights.close();
  }
}

async function convertLayers(source: Checkpoint, calibrated: boolean, widths: number[], options: ConversionOptions, fit: FitContext, journal: Journal, progress: Progress): Promise<LayerRecord[]> {
  const { spec } = source;
  const todo = Array.from({ length: spec.layers }, (_, layer) => layer).filter((layer) => !journal.has(`${layerName(layer)}.json`));
  progress.start('fit layers', spec.layers);
  progress.advance(spec.layers - todo.length);
  const weights = new (native().Weights)(source.files, source.tensors);
  try {
    for (const layer of todo) {
      const shared = widths[layer]!;
      await convertLayer(source, weights, layer, { ...options, method: { ...options.method, shared }, fit }, calibrated && shared < spec.kvLoraRank, journal);
      weights.release();
      progress.advance(1);
    }
  } finally {
    weights.close();
  }
  progress.finish();
  return Array.from({ length: spec.layers }, (_, layer) => journal.readJson<LayerRecord>(`${layerName(layer)}.json`));
}

async function convertLayer(source: Checkpoint, weights: Weights, layer: number, options: LayerOptions, calibrated: boolean, journal: Journal): Promise<void> {
  const { clock } = options.fit;
  const sample = calibrated ? clock.timeNow('read', () => loadSample(journal.path(captureName(layer)))) : null;
  const { tensors, record } = await reparameteriseLayer(source, weights, layer, sample, options);
  clock.timeNow('store', () => writeSafetensors(journal.path(`${layerName(layer)}.safetensors`), tensors));
  journal.writeJson(`${layerName(layer)}.json`, record);
  rmSync(journal.path(captureName(layer)), { force: true });
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

interface Made {
  fingerprint: string;
  layers: LayerRecord[];
  text: CalibrationText | null;
  options: ConversionOptions;
  widths: number[];
  choice: WidthChoice | null;
}

/** The rest of the directory; config.json last, since it is what makes a directory load. */
function finish(source: Checkpoint, journal: Journal, made: Made): void {
  const { options, layers, fingerprint } = made;
  for (const entry of readdirSync(source.dir, { withFileTypes: true })) {
    if (!entry.isFile() || entry.name === 'config.json' || /\.safetensors(\.index\.json)?$/.test(entry.name)) continue;
    attemptWrite(join(journal.dir, entry.name), () => copyFileSync(join(source.dir, entry.name), join(journal.dir, entry.name)));
  }
  writeManifest(journal, { source, ...options, ...made });
  const config = { ...source.config, tpla: tplaSection({ ...options, widths: made.widths }, layers, fingerprint) };
  journal.writeText('config.json', `${JSON.stringify(config, null, 2)}\n`);
  journal.close();
}
