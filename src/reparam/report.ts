import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { evaluate, evaluateRecall, type EvaluationOptions } from '../eval/evaluate.js';
import { plantFacts, readRecallFile, type RecallPrompt } from '../eval/recall.js';
import { textWindows, type Window } from '../eval/windows.js';
import { TplaError } from '../errors.js';
import { loadCheckpoint, type Checkpoint } from '../model/checkpoint.js';
import { Tokenizer } from '../model/tokenizer.js';
import { native } from '../native/loader.js';
import { sharedWidths, type SharedWidths } from '../model/shared_widths.js';
import type { LayerSample } from '../native/reparam.js';
import type { KvDType, KvForm, Weights } from '../native/types.js';
import type { Progress } from '../report/progress.js';
import { scatter } from '../report/scatter.js';
import { captureLayers, loadSample, readCalibrationText, type CalibrationOptions, type CalibrationText } from './calibration.js';
import { fitTarget, type Device } from './device.js';
import { heldOut } from './layer.js';
import type { LayerRecord } from './manifest.js';
import { METHODS, needsCalibration, rankWidth, validateMethod, type Method } from './method.js';
import { Overlay } from './overlay.js';
import { fingerprintOf, reparameteriseLayer, tplaSection, type FitContext } from './reparameterise.js';
import { StageClock } from './stages.js';
import { candidateWidths, widthBytes } from './width_choice.js';
import { closedForms, WidthSearch } from './width_search.js';

export interface ReportOptions {
  model: string;
  groups: number;
  /** Only entries whose name contains one of these; empty for all. */
  only: string[];
  calibration: CalibrationOptions;
  text: string;
  /** Prompts as JSON lines; null plants facts into the text. */
  recall: string | null;
  recallPrompts: number;
  context: number;
  tokens: number;
  seed: number;
  dtype: KvDType;
  device: Device;
  threads: number;
  /** SVG to write; null for none. */
  picture: string | null;
}

export interface ReportRow {
  name: string;
  attention: KvForm;
  /** What decode leaves exact in this row; only `norm` rows gather logits before the softmax. */
  softmax: 'sliced' | 'exact';
  method: Method | null;
  /** Width of the shared subspace: of all layers, or of each; null without slices. */
  shared: SharedWidths | null;
  kv_bytes_per_token_per_rank: number;
  bits_per_byte: number;
  kl_vs_mla: number;
  top1_agreement: number;
  recall_accuracy: number | null;
  /** KL over that of PCA with its best single scale. */
  kl_vs_best_pca: number | null;
  /** Mean over layers of the attention output's relative squared error, on calibration text held out of the fit. */
  output_error: number | null;
}

export interface Report {
  model: string;
  groups: number;
  text: string;
  scored_tokens: number;
  recall_prompts: number;
  recall_cells: Record<string, { context: number; depth: number; prompts: number; correct: number }[]>;
  seed: number;
  kv_dtype: KvDType;
  calibration: { file: string; sha256: string; sequences: number; context: number };
  /** Bits per byte of exact prefill. */
  reference_bits_per_byte: number;
  best_pca: { name: string; kl_vs_mla: number } | null;
  rows: ReportRow[];
  picture: string | null;
}

interface Entry {
  name: string;
  method: Method;
  softmax?: 'exact';
  /** The method's shared width is the mean, in bytes: each layer's own is chosen. */
  byLayer?: true;
}

/** The published forms, each improvement alone, the honest baseline, and ours at several sizes of the shared subspace. */
export function reportEntries(latent: number, groups: number): Entry[] {
  const { pca, hadamard, identity } = METHODS as Record<string, Method> as { pca: Method; hadamard: Method; identity: Method };
  const ours = METHODS.default!;
  const closed: Method = { ...ours, refine: 0 };
  const means = [latent / 8, latent / 4, latent / 2].filter((shared) => Number.isInteger(shared) && (latent - shared) % groups === 0);
  return [
    { name: 'hadamard, norm only', method: { ...hadamard, norm: 'sliced', scale: 'reciprocal' }, softmax: 'exact' },
    { name: 'pca, norm only, α printed', method: { ...pca, norm: 'sliced', scale: 'printed' }, softmax: 'exact' },
    { name: 'pca, norm only, α reciprocal', method: { ...pca, norm: 'sliced', scale: 'reciprocal' }, softmax: 'exact' },
    { name: 'pca, norm and softmax sliced', method: { ...pca, norm: 'sliced', scale: 'reciprocal' } },
    { name: 'identity', method: identity },
    { name: 'hadamard', method: hadamard },
    { name: 'pca', method: pca },
    { name: 'pca, α printed', method: { ...pca, scale: 'printed' } },
    { name: 'pca, α reciprocal', method: { ...pca, scale: 'reciprocal' } },
    { name: 'pca, fitted scale', method: { ...pca, scale: 'fitted' } },
    { name: 'low rank (pca, rank 0 alone)', method: { ...pca, ranks: 'first' } },
    { name: 'pca + scale per head', method: { ...pca, scale: 'head' } },
    { name: 'pca + regressed logits', method: { ...pca, queries: 'regressed' } },
    { name: 'pca + ridge values', method: { ...pca, values: 'ridge' } },
    { name: 'pca + both', method: { ...pca, queries: 'regressed', values: 'ridge' } },
    { name: 'aware basis', method: { ...pca, basis: 'aware' } },
    { name: 'aware, oblique', method: { ...pca, basis: 'aware-oblique' } },
    { name: 'aware + both', method: closed },
    { name: 'default', method: ours },
    ...means.flatMap((shared): Entry[] => [
      { name: `pca, shared ${shared}`, method: { ...pca, shared } },
      { name: `aware + both, shared ${shared}`, method: { ...closed, shared } },
      { name: `default, shared ${shared}`, method: { ...ours, shared } },
    ]),
    ...means.flatMap((shared): Entry[] => [
      { name: `aware + both by layer, mean ${shared}`, method: { ...closed, shared }, byLayer: true },
      { name: `default by layer, mean ${shared}`, method: { ...ours, shared }, byLayer: true },
    ]),
  ];
}

const SINGLE_SCALE = ['pca', 'pca, α printed', 'pca, α reciprocal', 'pca, fitted scale'];

/** Measures every method through the decode path after exact prefill, beside plain MLA and DCP. */
export async function report(options: ReportOptions, progress: Progress): Promise<Report> {
  const source = loadCheckpoint(options.model);
  const { kvLoraRank, layers } = source.spec;
  if (source.spec.tpla !== null) throw new TplaError('USAGE', `${source.dir} is already reparameterised; --report starts from the published checkpoint`);
  if (options.calibration.file === options.text) throw new TplaError('USAGE', `${options.text} is both calibration and evaluation text; they must not overlap`);
  const target = fitTarget(options.device, options.threads);
  const fit: FitContext = { target, deviceName: native().reparamDevice(target), clock: new StageClock(), statistics: Array.from({ length: layers }, () => ({ known: null })) };
  const entries = reportEntries(kvLoraRank, options.groups).filter(({ name }) => options.only.length === 0 || options.only.some((word) => name.includes(word)));
  for (const { method } of entries) validateMethod(method, { groups: options.groups, kvLoraRank });
  const tokenizer = Tokenizer.load(source.dir);
  const widest = Math.max(...entries.map(({ method }) => rankWidth(method, { groups: options.groups, kvLoraRank })), kvLoraRank / options.groups);
  const calibration = await readCalibrationText(tokenizer, source.spec, options.calibration, widest * options.groups);
  const body = readFileSync(options.text, 'utf8');
  refuseOverlap(body, readFileSync(options.calibration.file, 'utf8'), options);
  const context = Math.min(options.context, source.spec.contextLength);
  const windows = await textWindows(tokenizer, body, { context, prefix: Math.floor(context / 2), scored: options.tokens, seed: options.seed });
  const prompts = await recallPrompts(source, tokenizer, body, options);

  const work = mkdtempSync(join(tmpdir(), 'tpla-report-'));
  const weights = new (native().Weights)(source.files, source.tensors);
  try {
    const capture = (layer: number) => join(work, `capture-${layer}.safetensors`);
    progress.start('calibrate', layers);
    await captureLayers(source, calibration, { seed: options.calibration.seed, threads: options.threads, isWanted: () => true, pathOf: capture, onLayer: () => progress.advance(1) });
    progress.finish();
    const chosen = await chosenWidths(source, tokenizer, weights, entries, calibration, (layer) => loadSample(capture(layer)), work, options, fit, progress);
    progress.start('methods', entries.length + 2);
    const rows: ReportRow[] = [];
    const cells: Report['recall_cells'] = {};
    for (const form of ['mla', 'dcp'] as const) {
      rows.push(await measure({ name: form, attention: form, softmax: 'exact', method: null, shared: null, output_error: null }, source, source, cells, { tokenizer, windows, prompts, options }));
      progress.advance(1);
    }
    for (const entry of entries) {
      const overlay = new Overlay(source, join(work, 'model'));
      const records: LayerRecord[] = [];
      const widths = chosen.get(entry) ?? new Array<number>(layers).fill(entry.method.shared);
      const made = { groups: options.groups, method: entry.method, widths };
      for (let layer = 0; layer < layers; layer++) {
        const sample = needsCalibration(entry.method) ? loadSample(capture(layer)) : null;
        const { tensors, record } = await reparameteriseLayer(source, weights, layer, sample, { method: { ...entry.method, shared: widths[layer]! }, groups: options.groups, seed: options.seed, output: 'auto', fit });
        overlay.addLayer(layer, tensors);
        records.push(record);
      }
      overlay.finish(tplaSection(made, records, fingerprintOf(made, records)));
      const errors = records.flatMap(({ output_error }) => (output_error === null ? [] : [output_error]));
      const outputError = errors.length === 0 ? null : errors.reduce((a, b) => a + b, 0) / errors.length;
      const row = { name: entry.name, attention: 'tpla' as const, softmax: entry.softmax ?? ('sliced' as const), method: entry.method, shared: sharedWidths(widths), output_error: outputError };
      rows.push(await measure(row, loadCheckpoint(overlay.dir), source, cells, { tokenizer, windows, prompts, options }));
      rmSync(overlay.dir, { recursive: true });
      progress.advance(1);
    }
    progress.finish();
    const scored = windows.reduce((sum, { tokens, prefix }) => sum + tokens.length - prefix - 1, 0);
    return summarise(source, rows, cells, { calibration, prompts, options, scored });
  } finally {
    weights.close();
    rmSync(work, { recursive: true, force: true });
  }
}

/** For entries whose layers differ: the widths that lose least at the bytes of their mean. */
async function chosenWidths(
  source: Checkpoint, tokenizer: Tokenizer, weights: Weights, entries: Entry[], calibration: CalibrationText, sampleOf: (layer: number) => LayerSample, directory: string,
  { groups, seed, threads }: ReportOptions, fit: FitContext, progress: Progress,
): Promise<Map<Entry, number[]>> {
  const wanted = entries.filter(({ byLayer }) => byLayer);
  const chosen = new Map<Entry, number[]>();
  if (wanted.length === 0) return chosen;
  const shape = { ...source.spec, groups };
  const search = new WidthSearch({
    source, tokenizer, shape, directory, threads, sequences: heldOut(calibration.sequences),
    ...closedForms(source, weights, { method: wanted[0]!.method, groups, seed, fit }, sampleOf),
  });
  const losses = await search.losses(candidateWidths(shape), progress);
  const byMean = new Map<number, number[]>();
  for (const entry of wanted) {
    const { shared } = entry.method;
    if (!byMean.has(shared)) byMean.set(shared, (await search.choose(losses, widthBytes(new Array<number>(shape.layers).fill(shared), shape))).shared);
    chosen.set(entry, byMean.get(shared)!);
  }
  return chosen;
}

interface Material {
  tokenizer: Tokenizer;
  windows: Window[];
  prompts: RecallPrompt[];
  options: ReportOptions;
}

async function measure(
  row: Pick<ReportRow, 'name' | 'attention' | 'softmax' | 'method' | 'shared' | 'output_error'>,
  checkpoint: Checkpoint,
  reference: Checkpoint,
  cells: Report['recall_cells'],
  { tokenizer, windows, prompts, options }: Material,
): Promise<ReportRow> {
  const how: Omit<EvaluationOptions, 'phase'> = {
    form: row.attention, ranks: options.groups, dtype: options.dtype, threads: options.threads, exactSoftmax: row.attention === 'tpla' && row.softmax === 'exact',
  };
  const result = await evaluate(checkpoint, tokenizer, windows, { ...how, phase: 'decode', reference: checkpoint === reference ? undefined : reference });
  const recall = prompts.length === 0 ? null : await evaluateRecall(checkpoint, prompts, how);
  if (recall !== null) cells[row.name] = recall.cells;
  return {
    ...row, kv_bytes_per_token_per_rank: result.kv_bytes_per_token_per_rank, bits_per_byte: result.bits_per_byte, kl_vs_mla: result.kl_vs_mla,
    top1_agreement: result.top1_agreement, recall_accuracy: recall?.accuracy ?? null, kl_vs_best_pca: null,
  };
}

async function recallPrompts(source: Checkpoint, tokenizer: Tokenizer, text: string, options: ReportOptions): Promise<RecallPrompt[]> {
  if (options.recallPrompts === 0) return [];
  if (options.recall !== null) return (await readRecallFile(tokenizer, options.recall)).slice(0, options.recallPrompts);
  const contexts = [512, 1024, 2048].filter((context) => context <= source.spec.contextLength - 64);
  const depths = [0.1, 0.3, 0.5, 0.7, 0.9];
  const perCell = Math.max(1, Math.ceil(options.recallPrompts / (contexts.length * depths.length)));
  return plantFacts(tokenizer, text, { contexts, depths, perCell, seed: options.seed });
}

/** Part of the evaluation text's lines that calibration may share (headings, licences). */
const SHARED_LINES = 0.1;

function refuseOverlap(text: string, calibration: string, { text: textFile, calibration: { file } }: ReportOptions): void {
  const long = (body: string) => body.split('\n').map((line) => line.trim()).filter((line) => line.length >= 40);
  const known = new Set(long(calibration));
  const lines = long(text);
  const common = lines.filter((line) => known.has(line)).length;
  if (lines.length > 0 && common / lines.length > SHARED_LINES) {
    throw new TplaError('USAGE', `${textFile} and ${file} overlap: ${common} of ${lines.length} lines of the evaluation text are in the calibration text; a method would be judged on what it was fitted to`);
  }
}

function summarise(source: Checkpoint, rows: ReportRow[], cells: Report['recall_cells'], { calibration, prompts, options, scored }: { calibration: { hash: string; sequences: Int32Array[]; file: string }; prompts: RecallPrompt[]; options: ReportOptions; scored: number }): Report {
  const singles = rows.filter(({ name }) => SINGLE_SCALE.includes(name)).sort((a, b) => a.kl_vs_mla - b.kl_vs_mla);
  const best = singles[0] ?? null;
  const ratioed = rows.map((row) => ({ ...row, kl_vs_best_pca: best === null ? null : row.kl_vs_mla / best.kl_vs_mla }));
  const picture = options.picture;
  if (picture !== null) writeFileSync(picture, drawReport(ratioed, source.identity.name, options.groups));
  const mla = rows.find(({ name }) => name === 'mla')!;
  return {
    model: options.model, groups: options.groups, text: options.text, scored_tokens: scored, recall_prompts: prompts.length, recall_cells: cells, seed: options.seed, kv_dtype: options.dtype,
    calibration: { file: calibration.file, sha256: calibration.hash, sequences: calibration.sequences.length, context: options.calibration.context },
    reference_bits_per_byte: mla.bits_per_byte, best_pca: best === null ? null : { name: best.name, kl_vs_mla: best.kl_vs_mla }, rows: ratioed, picture,
  };
}

function drawReport(rows: ReportRow[], model: string, groups: number): string {
  const seriesOf = ({ name, method, softmax }: ReportRow) => {
    if (method === null) return name;
    if (softmax === 'exact') return 'norm only';
    for (const series of ['default by layer', 'default', 'aware + both by layer', 'aware + both']) if (name.startsWith(series)) return series;
    if (name.startsWith('pca, shared') || name === 'pca') return 'pca';
    return name.startsWith('low rank') ? 'low rank' : 'others';
  };
  return scatter(
    rows.filter(({ kl_vs_mla }) => kl_vs_mla > 0).map((row) => ({ x: row.kv_bytes_per_token_per_rank, y: row.kl_vs_mla, label: row.name, series: seriesOf(row) })),
    { title: `${model}: what decode loses, ${groups} ranks`, xLabel: 'KV bytes per token and rank, all layers', yLabel: 'KL to exact MLA, nats per token', lines: ['default by layer', 'default', 'aware + both by layer', 'aware + both', 'pca'] },
  );
}
