/** Where the time of a hand-off goes: its steps in both processes, by the one monotonic clock of their host. */
import type { TimelineMark } from '../../native/types.js';
import { table } from '../../report/table.js';
import { median } from './statistics.js';

export interface HandoffTimeline {
  /** Of the first push. */
  started: number;
  prefill: TimelineMark[];
  decode: TimelineMark[];
}

/** A line a step, in order of time: microseconds after the first push, medians over hand-offs; a step that repeats is counted. */
export function timelineTable(handoffs: HandoffTimeline[]): string {
  const times = new Map<string, { side: string; step: string; at: number[] }>();
  for (const { started, ...sides } of handoffs) {
    for (const side of ['prefill', 'decode'] as const) {
      const seen = new Map<string, number>();
      for (const { step, at } of sides[side]) {
        if (at < started) continue;
        const count = (seen.get(step) ?? 0) + 1;
        seen.set(step, count);
        const key = `${side} ${step} ${count}`;
        if (!times.has(key)) times.set(key, { side, step: `${step} ${count}`, at: [] });
        times.get(key)!.at.push(at - started);
      }
    }
  }
  const lines = [...times.values()].filter(({ at }) => at.length * 2 > handoffs.length).sort((a, b) => median(a.at) - median(b.at));
  return table(['µs', 'process', 'step'], lines.map(({ side, step, at }) => [median(at).toFixed(1), side, step]), ['right', 'left', 'left']);
}
