/** Told of the steps of a long command. */
export interface Progress {
  start(label: string, total: number, unit?: 'bytes'): void;
  advance(count: number): void;
  finish(): void;
}

export const SILENT: Progress = { start() {}, advance() {}, finish() {} };

const BAR = 24;
const REDRAW_MS = 100;
const LINE_MS = 10_000;

/** A bar with an estimate on a terminal, a plain line now and then elsewhere. */
export function consoleProgress(out: NodeJS.WriteStream = process.stderr): Progress {
  let state = { label: '', total: 1, done: 0, bytes: false, started: 0, shown: 0 };
  const amount = (value: number) => (state.bytes ? `${(value / 1e9).toFixed(2)} GB` : String(value));
  const line = () => {
    const part = Math.min(1, state.done / Math.max(1, state.total));
    const seconds = (performance.now() - state.started) / 1000;
    const left = part > 0 && part < 1 ? `, ${duration((seconds * (1 - part)) / part)} left` : '';
    return { part, text: `${amount(state.done)} of ${amount(state.total)}, ${duration(seconds)}${left}` };
  };
  const draw = (final: boolean) => {
    const now = performance.now();
    if (!final && now - state.shown < (out.isTTY ? REDRAW_MS : LINE_MS)) return;
    state.shown = now;
    const { part, text } = line();
    if (!out.isTTY) return void out.write(`${state.label}: ${text}\n`);
    const filled = Math.round(part * BAR);
    out.write(`\r\x1b[K${state.label} ${'█'.repeat(filled)}${'░'.repeat(BAR - filled)} ${text}${final ? '\n' : ''}`);
  };
  return {
    start(label, total, unit) {
      const now = performance.now();
      state = { label, total, done: 0, bytes: unit === 'bytes', started: now, shown: now };
    },
    advance(count) {
      state.done += count;
      draw(false);
    },
    finish() {
      draw(true);
    },
  };
}

function duration(seconds: number): string {
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
