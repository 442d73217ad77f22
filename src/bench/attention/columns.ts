import { formatCsv } from '../../report/csv.js';
import { fieldsOfShape, SHAPE_FIELDS } from './shape.js';
import type { BenchResult, BenchRow } from './run.js';

/**
 * Columns of a results file beside those of the shape. `latency_us` and `mfu` are what serving simulators read; mfu is the fraction of the
 * matrix rate that the same run measured.
 */
const RESULT_COLUMNS = [
  'gpu', 'kernel', 'ms', 'min_ms', 'max_ms', 'latency_us', 'gb_per_s', 'tflops', 'copy_fraction', 'mfu', 'copy_gb_per_s', 'matrix_tflops', 'serial_ms', 'serial_ratio', 'absorbed_ms', 'unabsorbed_ms', 'choice_ratio', 'check', 'row_error', 'lse_error',
];

/** `NAME_ms` and `NAME_ratio` belong to a comparison. */
export function isResultColumn(name: string): boolean {
  return RESULT_COLUMNS.includes(name) || /_(ms|ratio)$/.test(name);
}

export function resultsAsCsv(result: BenchResult): string {
  const names = result.comparisons.map(({ name }) => name);
  const columns = ['gpu', ...SHAPE_FIELDS, ...RESULT_COLUMNS.filter((name) => name !== 'gpu'), ...names.flatMap((name) => [`${name}_ms`, `${name}_ratio`])];
  return formatCsv(columns, result.rows.map((row) => record(result, row)));
}

function record(result: BenchResult, row: BenchRow): Record<string, string | number | boolean | null> {
  const { timing, check } = row;
  return {
    gpu: result.device.gpu,
    ...fieldsOfShape(row.shape),
    kernel: row.kernel,
    check: row.verdict,
    ...(check && { row_error: significant(check.worstRow, 3), lse_error: significant(check.worstLse, 3) }),
    ...(timing && {
      ms: significant(timing.ms, 5), min_ms: significant(timing.min_ms, 5), max_ms: significant(timing.max_ms, 5), latency_us: significant(timing.ms * 1000, 5),
      gb_per_s: significant(timing.gb_per_s, 5), tflops: significant(timing.tflops, 5), copy_fraction: significant(timing.copy_fraction, 4), mfu: significant(timing.mfu, 4),
      serial_ms: significantOrNone(timing.serial_ms, 5), serial_ratio: significantOrNone(timing.serial_ratio, 4),
      absorbed_ms: significantOrNone(timing.absorbed_ms, 5), unabsorbed_ms: significantOrNone(timing.unabsorbed_ms, 5), choice_ratio: significantOrNone(timing.choice_ratio, 4),
    }),
    ...(result.rates && { copy_gb_per_s: significant(result.rates.copy_gb_per_s, 5), matrix_tflops: significant(result.rates.matrix_tflops, 5) }),
    ...Object.fromEntries(row.compared.flatMap(({ name, ms, ratio }) => [[`${name}_ms`, ms], [`${name}_ratio`, significantOrNone(ratio, 4)]])),
  };
}

/** Rounded to so many significant digits, as short a number as that allows. */
function significant(value: number, digits: number): number {
  return Number.isFinite(value) ? Number(value.toPrecision(digits)) : value;
}

function significantOrNone(value: number | null, digits: number): number | null {
  return value === null ? null : significant(value, digits);
}
