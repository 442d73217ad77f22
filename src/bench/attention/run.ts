import { TplaError, toTplaError } from '../../errors.js';
import type { AttentionCheck, AttentionModule, AttentionOutcome, AttentionTarget, AttentionTiming } from '../../native/attention.js';
import type { ProbeResult } from '../../native/types.js';
import type { Progress } from '../../report/progress.js';
import { costOfShape } from './cost.js';
import { describeShape, fieldsOfShape, problemOfShape, workOfShape, type AttentionShape } from './shape.js';

/** Times of other software, or of an earlier run, by the work they were measured on. */
export interface Comparison {
  /** Name of the file without its folder and ending. */
  name: string;
  /** Milliseconds by workOfShape. */
  ms: Map<string, number>;
}

export interface BenchOptions {
  target: AttentionTarget;
  shapes: AttentionShape[];
  /** Launches per check. */
  repeats: number;
  /** Timed repetitions; 0: check only. */
  runs: number;
  seed: number;
  comparisons: (gpu: string) => Comparison[];
  progress: Progress;
}

export interface BenchDevice {
  /** "H100", "A100", …, or "cpu": what the column gpu of a results file holds. */
  gpu: string;
  name: string;
  capability: string | null;
  multiprocessors: number | null;
  l2_bytes: number | null;
  memory_bytes: number | null;
  sm_clock_mhz: number | null;
  memory_clock_mhz: number | null;
}

export interface BenchRates {
  /** Read plus written, GB = 1e9 bytes. */
  copy_gb_per_s: number;
  matrix_tflops: number;
  matrix_source: string;
}

export interface RowTiming {
  /** Median, least and most of the runs. */
  ms: number;
  min_ms: number;
  max_ms: number;
  runs: number;
  calls_per_run: number;
  buffers: number;
  /** The least bytes the shape must move, over the time. */
  gb_per_s: number;
  tflops: number;
  /** Of the copy bandwidth and of the matrix rate measured in the same run. */
  copy_fraction: number;
  mfu: number;
  /** What the shape runs into first, and the time that alone would take over the measured one. */
  bound: 'memory' | 'matrix';
  bound_fraction: number;
  /** Of a pod shape: the same work in two launches, one after the other, and that time over this one. */
  serial_ms: number | null;
  serial_ratio: number | null;
  /** Of a chunk whose form is chosen: both forms' times, and the faster one's over the chosen one's: 1 where the choice is right. */
  absorbed_ms: number | null;
  unabsorbed_ms: number | null;
  choice_ratio: number | null;
}

export interface BenchRow {
  shape: AttentionShape;
  kernel: string;
  /** `ok`, or what is wrong. */
  verdict: string;
  check: AttentionCheck | null;
  timing: RowTiming | null;
  /** ratio: their time over ours. */
  compared: { name: string; ms: number; ratio: number | null }[];
}

export interface BenchResult {
  device: BenchDevice;
  rates: BenchRates | null;
  comparisons: { name: string; rows: number; matched: number }[];
  rows: BenchRow[];
  /** Rows whose verdict is not ok. */
  failed: number;
}

/**
 * Largest errors a right kernel shows. bf16 rounds probabilities and outputs to 8 bits, of a chunk also absorbed queries or the keys and values
 * multiplied up; the CPU computes in fp32. A wrong token, page or mask is off by far more.
 */
const TOLERANCES = { gpu: { row: 8e-3, lse: 2e-3 }, gpuChunk: { row: 1.6e-2, lse: 1e-2 }, cpu: { row: 1e-4, lse: 1e-4 } };

/** Checks and times every shape, in order. A shape that no kernel takes is refused before anything runs. */
export async function benchAttention(native: AttentionModule & { probe(): ProbeResult }, options: BenchOptions): Promise<BenchResult> {
  const device = await describeDevice(native, options.target);
  const comparisons = options.comparisons(device.gpu);
  for (const shape of options.shapes) await refuseUnsupported(native, options.target, shape);
  const rates = options.runs > 0 ? await measureRates(native, options.target) : null;
  const rows: BenchRow[] = [];
  options.progress.start('attention', options.shapes.length);
  for (const shape of options.shapes) {
    rows.push(await benchShape(native, options, shape, rates, comparisons));
    options.progress.advance(1);
  }
  options.progress.finish();
  return {
    device,
    rates,
    comparisons: comparisons.map(({ name, ms }) => ({ name, rows: ms.size, matched: rows.filter((row) => row.compared.some((one) => one.name === name)).length })),
    rows,
    failed: rows.filter((row) => row.verdict !== 'ok').length,
  };
}

/** The result as JSON prints it. */
export function resultAsJson(result: BenchResult): unknown {
  return {
    ...result,
    rows: result.rows.map(({ shape, check, ...row }) => ({
      shape: fieldsOfShape(shape),
      ...row,
      check: check && { row_error: check.worstRow, overall_error: check.overall, lse_error: check.worstLse, same_bits: check.sameBits, repeats: check.repeats, reference: check.reference },
    })),
  };
}

async function describeDevice(native: AttentionModule & { probe(): ProbeResult }, target: AttentionTarget): Promise<BenchDevice> {
  if (target.kind === 'cpu') {
    const { model } = native.probe().cpu;
    return { gpu: 'cpu', name: model, capability: null, multiprocessors: null, l2_bytes: null, memory_bytes: null, sm_clock_mhz: null, memory_clock_mhz: null };
  }
  try {
    const gpu = await native.attention.describeGpu(target.index);
    return {
      gpu: shortName(gpu.name), name: gpu.name, capability: gpu.capability, multiprocessors: gpu.multiprocessors, l2_bytes: gpu.l2Bytes, memory_bytes: gpu.memoryBytes,
      sm_clock_mhz: gpu.smClockHz / 1e6, memory_clock_mhz: gpu.memoryClockHz / 1e6,
    };
  } catch (thrown) {
    const error = toTplaError(thrown);
    if (error.code !== 'GPU_UNAVAILABLE') throw error;
    throw new TplaError('GPU_UNAVAILABLE', `${error.message}; \`--device cpu\` runs the attention of the CPU engine, and \`tpla doctor\` says what this machine has`, { cause: thrown });
  }
}

/** "NVIDIA H100 80GB HBM3" → "H100". */
export function shortName(name: string): string {
  return /\b[A-Z]{1,4}\d{2,4}[A-Z]*\b/.exec(name)?.[0] ?? name.replace(/^NVIDIA /, '');
}

async function refuseUnsupported(native: AttentionModule, target: AttentionTarget, shape: AttentionShape): Promise<void> {
  try {
    await native.attention.plan(target, problemOfShape(shape));
  } catch (thrown) {
    const error = toTplaError(thrown);
    throw error.code === 'REQUEST_INVALID' ? new TplaError('REQUEST_INVALID', `${error.message} (${describeShape(shape)})`, { cause: thrown }) : error;
  }
}

async function measureRates(native: AttentionModule, target: AttentionTarget): Promise<BenchRates> {
  const rates = await native.attention.rates(target);
  return { copy_gb_per_s: rates.copyBytesPerSecond / 1e9, matrix_tflops: rates.matrixFlopsPerSecond / 1e12, matrix_source: rates.matrixSource };
}

async function benchShape(native: AttentionModule, options: BenchOptions, shape: AttentionShape, rates: BenchRates | null, comparisons: Comparison[]): Promise<BenchRow> {
  const { target, seed, repeats, runs } = options;
  const outcome = await native.attention.run(target, problemOfShape(shape), { seed, repeats, runs, reference: 'auto' }).catch((thrown: unknown) => {
    const error = toTplaError(thrown);
    throw new TplaError(error.code, `${error.message} (${describeShape(shape)})`, { cause: thrown });
  });
  const timing = outcome.timing && rates ? timingOf(shape, outcome.timing, rates, outcome) : null;
  const work = workOfShape(shape);
  return {
    shape,
    kernel: outcome.kernel,
    verdict: outcome.check === null ? 'not checked' : judge(outcome.check, target.kind, shape.kind),
    check: outcome.check,
    timing,
    compared: comparisons.flatMap(({ name, ms }) => {
      const theirs = ms.get(work);
      return theirs === undefined ? [] : [{ name, ms: theirs, ratio: timing === null ? null : theirs / timing.ms }];
    }),
  };
}

/** `ok`, or the first thing that is wrong. */
export function judge(check: AttentionCheck, device: 'gpu' | 'cpu', kind: AttentionShape['kind']): string {
  const tolerance = TOLERANCES[device === 'gpu' && kind === 'chunk' ? 'gpuChunk' : device];
  if (Number.isNaN(check.worstRow) || Number.isNaN(check.worstLse)) return 'NaN in the result';
  if (check.worstRow > tolerance.row) return `error ${check.worstRow.toExponential(1)}`;
  if (check.worstLse > tolerance.lse) return `lse error ${check.worstLse.toExponential(1)}`;
  return check.sameBits ? 'ok' : 'results differ';
}

export function timingOf(shape: AttentionShape, timing: AttentionTiming, rates: BenchRates, beside: Partial<Pick<AttentionOutcome, 'serial' | 'absorbed' | 'unabsorbed'>> = {}): RowTiming {
  const { bytes, flops } = costOfShape(shape);
  const seconds = timing.medianMs / 1000;
  const gb_per_s = bytes / seconds / 1e9;
  const tflops = flops / seconds / 1e12;
  const copy_fraction = gb_per_s / rates.copy_gb_per_s;
  const mfu = tflops / rates.matrix_tflops;
  const [serial, absorbed, unabsorbed] = [beside.serial, beside.absorbed, beside.unabsorbed].map((other) => other?.medianMs ?? null) as [number | null, number | null, number | null];
  return {
    ms: timing.medianMs, min_ms: timing.minMs, max_ms: timing.maxMs, runs: timing.runs, calls_per_run: timing.callsPerRun, buffers: timing.buffers,
    gb_per_s, tflops, copy_fraction, mfu, bound: copy_fraction >= mfu ? 'memory' : 'matrix', bound_fraction: Math.max(copy_fraction, mfu),
    serial_ms: serial, serial_ratio: serial === null ? null : serial / timing.medianMs,
    absorbed_ms: absorbed, unabsorbed_ms: unabsorbed, choice_ratio: absorbed === null || unabsorbed === null ? null : Math.min(absorbed, unabsorbed) / timing.medianMs,
  };
}
