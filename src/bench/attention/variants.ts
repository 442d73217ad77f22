import type { LogitVariantsProblem } from '../../native/attention.js';
import { shuffle, uniform } from '../../random.js';

/** What decode does to its logits beside scaling them; in this order, and hidden tokens are not loaded. */
export interface LogitVariants {
  /** logit := softcap · tanh(logit / softcap); 0: none. */
  softcap: number;
  /** Tokens a query sees, its own included; 0: all. */
  window: number;
  /** Adds -slope · distance, with the slopes 2^(-8 (h + 1) / heads). */
  alibi: boolean;
  blockMask: BlockMask | null;
}

/** Every sequence is cut into blocks of so many tokens, of which a share is visible: the last one and others drawn at random. */
export interface BlockMask {
  block: number;
  share: number;
}

export const VARIANT_FIELDS = ['softcap', 'window', 'alibi', 'block_mask'];

/** `TOKENS:SHARE`, such as 128:0.25; undefined where it is not that. */
export function parseBlockMask(text: string): BlockMask | undefined {
  const [, block, share] = /^(\d+):(\d*\.?\d+)$/.exec(text.trim()) ?? [];
  if (block === undefined || share === undefined || Number(block) < 1 || Number(share) > 1) return undefined;
  return { block: Number(block), share: Number(share) };
}

/** Those that are set, as a results file names them. */
export function fieldsOfVariants(variants: LogitVariants | undefined): Record<string, string | number | boolean> {
  if (variants === undefined) return {};
  const { softcap, window, alibi, blockMask } = variants;
  return {
    ...(softcap > 0 && { softcap }), ...(window > 0 && { window }), ...(alibi && { alibi }), ...(blockMask && { block_mask: `${blockMask.block}:${blockMask.share}` }),
  };
}

/** Such as ` softcap 30 window 4096`; empty without variants. */
export function labelOfVariants(variants: LogitVariants | undefined): string {
  return Object.entries(fieldsOfVariants(variants)).map(([name, value]) => ` ${name === 'block_mask' ? 'blocks' : name}${value === true ? '' : ` ${value}`}`).join('');
}

/** The visible blocks of each sequence, ascending. The same mask and lengths always give the same blocks. */
export function visibleBlocks(mask: BlockMask, kvLens: number[]): number[][] {
  return kvLens.map((kvLen, i) => {
    const blocks = Math.ceil(kvLen / mask.block);
    if (blocks === 0) return [];
    const others = shuffle(Array.from({ length: blocks - 1 }, (_, block) => block), uniform(i + 1));
    const count = Math.max(1, Math.round(mask.share * blocks));
    return [...others.slice(0, count - 1), blocks - 1].sort((a, b) => a - b);
  });
}

export function problemOfVariants(variants: LogitVariants, kvLens: number[]): LogitVariantsProblem {
  const { softcap, window, alibi, blockMask } = variants;
  const lists = blockMask === null ? [] : visibleBlocks(blockMask, kvLens);
  return {
    softcap, window, alibi, maskBlock: blockMask?.block ?? 0, maskCounts: Int32Array.from(lists, (list) => list.length), maskBlocks: Int32Array.from(lists.flat()),
  };
}

/** Tokens of each sequence that some query sees, and pairs of a query and a token it sees. */
export function countVisible(variants: LogitVariants, qLens: number[], kvLens: number[], causal: boolean): { tokens: number; pairs: number } {
  const lists = variants.blockMask === null ? undefined : visibleBlocks(variants.blockMask, kvLens);
  let tokens = 0;
  let pairs = 0;
  kvLens.forEach((kvLen, i) => {
    const block = variants.blockMask?.block ?? kvLen;
    const listed = (lists?.[i] ?? [0]).map((number) => [number * block, Math.min((number + 1) * block, kvLen)] as const);
    const between = (low: number, high: number) => listed.reduce((count, [begin, end]) => count + Math.max(0, Math.min(high, end) - Math.max(low, begin)), 0);
    const windowBegin = (position: number) => (variants.window > 0 ? position - variants.window + 1 : 0);
    const first = kvLen - (qLens[i] as number);
    tokens += between(windowBegin(first), kvLen);
    for (let position = first; position < kvLen; position++) pairs += between(windowBegin(position), causal ? position + 1 : kvLen);
  });
  return { tokens, pairs };
}
