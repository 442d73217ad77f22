import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { Args, Flags, type Interfaces } from '@oclif/core';
import { BaseCommand } from '../cli/base_command.js';
import { TplaError } from '../errors.js';
import { loadModelConfig } from '../model/config.js';
import type { KvDType } from '../native/types.js';
import { MOST_TOKENS, QUERY_BYTES, SAMPLE_BYTES, type CalibrationOptions } from '../reparam/calibration.js';
import { convert, type ConversionOptions, type ConversionResult } from '../reparam/convert.js';
import { DEVICES, type Device } from '../reparam/device.js';
import type { OutputDType } from '../reparam/layer_tensors.js';
import { METHODS, type Method } from '../reparam/method.js';
import { candidateWidths, type WidthBudget } from '../reparam/width_choice.js';
import { report, type Report, type ReportOptions } from '../reparam/report.js';
import { printReport } from '../reparam/report_table.js';
import { consoleProgress, SILENT } from '../report/progress.js';
import { facts } from '../report/table.js';

export default class Reparam extends BaseCommand {
  static override summary = 'Reparameterise a checkpoint for TPLA decode';
  static override description = `Writes a checkpoint whose latent is ordered so that each of --groups decode ranks reads a slice of it. Prefill of the result is exactly the
model that went in; decode with attention form tpla is an approximation, whose cost \`tpla eval\` measures.

Layers are fitted one at a time and shards copied in pieces, so that memory stays at a few layers whatever the size of the checkpoint. A
conversion that was interrupted goes on where it stopped when the same command is given again.

--method names a combination; the other flags change parts of it.`;
  static override examples = [
    '<%= config.bin %> <%= command.id %> models/demo models/demo-tpla',
    '<%= config.bin %> <%= command.id %> DeepSeek-V3 DeepSeek-V3-tpla --groups 2 --shared 64 --calibration text.txt',
    '<%= config.bin %> <%= command.id %> DeepSeek-V3 DeepSeek-V3-tpla --budget-bytes-per-token 42944 --calibration text.txt',
    '<%= config.bin %> <%= command.id %> models/demo /tmp/pca --method pca --scale fitted --json',
    '<%= config.bin %> <%= command.id %> models/demo --report --picture tpla.svg',
  ];
  static override enableJsonFlag = true;

  static override args = {
    model: Args.string({ description: 'checkpoint directory to read', required: true }),
    out: Args.string({ description: 'checkpoint directory to write; must not exist or be empty, or hold the same conversion unfinished' }),
  };
  static override flags = {
    out: Flags.string({ description: 'the same as OUT' }),
    method: Flags.string({ options: Object.keys(METHODS), default: 'default', description: 'combination to start from' }),
    groups: Flags.integer({ default: 2, min: 1, description: 'ranks that share the latent', aliases: ['ranks'] }),
    shared: Flags.string({ description: 'latent directions replicated on every rank: a number, or one for each layer (N,N,…); the whole latent leaves a layer exact' }),
    basis: Flags.string({ options: ['identity', 'hadamard', 'pca', 'aware', 'aware-oblique', 'best'], description: 'change of basis; aware looks at queries and outputs too, best chooses basis and queries per layer by measured error' }),
    scale: Flags.string({ options: ['none', 'printed', 'reciprocal', 'fitted', 'head'], description: 'factor on a rank\'s logits, or on its norm with --norm sliced' }),
    queries: Flags.string({ options: ['sliced', 'regressed'], description: 'cut W_UK, or regress the whole logit on a rank\'s columns' }),
    values: Flags.string({ options: ['sliced', 'ridge'], description: 'cut W_UV, or regress the exact head output on the ranks\' outputs' }),
    refine: Flags.integer({ min: 0, description: 'steps of descent on each layer\'s output error' }),
    'budget-bytes-per-token': Flags.integer({ min: 1, exclusive: ['shared'], description: 'bytes of bf16 cache per token and rank, all layers: chooses a shared width for each layer by what decode loses, and the basis and queries that measure best' }),
    'shared-widths': Flags.string({ dependsOn: ['budget-bytes-per-token'], description: 'widths that a budget may choose from (N,N,…); default those whose rows have GPU kernels, for other shapes multiples of 16' }),
    norm: Flags.string({ options: ['exact', 'sliced'], description: 'RMSNorm over the whole latent, or each rank\'s estimate from its slice as published' }),
    calibration: Flags.string({ description: 'UTF-8 text to fit on; default calibration.txt of the checkpoint' }),
    'calibration-tokens': Flags.integer({ min: 64, description: `tokens of it that are used; default ${MOST_TOKENS}, fewer where a layer's queries would take more than ${QUERY_BYTES / 1e9} GB` }),
    'calibration-context': Flags.integer({ default: 512, min: 16, description: 'tokens per calibration sequence' }),
    'calibration-queries': Flags.integer({ min: 1, description: `queries sampled per sequence; default all, fewer where a layer's would take more than ${SAMPLE_BYTES / 1e9} GB` }),
    'output-dtype': Flags.string({ options: ['auto', 'f32', 'bf16', 'fp8'], default: 'auto', description: 'format of changed matrices; auto keeps theirs, bf16 in place of fp8' }),
    seed: Flags.integer({ default: 1, min: 0, description: 'of the Hadamard signs, the sampling and the descent' }),
    device: Flags.string({ options: [...DEVICES], default: 'auto', description: 'what fits layers: the first GPU that can be used, or the CPU; the same result within rounding' }),
    threads: Flags.integer({ default: 0, min: 0, description: 'compute threads; 0 for all cores' }),
    report: Flags.boolean({ helpGroup: 'REPORT', description: 'write no checkpoint: measure every method through the decode path, beside mla and dcp' }),
    only: Flags.string({ helpGroup: 'REPORT', multiple: true, description: 'report only methods whose name contains this; repeatable' }),
    text: Flags.string({ helpGroup: 'REPORT', description: 'UTF-8 text to score; default heldout.txt of the checkpoint' }),
    recall: Flags.string({ helpGroup: 'REPORT', description: 'recall prompts as JSON lines; default recall.jsonl of the checkpoint, else facts are planted into the text' }),
    'recall-prompts': Flags.integer({ helpGroup: 'REPORT', default: 100, min: 0, description: 'how many of them; 0 leaves recall out' }),
    context: Flags.integer({ helpGroup: 'REPORT', default: 1024, min: 8, description: 'tokens per window; the first half is prefilled, the rest decoded' }),
    tokens: Flags.integer({ helpGroup: 'REPORT', default: 4096, min: 1, description: 'scored tokens per method' }),
    'kv-dtype': Flags.string({ helpGroup: 'REPORT', options: ['f32', 'bf16', 'fp8'], default: 'bf16', description: 'what caches hold' }),
    picture: Flags.string({ helpGroup: 'REPORT', description: 'SVG of KL against bytes to write' }),
  };

  async run(): Promise<ConversionResult | Report> {
    const { args, flags } = await this.parse(Reparam);
    const request: Request = { ...flags, model: args.model, out: args.out ?? flags.out };
    const progress = this.jsonEnabled() ? SILENT : consoleProgress();
    if (flags.report) {
      const found = await report(reportOptions(request), progress);
      this.log(printReport(found));
      return found;
    }
    const result = await convert(conversionOptions(request), progress);
    this.log(printConversion(result));
    return result;
  }
}

type Request = Interfaces.InferredFlags<typeof Reparam.flags> & { model: string; out: string | undefined };

function conversionOptions(request: Request): ConversionOptions {
  if (request.out === undefined) throw new TplaError('USAGE', 'name the output directory: tpla reparam MODEL OUT');
  return {
    model: request.model, out: request.out, methodName: request.method, method: methodOf(request), widths: widthsOf(request), groups: request.groups, calibration: calibrationOf(request),
    output: request['output-dtype'] as OutputDType, seed: request.seed, device: request.device as Device, threads: request.threads,
  };
}

/** The named combination with the parts that flags change. */
function methodOf(request: Request): Method {
  const base = METHODS[request.method]!;
  const budget = request['budget-bytes-per-token'];
  return {
    ...base,
    shared: request.shared === undefined ? base.shared : numbersOf('shared', request.shared)[0]!,
    basis: (request.basis ?? (budget === undefined ? base.basis : 'best')) as Method['basis'],
    scale: (request.scale ?? base.scale) as Method['scale'],
    queries: (request.queries ?? base.queries) as Method['queries'],
    values: (request.values ?? base.values) as Method['values'],
    refine: request.refine ?? base.refine,
    norm: (request.norm ?? base.norm) as Method['norm'],
  };
}

/** Widths that differ between layers, given or to be chosen; null where there is one. */
function widthsOf(request: Request): ConversionOptions['widths'] {
  const bytesPerToken = request['budget-bytes-per-token'];
  if (bytesPerToken === undefined) {
    const byLayer = numbersOf('shared', request.shared ?? '0');
    return byLayer.length === 1 ? null : { byLayer };
  }
  const chosen = request['shared-widths'];
  const candidates = chosen === undefined ? candidateWidths({ groups: request.groups, ...loadModelConfig(request.model).spec }) : numbersOf('shared-widths', chosen).sort((a, b) => a - b);
  return { budget: { bytesPerToken, candidates } satisfies WidthBudget };
}

function numbersOf(flag: string, text: string): number[] {
  if (!/^\d+(,\d+)*$/.test(text)) throw new TplaError('USAGE', `--${flag} is "${text}"; expected whole numbers, separated by commas`);
  return text.split(',').map(Number);
}

function reportOptions(request: Request): ReportOptions {
  const calibration = calibrationOf(request);
  const text = request.text ?? ownFile(request.model, 'heldout.txt');
  if (calibration === null) throw new TplaError('USAGE', `${request.model} has no calibration.txt; name a text with --calibration FILE`);
  if (text === null) throw new TplaError('USAGE', `${request.model} has no heldout.txt; name a text with --text FILE`);
  if (!existsSync(text)) throw new TplaError('USAGE', `text ${text}: no such file`);
  return {
    model: request.model, groups: request.groups, only: request.only ?? [], calibration, text, recall: request.recall ?? ownFile(request.model, 'recall.jsonl'),
    recallPrompts: request['recall-prompts'], context: request.context, tokens: request.tokens, seed: request.seed, dtype: request['kv-dtype'] as KvDType, device: request.device as Device, threads: request.threads,
    picture: request.picture ?? null,
  };
}

function calibrationOf(request: Request): CalibrationOptions | null {
  const file = request.calibration ?? ownFile(request.model, 'calibration.txt');
  if (file === null) return null;
  return { file, context: request['calibration-context'], tokens: request['calibration-tokens'] ?? null, queries: request['calibration-queries'] ?? null, seed: request.seed };
}

function ownFile(model: string, name: string): string | null {
  return existsSync(join(model, name)) ? join(model, name) : null;
}

function printConversion(result: ConversionResult): string {
  const errors = result.layers.map(({ output_error }) => output_error).filter((error): error is number => error !== null);
  return facts([
    ['written', `${result.out} (${(result.bytes_written / 1e9).toFixed(3)} GB)${result.resumed ? ', resumed' : ''}`],
    ['method', `${result.method}, ${result.groups} groups, ${typeof result.shared === 'number' ? result.shared : result.shared.join(', ')} shared`],
    ...(result.width_choice === null ? [] : [['KL of closed forms, against one width', `${result.width_choice.kl.chosen.toFixed(5)}, with ${result.width_choice.uniform} everywhere ${result.width_choice.kl.uniform.toFixed(5)}`] as [string, string]]),
    ['KV values per token, layer and rank', Number(result.kv_values_per_token_per_rank.toFixed(1))],
    ['KV bytes per token and rank, bf16', result.kv_bytes_per_token_per_rank],
    ...(errors.length > 0 ? [['attention output error, mean over layers', `${((100 * errors.reduce((a, b) => a + b, 0)) / errors.length).toFixed(2)} %`] as [string, string]] : []),
    ['fingerprint', result.fingerprint],
    ['peak memory', `${(result.peak_rss_bytes / 1e9).toFixed(2)} GB`],
    ['fitted on', result.device_name],
    ['time', `${result.seconds.toFixed(1)} s: ${Object.entries(result.stage_seconds).filter(([, seconds]) => seconds >= 0.05).map(([stage, seconds]) => `${stage} ${seconds.toFixed(1)}`).join(', ')}`],
  ]);
}
