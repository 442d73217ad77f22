import type { KvLayout } from '../../../src/native/types.js';

/** Canonical layout of the pool tests. */
export const LAYOUT: KvLayout = { form: 'mla', ranks: 1, layers: 3, latent: 32, rope: 8, shared: 0, dtype: 'f32', pageTokens: 64 };
