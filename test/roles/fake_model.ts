/**
 * A deterministic stand-in for a model and its memory. The "KV" of a token is the token and its position; the "attention" reads every row
 * through the page table and hashes it into the next token, so that any row that is missing, stale or misplaced changes the text.
 */
import type { KvForm, KvLayout } from '../../src/native/types.js';

export const VOCAB = 97;
export const PAGE = 64;

const MAX_PAGES = 256;

export class FakeMemory {
  readonly layout: KvLayout;
  /** One row per token: token + 1, and position; zeros where nothing was written. */
  readonly tokens: Int32Array;
  readonly positions: Int32Array;

  constructor(form: KvForm, ranks: number) {
    this.layout = { form, ranks, layers: 2, latent: 8, rope: 4, shared: 0, dtype: 'f32', pageTokens: PAGE };
    this.tokens = new Int32Array(ranks * MAX_PAGES * PAGE);
    this.positions = new Int32Array(ranks * MAX_PAGES * PAGE);
  }

  row(pages: Int32Array[], position: number, rank = 0): number {
    const index = Math.floor(position / PAGE);
    const { form, ranks } = this.layout;
    const lane = form === 'dcp' ? index % ranks : form === 'dp' ? rank : 0;
    const page = form === 'dcp' ? pages[lane]![Math.floor(index / ranks)] : pages[0]![index];
    if (page === undefined) throw new Error(`the page table has no page for position ${position}`);
    return (lane * MAX_PAGES + page) * PAGE + (position % PAGE);
  }

  write(pages: Int32Array[], position: number, token: number, rank?: number): void {
    const row = this.row(pages, position, rank);
    this.tokens[row] = token + 1;
    this.positions[row] = position;
  }

  read(pages: Int32Array[], position: number, rank?: number): number {
    const row = this.row(pages, position, rank);
    if (this.tokens[row] === 0 || this.positions[row] !== position) throw new Error(`position ${position} is read but its row holds position ${this.positions[row]}`);
    return this.tokens[row]! - 1;
  }

  copyPage(from: number, to: number, rank = 0): void {
    const at = (page: number) => (rank * MAX_PAGES + page) * PAGE;
    for (const rows of [this.tokens, this.positions]) rows.copyWithin(at(to), at(from), at(from) + PAGE);
  }
}

/** The next token after a context. */
export function nextToken(context: readonly number[]): number {
  let hash = 2166136261;
  for (const token of context) hash = Math.imul(hash ^ (token + 1), 16777619) >>> 0;
  return ((hash ^ (hash >>> 15)) >>> 0) % VOCAB;
}

export function expectedText(prompt: readonly number[], count: number): number[] {
  const context = [...prompt];
  for (let i = 0; i < count; i++) context.push(nextToken(context));
  return context.slice(prompt.length);
}

export function promptOf(length: number, seed = 0): number[] {
  return Array.from({ length }, (_, i) => (i * 31 + seed * 17 + (i >> 5)) % VOCAB);
}
