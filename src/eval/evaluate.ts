import type { Checkpoint } from '../model/checkpoint.js';
import type { Tokenizer } from '../model/tokenizer.js';
import type { KvDType, KvForm } from '../native/types.js';
import { argmax, Score, type Summary } from './metrics.js';
import { Runner } from './runner.js';
import type { RecallPrompt } from './recall.js';
import type { Window } from './windows.js';

export interface EvaluationOptions {
  phase: 'prefill' | 'decode';
  form: KvForm;
  ranks: number;
  dtype: KvDType;
  threads: number;
  /** tpla: gather logits before the softmax, which leaves only the norm approximate. */
  exactSoftmax?: boolean;
  /** Whose prefill is exact MLA; default the checkpoint's own, which reparameterisation leaves exact. */
  reference?: Checkpoint;
  onProgress?: (done: number, total: number) => void;
}

export interface Evaluation extends Summary {
  phase: 'prefill' | 'decode';
  attention: KvForm;
  ranks: number;
  kv_bytes_per_token_per_rank: number;
}

/** Bytes of reference logits held at once. */
const LOGIT_BYTES = 256e6;

/**
 * Scores a model on windows of text. `decode` prefills each window's prefix exactly and then decodes its remaining tokens one by one,
 * fed with the text itself; `prefill` takes all logits from one exact prefill. Both are compared with exact MLA position by position.
 */
export async function evaluate(checkpoint: Checkpoint, tokenizer: Tokenizer, windows: Window[], options: EvaluationOptions): Promise<Evaluation> {
  const { form, ranks, dtype, threads } = options;
  const context = Math.max(...windows.map(({ tokens }) => tokens.length));
  const batch = Math.max(1, Math.min(16, windows.length, Math.floor(LOGIT_BYTES / (context * checkpoint.spec.vocabSize * 4))));
  const runner = new Runner(checkpoint, { form, ranks, dtype, threads, context, batch, exactSoftmax: options.exactSoftmax });
  const reference = options.reference ? new Runner(options.reference, { form: 'mla', ranks: 1, dtype, threads, context, batch }) : null;
  const score = new Score();
  try {
    for (let at = 0; at < windows.length; at += batch) {
      const group = windows.slice(at, at + batch);
      const sequences = group.map(({ tokens }) => tokens);
      const own = reference === null || options.phase === 'prefill' ? await runner.prefill(sequences, 'all') : null;
      const exact = reference === null ? own! : await reference.prefill(sequences, 'all');
      if (own === null) await runner.prefill(sequences, 'none');
      if (options.phase === 'prefill') scorePrefill(group, own!, exact, checkpoint.spec.vocabSize, tokenizer, score);
      else await scoreDecode(runner, group, exact, checkpoint.spec.vocabSize, tokenizer, score);
      options.onProgress?.(Math.min(at + batch, windows.length), windows.length);
    }
    return { ...score.summary(), phase: options.phase, attention: form, ranks, kv_bytes_per_token_per_rank: runner.bytesPerTokenPerRank };
  } finally {
    runner.close();
    reference?.close();
  }
}

function row(logits: Float32Array, index: number, vocab: number): Float32Array {
  return logits.subarray(index * vocab, (index + 1) * vocab);
}

function scorePrefill(windows: Window[], own: Float32Array[], exact: Float32Array[], vocab: number, tokenizer: Tokenizer, score: Score): void {
  windows.forEach(({ tokens, prefix }, i) => {
    for (let position = prefix; position + 1 < tokens.length; position++) {
      const next = tokens[position + 1]!;
      score.add(row(own[i]!, position, vocab), row(exact[i]!, position, vocab), next, tokenizer.tokenBytes(next).length);
    }
  });
}

/** Positions of one sequence that go into one decode call; each still attends through the decode kernels, to KV that decode wrote. */
const POSITIONS_PER_CALL = 16;

async function scoreDecode(runner: Runner, windows: Window[], exact: Float32Array[], vocab: number, tokenizer: Tokenizer, score: Score): Promise<void> {
  await decodeText(runner, windows, vocab, (slot, position, logits) => {
    const next = windows[slot]!.tokens[position + 1]!;
    score.add(logits, row(exact[slot]!, position, vocab), next, tokenizer.tokenBytes(next).length);
  });
}

/** Hands the prefilled prefixes over and decodes the rest of each sequence, fed with its own tokens; `onLogits` hears of every position but the last. */
async function decodeText(runner: Runner, sequences: { tokens: Int32Array; prefix: number }[], vocab: number, onLogits: (slot: number, position: number, logits: Float32Array) => void): Promise<void> {
  await runner.handOver(sequences.map(({ prefix }) => prefix));
  const longest = Math.max(...sequences.map(({ tokens, prefix }) => tokens.length - prefix));
  for (let from = 0; from + 1 < longest; from += POSITIONS_PER_CALL) {
    const items = sequences.flatMap(({ tokens, prefix }, slot) => {
      const begin = prefix + from;
      const end = Math.min(begin + POSITIONS_PER_CALL, tokens.length - 1);
      return Array.from({ length: Math.max(0, end - begin) }, (_, i) => ({ slot, token: tokens[begin + i]!, position: begin + i }));
    });
    const logits = await runner.step(items);
    items.forEach(({ slot, position }, i) => onLogits(slot, position, row(logits, i, vocab)));
  }
}

export interface RecallResult {
  prompts: number;
  correct: number;
  accuracy: number;
  cells: { context: number; depth: number; prompts: number; correct: number }[];
}

/**
 * How many planted values come back word for word under greedy decoding: the text is prefilled exactly, the question and the answer
 * are decoded, and every token of the value must be the most likely one.
 */
export async function evaluateRecall(checkpoint: Checkpoint, prompts: RecallPrompt[], options: Omit<EvaluationOptions, 'phase' | 'reference'>): Promise<RecallResult> {
  const { form, ranks, dtype, threads } = options;
  const order = [...prompts].sort((a, b) => a.tokens.length - b.tokens.length);
  const batch = Math.min(8, order.length);
  const runner = new Runner(checkpoint, { form, ranks, dtype, threads, context: order[order.length - 1]!.tokens.length, batch, exactSoftmax: options.exactSoftmax });
  const { vocabSize } = checkpoint.spec;
  const cells = new Map<string, RecallResult['cells'][number]>();
  let correct = 0;
  try {
    for (let at = 0; at < order.length; at += batch) {
      const group = order.slice(at, at + batch);
      await runner.prefill(group.map(({ tokens, prefix }) => tokens.subarray(0, prefix)), 'none');
      const hits = group.map(() => true);
      await decodeText(runner, group, vocabSize, (slot, position, logits) => {
        const { tokens, answer } = group[slot]!;
        if (position + 1 >= answer && argmax(logits) !== tokens[position + 1]) hits[slot] = false;
      });
      group.forEach(({ context, depth }, slot) => {
        const key = `${context} ${depth}`;
        const cell = cells.get(key) ?? { context, depth, prompts: 0, correct: 0 };
        cells.set(key, { ...cell, prompts: cell.prompts + 1, correct: cell.correct + (hits[slot] ? 1 : 0) });
        if (hits[slot]) correct++;
      });
      options.onProgress?.(Math.min(at + batch, order.length), order.length);
    }
  } finally {
    runner.close();
  }
  const sorted = [...cells.values()].sort((a, b) => a.context - b.context || a.depth - b.depth);
  return { prompts: prompts.length, correct, accuracy: correct / prompts.length, cells: sorted };
}
