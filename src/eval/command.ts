import { readFileSync } from 'node:fs';
import { TplaError } from '../errors.js';
import { loadCheckpoint, type Checkpoint } from '../model/checkpoint.js';
import { Tokenizer } from '../model/tokenizer.js';
import type { KvDType, KvForm } from '../native/types.js';
import { consoleProgress, SILENT } from '../report/progress.js';
import { evaluate, type Evaluation } from './evaluate.js';
import { textWindows } from './windows.js';

export interface TextEvaluationOptions {
  model: string;
  text: string;
  reference?: string;
  phase: 'prefill' | 'decode';
  attention?: KvForm;
  ranks?: number;
  /** Tokens per window; default 1024 or what the model takes. */
  context?: number;
  /** Default half of it. */
  prefix?: number;
  tokens: number;
  seed: number;
  dtype: KvDType;
  threads: number;
  quiet: boolean;
}

export interface TextEvaluation extends Evaluation {
  model: string;
  text: string;
  kv_dtype: KvDType;
  context: number;
  prefix: number;
  seed: number;
  seconds: number;
}

/** What `tpla eval` does, flags resolved. */
export async function evaluateText(options: TextEvaluationOptions): Promise<TextEvaluation> {
  const started = performance.now();
  const checkpoint = loadCheckpoint(options.model);
  const reference = options.reference === undefined ? undefined : loadReference(options.reference, checkpoint);
  const { form, ranks } = chooseForm(checkpoint, options);
  const { context, prefix } = chooseWindow(checkpoint, options);
  const tokenizer = Tokenizer.load(checkpoint.dir);
  const windows = await textWindows(tokenizer, readFileSync(options.text, 'utf8'), { context, prefix, scored: options.tokens, seed: options.seed });
  const progress = options.quiet ? SILENT : consoleProgress();
  progress.start('windows', windows.length);
  let done = 0;
  const result = await evaluate(checkpoint, tokenizer, windows, {
    phase: options.phase, form, ranks, dtype: options.dtype, threads: options.threads, reference,
    onProgress: (count) => {
      progress.advance(count - done);
      done = count;
    },
  });
  progress.finish();
  return {
    ...result, model: options.model, text: options.text, kv_dtype: options.dtype, context, prefix, seed: options.seed,
    seconds: (performance.now() - started) / 1000,
  };
}

function loadReference(dir: string, checkpoint: Checkpoint): Checkpoint {
  const reference = loadCheckpoint(dir);
  if (reference.spec.vocabSize !== checkpoint.spec.vocabSize) {
    throw new TplaError('USAGE', `${dir} has a vocabulary of ${reference.spec.vocabSize}, ${checkpoint.dir} one of ${checkpoint.spec.vocabSize}; KL needs the same`);
  }
  return reference;
}

function chooseForm({ spec }: Checkpoint, options: TextEvaluationOptions): { form: KvForm; ranks: number } {
  const form = options.attention ?? (spec.tpla === null ? 'mla' : 'tpla');
  const usual = form === 'tpla' && spec.tpla !== null ? spec.tpla.groups : form === 'mla' ? 1 : 2;
  return { form, ranks: options.ranks ?? usual };
}

const USUAL_CONTEXT = 1024;

function chooseWindow({ spec, dir }: Checkpoint, options: TextEvaluationOptions): { context: number; prefix: number } {
  const context = options.context ?? Math.min(USUAL_CONTEXT, spec.contextLength);
  const prefix = options.prefix ?? Math.floor(context / 2);
  if (context > spec.contextLength) throw new TplaError('USAGE', `--context ${context} is longer than the ${spec.contextLength} tokens of ${dir}`);
  if (prefix >= context) throw new TplaError('USAGE', `--prefix ${prefix} leaves nothing to score of a window of ${context} tokens`);
  return { context, prefix };
}
