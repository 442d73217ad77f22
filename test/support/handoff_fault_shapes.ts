import type { KvArena, KvLayout } from '../../src/native/types.js';
import { pageRange } from './handoff.js';

/** Large enough that a put takes milliseconds: 38 MB canonical, 42 MB over two ranks. */
export const BIG: KvLayout = { form: 'mla', ranks: 1, layers: 8, latent: 512, rope: 64, shared: 0, dtype: 'bf16', pageTokens: 64 };
export const BIG_TARGET: KvLayout = { ...BIG, form: 'tpla', ranks: 2, pageTokens: 128 };
export const BIG_PAGES = 64;
export const BIG_TOKENS: [number, number] = [0, BIG_PAGES * 64];

/** Decode's pages for all of it. */
export const BIG_TARGET_PAGES = pageRange(0, BIG_PAGES / 2);

export const bigGrant = (leaseMs = 60_000) => ({ tokens: BIG_TOKENS, pages: [BIG_TARGET_PAGES], leaseMs });

/** Fills decode's pages with a byte that no hand-off writes, to see whether one still does. */
export function poison(arena: KvArena): void {
  for (const page of bigPages(arena)) page.fill(0x5a);
}

export function isPoisoned(arena: KvArena): boolean {
  const expected = Buffer.alloc(arena.page(0, 0, 0).length, 0x5a);
  for (const page of bigPages(arena)) if (expected.compare(page) !== 0) return false;
  return true;
}

function* bigPages(arena: KvArena) {
  for (const rank of [0, 1]) for (let layer = 0; layer < BIG.layers; layer++) for (const page of BIG_TARGET_PAGES) yield arena.page(rank, layer, page);
}
