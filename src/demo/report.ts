import type { KvForm } from '../native/types.js';
import { formatCount, formatMs } from '../report/format.js';
import { table } from '../report/table.js';
import type { TransferPath } from '../transfer/types.js';
import type { DemoCompletion } from './completion.js';

/** What `tpla demo --json` prints. Times are milliseconds of this one request. */
export interface DemoReport {
  text: string;
  prompt: string;
  /** How the checkpoint was prepared for TPLA, such as `pca, 2 groups`; null for the checkpoint as it is. */
  reparam: string | null;
  ttft_ms: number;
  prefill: { attention: KvForm; tokens: number; ms: number };
  transfer: { path: TransferPath; bytes: number; ms: number };
  decode: {
    attention: KvForm;
    ranks: number;
    tokens: number;
    tpot_ms: number;
    kv_bytes_per_token_per_rank: number;
    /** What every rank would hold with plain MLA under tensor parallelism. */
    mla_kv_bytes_per_token_per_rank: number;
  };
}

export function demoReport(prompt: string, reparam: string | null, { text, timings }: DemoCompletion, mlaBytes: number): DemoReport {
  const { ttft_ms, prefill, transfer, decode } = timings;
  if (prefill === null || transfer === null) throw new Error('a fresh stack cannot have held the prompt already');
  return {
    text, prompt, reparam, ttft_ms,
    prefill: { attention: prefill.attention, tokens: prefill.tokens, ms: prefill.ms },
    transfer: { path: transfer.path, bytes: transfer.bytes, ms: transfer.ms },
    decode: {
      attention: decode.attention, ranks: decode.ranks, tokens: decode.tokens, tpot_ms: decode.tpot_ms,
      kv_bytes_per_token_per_rank: decode.kv_bytes_per_token_per_rank,
      mla_kv_bytes_per_token_per_rank: mlaBytes,
    },
  };
}

export function demoTable({ ttft_ms, prefill, transfer, decode, reparam }: DemoReport): string {
  const { kv_bytes_per_token_per_rank: held, mla_kv_bytes_per_token_per_rank: plain } = decode;
  const rows = [
    ['prefill', `${prefill.attention} attention`, `${formatCount(prefill.tokens)} tokens`, formatMs(prefill.ms)],
    ['KV hand-off', `through ${transfer.path}`, `${formatCount(transfer.bytes)} bytes`, formatMs(transfer.ms)],
    ['decode', `${decode.attention} attention, ${decode.ranks} ${decode.ranks === 1 ? 'rank' : 'ranks'}`, `${formatCount(decode.tokens)} tokens`, `${formatMs(decode.tpot_ms)} a token`],
    ['', 'KV per token per rank', `${formatCount(held)} bytes`, `plain MLA: ${formatCount(plain)} (${Math.round((100 * held) / plain)} %)`],
    ['TTFT', 'first request of a fresh stack', '', formatMs(ttft_ms)],
  ];
  return `${table(['', 'how', 'how much', 'time'], rows)}${reparam === null ? '' : `\n\nThe checkpoint's latent was rotated for TPLA (${reparam}).`}`;
}
