/** Latencies of single requests, in microseconds. */
export interface Latency {
  avg: number;
  min: number;
  p50: number;
  p99: number;
  p999: number;
  max: number;
}

export function summarise(values: readonly number[]): Latency {
  const sorted = [...values].sort((a, b) => a - b);
  return {
    avg: sorted.reduce((sum, value) => sum + value, 0) / sorted.length,
    min: sorted[0]!,
    p50: quantile(sorted, 0.5),
    p99: quantile(sorted, 0.99),
    p999: quantile(sorted, 0.999),
    max: sorted.at(-1)!,
  };
}

/** Nearest rank: a value that was measured, so that p99.9 of twenty runs is the slowest of them. */
export function quantile(sorted: readonly number[], q: number): number {
  return sorted[Math.max(0, Math.ceil(q * sorted.length) - 1)]!;
}

export function median(values: readonly number[]): number {
  return quantile([...values].sort((a, b) => a - b), 0.5);
}
