import type { KvLayout } from '../../src/native/types.js';

/** Large enough that a put takes milliseconds: 38 MB canonical, 42 MB over two ranks. */
export const BIG: KvLayout = { form: 'mla', ranks: 1, layers: 8, latent: 512, rope: 64, shared: 0, dtype: 'bf16', pageTokens: 64 };
export const BIG_TARGET: KvLayout = { ...BIG, form: 'tpla', ranks: 2, pageTokens: 128 };
export const BIG_PAGES = 64;
export const BIG_TOKENS: [number, number] = [0, BIG_PAGES * 64];
