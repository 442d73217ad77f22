/** Both ends of a hand-off for tests: small arenas, KV that a position decides, and a check of what landed. */
import { pino } from 'pino';
import type { Clock } from '../../src/clock.js';
import { systemClock } from '../../src/clock.js';
import { native } from '../../src/native/loader.js';
import { sharedIn } from '../../src/model/shared_widths.js';
import type { KvArena, KvLayout, SampledToken } from '../../src/native/types.js';
import { PROTOCOL, type Handshake, type PrefillStats } from '../../src/transfer/types.js';

export const LAYERS = 3;
export const silent = pino({ level: 'silent' });

export function smallLayout(change: Partial<KvLayout> = {}): KvLayout {
  return { form: 'mla', ranks: 1, layers: LAYERS, latent: 64, rope: 16, shared: 0, dtype: 'bf16', pageTokens: 16, ...change };
}

export function handshake(layout: KvLayout, identity: Partial<Handshake['identity']> = {}): Handshake {
  return { protocol: PROTOCOL, identity: { name: 'demo', fingerprint: 'f00d', reparam: 'none', ...identity }, layout };
}

export const endpoint = (arena: KvArena, clock: Clock = systemClock) => ({ handshake: handshake(arena.layout), arena, log: silent, clock });

/** What prefill would have computed for a request: bf16 values that layer, token, column and `salt` decide. */
function value(layer: number, token: number, column: number, salt: number): number {
  // Sign, exponent near one, mantissa: all finite.
  return ((layer * 7 + token * 13 + column * 29 + salt * 101) & 0x807f) | 0x3f80;
}

/** Fills tokens of a canonical bf16 arena (mla, one rank). */
export function fillCanonical(arena: KvArena, pages: Int32Array, tokens: [number, number], salt: number): void {
  const { layout } = arena;
  const width = layout.latent + layout.rope;
  for (let layer = 0; layer < layout.layers; layer++) {
    for (let token = tokens[0]; token < tokens[1]; token++) {
      const page = arena.page(0, layer, pages[Math.floor(token / layout.pageTokens)]!);
      const row = new Uint16Array(page.buffer, page.byteOffset + (token % layout.pageTokens) * width * 2, width);
      for (let column = 0; column < width; column++) row[column] = value(layer, token, column, salt);
    }
  }
}

/** First difference between what decode holds (bf16; mla or tpla) and fillCanonical's values; null when there is none. */
export function findDifference(arena: KvArena, pages: Int32Array, tokens: [number, number], salt: number): string | null {
  const { layout } = arena;
  const ranks = layout.form === 'tpla' ? layout.ranks : 1;
  for (let rank = 0; rank < ranks; rank++) {
    for (let layer = 0; layer < layout.layers; layer++) {
      const shared = sharedIn(layout.shared, layer);
      const slice = (layout.latent - shared) / ranks;
      const width = shared + slice + layout.rope;
      for (let token = tokens[0]; token < tokens[1]; token++) {
        const page = arena.page(rank, layer, pages[Math.floor(token / layout.pageTokens)]!);
        const row = new Uint16Array(page.buffer, page.byteOffset + (token % layout.pageTokens) * width * 2, width);
        for (let column = 0; column < width; column++) {
          const canonical = column < shared ? column : column < shared + slice ? rank * slice + column : layout.latent + column - shared - slice;
          if (row[column] !== value(layer, token, canonical, salt)) return `rank ${rank}, layer ${layer}, token ${token}, column ${column}`;
        }
      }
    }
  }
  return null;
}

export function newArena(layout: KvLayout, pages: number): KvArena {
  return new (native().KvArena)(layout, pages);
}

export const stats = (promptTokens: number): PrefillStats => ({ promptTokens, pooledTokens: 0, skippedTokens: 0, computedTokens: promptTokens, queueMs: 1.5, computeMs: 20 });
export const sampled = (token: number): SampledToken => ({ token, logprob: NaN, top: [] });

export const pageRange = (first: number, count: number) => Int32Array.from({ length: count }, (_, i) => first + i);

/** The error a promise ends with; throws where it does not. */
export async function failure(promise: Promise<unknown>): Promise<{ code: string; message: string }> {
  const outcome = await promise.then(() => null, (error: { code: string; message: string }) => error);
  if (outcome === null) throw new Error('expected a failure, it succeeded');
  return outcome;
}

export async function until(condition: () => boolean | Promise<boolean>, what: string, limitMs = 20_000): Promise<void> {
  for (const deadline = performance.now() + limitMs; !(await condition());) {
    if (performance.now() > deadline) throw new Error(`still waiting for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}
