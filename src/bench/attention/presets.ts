import type { BenchRow } from './rows.js';

function decode(latent: number, heads: number, kvLens: number[], qTokens = 1): BenchRow {
  return { kind: 'decode', latent, batch: kvLens.length, heads, kvLens, qTokens, pageSize: 64, causal: true };
}

function prefill(tokens: number, causal: boolean): BenchRow {
  return { kind: 'prefill', latent: 0, batch: 1, heads: 128, kvLens: [tokens], qTokens: tokens, pageSize: 64, causal };
}

const same = (batch: number, length: number): number[] => new Array<number>(batch).fill(length);
const UNEVEN = [4641, 45118, 1730, 1696];
const GRID: [number, number][] = [[1, 32768], [8, 32768], [32, 4096], [32, 32768], [64, 8192], [128, 4096], [128, 8192]];
const grid = (latent: number): BenchRow[] => [128, 64, 32, 16].flatMap((heads) => GRID.map(([batch, length]) => decode(latent, heads, same(batch, length))));

export const PRESETS = {
  /** MLA decode, the shapes FlashMLA is measured on. */
  flashmla: [...grid(512), decode(512, 128, UNEVEN), decode(512, 128, UNEVEN, 4), decode(512, 16, UNEVEN)],
  /** One rank of two: 256 of 512 latent columns, all heads. */
  tpla: [...grid(256), decode(256, 128, UNEVEN), decode(256, 16, UNEVEN), ...[320, 128].flatMap((latent) => [128, 64].map((heads) => decode(latent, heads, same(128, 8192))))],
  /** The workloads ThunderMLA published, 16 heads. */
  thundermla: [decode(512, 16, UNEVEN, 4), decode(512, 16, [65536]), decode(512, 16, same(64, 512), 2), decode(512, 16, same(132, 4096), 4)],
  /** Un-absorbed 192/128, 128 heads. */
  prefill: [true, false].flatMap((causal) => [2048, 4096, 8192, 16384].map((tokens) => prefill(tokens, causal))),
} as const satisfies Record<string, BenchRow[]>;

export type PresetName = keyof typeof PRESETS;
