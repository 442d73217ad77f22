import { TplaError } from '../errors.js';
import type { Tokenizer } from '../model/tokenizer.js';
import { shuffle, uniform } from '../random.js';

/** A stretch of text as one sequence: the first `prefix` tokens are context, the rest is scored. */
export interface Window {
  tokens: Int32Array;
  prefix: number;
}

export interface WindowOptions {
  /** Tokens per window, the beginning-of-sequence token included. */
  context: number;
  prefix: number;
  /** Scored tokens wanted in total; fewer come out of a short text. */
  scored: number;
  /** Which windows of a longer text are taken. */
  seed: number;
}

/** Cuts a text into windows that do not overlap and draws enough of them for `scored` tokens. */
export async function textWindows(tokenizer: Tokenizer, text: string, options: WindowOptions): Promise<Window[]> {
  const { context, prefix, scored, seed } = options;
  const begin = tokenizer.bosTokenId === null ? [] : [tokenizer.bosTokenId];
  const ids = await tokenizer.encode(text, { addSpecialTokens: false });
  const body = context - begin.length;
  const windows: Window[] = [];
  for (let at = 0; at + body <= ids.length; at += body) windows.push({ tokens: Int32Array.from([...begin, ...ids.slice(at, at + body)]), prefix });
  if (windows.length === 0) {
    if (ids.length <= prefix) throw new TplaError('REQUEST_INVALID', `the text has ${ids.length} tokens; at least ${prefix + 1} are needed for a prefix of ${prefix}`);
    windows.push({ tokens: Int32Array.from([...begin, ...ids]), prefix });
  }
  return shuffle(windows, uniform(seed)).slice(0, Math.max(1, Math.ceil(scored / (context - prefix))));
}
