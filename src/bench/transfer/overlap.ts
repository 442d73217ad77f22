/** How much longer a prompt takes until its first token when its KV is handed over while it is computed. */
import { native } from '../../native/loader.js';
import { table } from '../../report/table.js';
import type { BenchCase } from './cases.js';
import type { Control } from './control.js';
import { Ends, nothingComputed, type HandoffOptions } from './handoff.js';
import { shapeOfRow, type RowShape } from './rows.js';
import { summarise, type Latency } from './statistics.js';
import type { TransferPath } from '../../transfer/types.js';

export interface OverlapRow extends RowShape {
  path: TransferPath;
  heads: number;
  bytes: number;
  /** Prefill's attention of all layers on the first GPU, nothing transferred. */
  prefill_alone_us: Latency;
  /** The same with each group of layers pushed as it is computed, until decode's word that all is verified and accepted. */
  with_handoff_us: Latency;
  /** Relative growth of the median. */
  growth: number;
  iterations: number;
  verified: boolean;
}

/** Runs alternate between computing alone and computing with the hand-off. Throws GPU_UNAVAILABLE. */
export async function benchOverlap(control: Control, what: BenchCase, heads: number, options: HandoffOptions): Promise<OverlapRow> {
  const load = native().prefillLoad(0, what.tokens, heads);
  const ends = await Ends.open(control, what, options);
  try {
    const alone: number[] = [];
    const beside: number[] = [];
    let path: TransferPath | undefined;
    let bytes = 0;
    for (let i = -options.warmup; i < options.iterations; i++) {
      const groups = ends.rectangles;
      const computeAll = () => groups.map(({ layers: [begin, end] }) => load.compute(end - begin));
      const aloneAt = performance.now();
      await Promise.all(computeAll());
      const aloneUs = (performance.now() - aloneAt) * 1e3;

      const session = await ends.openSession();
      const besideAt = performance.now();
      const computed = computeAll();
      await Promise.all(groups.map(async ({ layers, tokens }, group) => {
        await computed[group];
        // One that fails is commit()'s to tell.
        session.push(layers, tokens, ends.pages).catch(() => {});
      }));
      await session.commit(nothingComputed(what));
      const besideUs = (performance.now() - besideAt) * 1e3;
      if (i < 0) continue;
      alone.push(aloneUs);
      beside.push(besideUs);
      path = session.path;
      bytes = session.sent.bytes;
    }
    if (options.verify) await ends.verify();
    const prefillAlone = summarise(alone);
    const withHandoff = summarise(beside);
    return {
      path: path!, ...shapeOfRow(what), heads, bytes, prefill_alone_us: prefillAlone, with_handoff_us: withHandoff,
      growth: withHandoff.p50 / prefillAlone.p50 - 1, iterations: alone.length, verified: options.verify,
    };
  } finally {
    load.close();
    await ends.close();
  }
}

export function overlapTable(rows: OverlapRow[]): string {
  const ms = (value: number) => (value / 1e3).toFixed(2);
  return table(['path', 'view', 'tokens', 'MB', 'layers a push', 'prefill alone ms', 'with hand-off ms', 'p99 ms', 'TTFT growth'], rows.map((row) => [
    row.path, row.view, row.tokens, (row.bytes / 1e6).toFixed(1), row.layers_per_push, ms(row.prefill_alone_us.p50), ms(row.with_handoff_us.p50), ms(row.with_handoff_us.p99),
    `${(100 * row.growth).toFixed(2)} %`,
  ]), ['left', 'left', ...Array.from({ length: 7 }, () => 'right' as const)]);
}
