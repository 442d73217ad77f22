/**
 * LMCache's experiment: the KV of 7,500 tokens moved as 16-token pieces and as 128-token slabs (published there: 20 ms and 8 ms), each piece a
 * call of its own; beside it what one pass over the same pages takes, left as they are or gathered into slabs on the way.
 */
import { table } from '../../report/table.js';
import type { KvLayout } from '../../native/types.js';
import { canonical, inGroupsOf, type BenchCase, type KvShape } from './cases.js';
import { isPlain, type BenchRow } from './rows.js';

const PAGE = 16;
const SLAB = 128;

interface Way {
  heading: string;
  sourcePage: number;
  targetPage: number;
  isPiecewise: boolean;
}

const WAYS: Way[] = [
  { heading: `${PAGE}-token pages, a call each`, sourcePage: PAGE, targetPage: PAGE, isPiecewise: true },
  { heading: `${SLAB}-token slabs, a call each`, sourcePage: SLAB, targetPage: SLAB, isPiecewise: true },
  { heading: `${PAGE}-token pages, one pass`, sourcePage: PAGE, targetPage: PAGE, isPiecewise: false },
  { heading: `${PAGE}-token pages into slabs, one pass`, sourcePage: PAGE, targetPage: SLAB, isPiecewise: false },
];

/** `groupsOf`: the layers of each push of one pass. */
export function collationCases(paths: string[], shape: KvShape, tokens: number, groupsOf: (path: string, target: KvLayout) => [number, number][]): BenchCase[] {
  return paths.flatMap((path) => WAYS.map(({ sourcePage, targetPage, isPiecewise }): BenchCase => {
    const target = canonical(shape, 'bf16', targetPage);
    const push = isPiecewise ? { layers: inGroupsOf(1, shape.layers), tokens: sourcePage } : { layers: groupsOf(path, target), tokens };
    return { path, tokens, view: 'mla', direction: 'push', inFlight: 1, source: canonical(shape, 'bf16', sourcePage), target, push };
  }));
}

/** Milliseconds until the last byte is in place, a line a path; in brackets GB/s. */
export function collationTable(rows: BenchRow[]): string {
  const setups = [...new Set(rows.map(({ setup }) => setup))];
  const body = setups.map((setup) => {
    const own = rows.filter((row) => row.setup === setup);
    const handoffs = own.filter((row) => !isPlain(row));
    const plain = own.filter(isPlain).map(({ gb_per_s }) => gb_per_s);
    return [handoffs[0]!.path, ...WAYS.map((way) => cell(handoffs.find((row) => isOf(row, way)))), Math.max(...plain).toFixed(2)];
  });
  return table(['path', ...WAYS.map(({ heading }) => heading), 'plain copy GB/s'], body, ['left', ...WAYS.map(() => 'right' as const), 'right']);
}

function isOf(row: BenchRow, { sourcePage, targetPage, isPiecewise }: Way): boolean {
  return row.source_page_tokens === sourcePage && row.target_page_tokens === targetPage && (row.tokens_per_push === sourcePage) === isPiecewise;
}

const cell = (row: BenchRow | undefined) => (row ? `${(row.put_us.p50 / 1e3).toFixed(2)} ms (${row.gb_per_s.toFixed(2)})` : '');
