/** Milliseconds at three significant digits, at most two decimals. */
export function formatMs(ms: number): string {
  return `${ms.toFixed(ms >= 100 ? 0 : ms >= 10 ? 1 : 2)} ms`;
}

/** A whole number with a comma every three digits. */
export function formatCount(count: number): string {
  return Math.round(count).toLocaleString('en-US');
}
