import type { AttentionCase, KernelPath } from '../../native/attention.js';

/** One line of the benchmark. Prefill attends un-absorbed with head dims 192/128; its query tokens are its key tokens unless said. */
export interface BenchRow {
  kind: 'decode' | 'prefill';
  latent: number;
  batch: number;
  heads: number;
  kvLens: number[];
  qTokens: number;
  pageSize: number;
  causal: boolean;
}

export function caseOf(row: BenchRow, path: KernelPath): AttentionCase {
  const kvLens = Int32Array.from(row.kvLens);
  if (row.kind === 'prefill') return { kind: 'prefill', heads: row.heads, qLens: row.qTokens > 0 ? new Int32Array(row.batch).fill(row.qTokens) : kvLens, kvLens, causal: row.causal };
  return { kind: 'decode', latent: row.latent, heads: row.heads, qTokens: row.qTokens, pageSize: row.pageSize, kvLens, causal: row.causal, path };
}

/** `8192`, or `4641;45118` where lengths differ. */
export function lengthsText(row: BenchRow): string {
  return new Set(row.kvLens).size === 1 ? String(row.kvLens[0]) : row.kvLens.join(';');
}

/** Equal for rows that ask for the same work, whoever measured them. */
export function rowKey(row: BenchRow): string {
  return [row.kind, row.kind === 'decode' ? row.latent : 0, row.batch, row.heads, row.kvLens.join(';'), row.qTokens, row.kind === 'prefill' ? row.causal : ''].join('|');
}
