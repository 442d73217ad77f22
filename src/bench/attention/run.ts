import { TplaError } from '../../errors.js';
import type { AttentionModule, KernelPath, MachineRates } from '../../native/attention.js';
import { caseOf, lengthsText, rowKey, type BenchRow } from './rows.js';

export interface BenchResult extends BenchRow {
  gpu: string;
  ms: number;
  bytes: number;
  flops: number;
  gb_per_s: number;
  tflops: number;
  /** Share of this GPU's measured copy bandwidth. */
  mbu: number;
  /** Share of this GPU's measured matrix rate. */
  mfu: number;
  /** Worst row against float64. */
  error: number;
  /** Somebody else's time for the same work on the same GPU, and how many times faster this is. */
  other_ms: number | null;
  ratio: number | null;
}

export interface BenchOptions {
  path: KernelPath;
  seed: number;
  /** Runs of the check, which must agree to the bit. */
  repeats: number;
  others: ReadonlyMap<string, number>;
  onResult?: (result: BenchResult) => void;
}

/** Checks a row against float64, then times it. A wrong result is an error: no time is reported for it. */
export async function benchRow(addon: AttentionModule, machine: MachineRates, row: BenchRow, options: BenchOptions): Promise<BenchResult> {
  const work = caseOf(row, options.path);
  const verdict = await addon.benchAttention({ operation: 'check', repeats: options.repeats, seed: options.seed, ...work });
  if (!verdict.ok) {
    throw new TplaError('INTERNAL', `${verdict.name}: wrong result, so it was not timed (error ${verdict.error.toExponential(2)}, log-sum-exp ${verdict.lseError.toExponential(2)}${verdict.sameBits ? '' : ', bits differ between runs'})`);
  }
  const timing = await addon.benchAttention({ operation: 'time', seed: options.seed, ...work });
  const seconds = timing.ms / 1e3;
  const other = options.others.get(rowKey(row)) ?? null;
  return {
    ...row, gpu: machine.name, ms: timing.ms, bytes: timing.bytes, flops: timing.flops,
    gb_per_s: timing.bytes / seconds / 1e9, tflops: timing.flops / seconds / 1e12,
    mbu: timing.bytes / seconds / machine.copyBytesPerSecond, mfu: timing.flops / seconds / machine.matrixFlopsPerSecond,
    error: verdict.error, other_ms: other, ratio: other === null ? null : other / timing.ms,
  };
}

export async function benchRows(addon: AttentionModule, rows: readonly BenchRow[], options: BenchOptions): Promise<{ machine: MachineRates; results: BenchResult[] }> {
  const machine = await addon.benchAttention({ operation: 'machine' });
  const results: BenchResult[] = [];
  for (const row of rows) {
    const result = await benchRow(addon, machine, row, options);
    results.push(result);
    options.onResult?.(result);
  }
  return { machine, results };
}

const COLUMNS = ['gpu', 'kind', 'latent', 'rope', 'batch', 'heads', 'kv_len', 'q_tokens', 'kv_lens', 'causal', 'ms', 'latency_us', 'gb_per_s', 'tflops', 'mbu', 'mfu', 'error', 'other_ms', 'ratio'] as const;

/** Columns of the field's tables (`ms`, InferSim's `latency_us` and `mfu`), so that planners can read it. */
export function toCsv(results: readonly BenchResult[]): string {
  const lines = results.map((result) => {
    const even = new Set(result.kvLens).size === 1;
    const cells: Record<(typeof COLUMNS)[number], string | number> = {
      gpu: result.gpu.replaceAll(',', ' '), kind: result.kind, latent: result.kind === 'decode' ? result.latent : 128, rope: 64, batch: result.batch, heads: result.heads,
      kv_len: even ? result.kvLens[0]! : '', q_tokens: result.qTokens, kv_lens: even ? '' : result.kvLens.join(';'), causal: result.causal ? 1 : 0,
      ms: result.ms.toFixed(4), latency_us: (result.ms * 1e3).toFixed(1), gb_per_s: result.gb_per_s.toFixed(0), tflops: result.tflops.toFixed(1),
      mbu: result.mbu.toFixed(3), mfu: result.mfu.toFixed(3), error: result.error.toExponential(2),
      other_ms: result.other_ms ?? '', ratio: result.ratio?.toFixed(2) ?? '',
    };
    return COLUMNS.map((column) => cells[column]).join(',');
  });
  return `${[COLUMNS.join(','), ...lines].join('\n')}\n`;
}

export function resultCells(result: BenchResult): string[] {
  return [
    result.kind === 'decode' ? `decode ${result.latent}` : result.causal ? 'prefill causal' : 'prefill', String(result.batch), String(result.heads), lengthsText(result), String(result.qTokens),
    result.ms.toFixed(4), result.gb_per_s.toFixed(0), result.tflops.toFixed(0), `${(100 * result.mbu).toFixed(0)} %`, `${(100 * result.mfu).toFixed(0)} %`,
    result.other_ms === null ? '' : result.other_ms.toFixed(4), result.ratio === null ? '' : `${result.ratio.toFixed(2)}×`,
  ];
}

export const RESULT_HEAD = ['kernel', 'batch', 'heads', 'KV tokens', 'q', 'ms', 'GB/s', 'TFLOP/s', 'of copy', 'of matrix', 'other ms', 'ratio'];
