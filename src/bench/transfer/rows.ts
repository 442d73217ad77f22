/** Results: one object a row, and how rows become a table, CSV and a plot. */
import { scatter } from '../../report/scatter.js';
import { table } from '../../report/table.js';
import type { StorageMechanism } from '../../native/types.js';
import type { HandoffDirection, TransferPath } from '../../transfer/types.js';
import { pieces, type BenchCase, type StorageDirection } from './cases.js';
import { median, summarise, type Latency } from './statistics.js';

/** memcpy over all cores, one GPU copy, TCP sockets (as many as the hand-off has) whose reader throws the bytes away, or one file from begin to end. */
export type Baseline = 'memcpy' | 'gpu-copy' | 'sockets' | 'file';

/** What a row is about: known before it is run. */
export interface RowShape {
  /** Name of the path that was set up. */
  setup: string;
  direction: HandoffDirection | StorageDirection;
  view: string;
  tokens: number;
  layers: number;
  source_page_tokens: number;
  target_page_tokens: number;
  source_dtype: string;
  target_dtype: string;
  /** Text where pushes differ by more than the last being smaller: `46+12+3`. */
  layers_per_push: number | string;
  tokens_per_push: number;
  /** Requests under way at a time. */
  in_flight: number;
  piece_bytes: number;
  pieces: number;
}

export interface BenchRow extends RowShape {
  /** The path that the hand-off stated, what moved blocks to or from a disk, or what copied plainly. */
  path: TransferPath | StorageMechanism | `plain-${Baseline}`;
  /** Of one request: put into decode's pages, and what travelled for it. */
  bytes: number;
  wire_bytes: number;
  /** Bytes of all requests under way over the median time until the last of them is in place; GB is 1e9. */
  gb_per_s: number;
  single_copy_gb_per_s: number;
  fraction_of_single_copy: number;
  /** From the first push to decode's word that all is verified and accepted; of one request. */
  latency_us: Latency;
  /** The same until decode accepted, without the way of its word back; null where the two ends share no clock. */
  accepted_us: Latency | null;
  /** Reserving pages and opening the session, before that. */
  prepare_us: Latency;
  /** Time of the calling thread to hand its pushes over. */
  post_us: Latency;
  /** From the first push until the last byte is in place, of all requests under way. */
  put_us: Latency;
  iterations: number;
  /** What carried the bytes, as it says of itself, and where rows left from; of paths that a library carries. */
  carried_by?: string;
  /** Decode's pages, or what came back from the disk, were compared with what they must hold. */
  verified: boolean;
  /** Of path nvme. */
  storage?: StorageState;
}

/** How blocks were kept on a disk. */
export interface StorageState {
  memory: 'host' | 'gpu';
  pages_per_block: number;
  block_bytes: number;
  /** Pieces of a transfer under way where io_uring serves, and transfers at a time. */
  queue_depth: number;
  threads: number;
  /** Past the page cache; else that is what was measured. */
  direct_io: boolean;
  /** Why GPU memory went through host memory, or null. */
  passed_over: string | null;
}

export interface StorageSample {
  bytes: number;
  /** With headers, and what fills the disk's blocks. */
  diskBytes: number;
  postUs: number;
  latencyUs: number;
}

export interface HandoffSample {
  path: TransferPath;
  bytes: number;
  wireBytes: number;
  prepareUs: number;
  postUs: number;
  latencyUs: number;
  acceptedUs: number | null;
}

/** Requests that were under way together. */
export interface HandoffRound {
  samples: HandoffSample[];
  /** From the first push until the last byte of all is in place. */
  putUs: number;
}

export function shapeOfRow(what: BenchCase): RowShape {
  const { bytes, count } = pieces(what);
  const { source, target, push } = what;
  return {
    setup: what.path, direction: what.storage?.direction ?? what.direction, view: what.view, tokens: what.tokens, layers: source.layers,
    source_page_tokens: source.pageTokens, target_page_tokens: target.pageTokens, source_dtype: source.dtype, target_dtype: target.dtype,
    layers_per_push: layersPerPush(push.layers), tokens_per_push: push.tokens, in_flight: what.inFlight, piece_bytes: bytes, pieces: count,
  };
}

function layersPerPush(groups: [number, number][]): number | string {
  const counts = groups.map(([begin, end]) => end - begin);
  const isEven = counts.slice(0, -1).every((count) => count === counts[0]) && counts.at(-1)! <= counts[0]!;
  return isEven ? counts[0]! : counts.join('+');
}

export function handoffRow(what: BenchCase, rounds: HandoffRound[], copy: BenchRow, verified: boolean): BenchRow {
  const samples = rounds.flatMap((round) => round.samples);
  const { path, bytes, wireBytes } = samples[0]!;
  const put = summarise(rounds.map(({ putUs }) => putUs));
  const rate = what.inFlight * bytes / put.p50 / 1e3;
  return {
    path, ...shapeOfRow(what), bytes, wire_bytes: wireBytes,
    gb_per_s: rate, single_copy_gb_per_s: copy.gb_per_s, fraction_of_single_copy: rate / copy.gb_per_s,
    latency_us: summarise(samples.map(({ latencyUs }) => latencyUs)), accepted_us: acceptedOf(samples), prepare_us: summarise(samples.map(({ prepareUs }) => prepareUs)),
    post_us: summarise(samples.map(({ postUs }) => postUs)), put_us: put, iterations: samples.length, verified,
  };
}

function acceptedOf(samples: HandoffSample[]): Latency | null {
  const times = samples.flatMap(({ acceptedUs }) => (acceptedUs === null ? [] : [acceptedUs]));
  return times.length === 0 ? null : summarise(times);
}

/** Blocks to or from a disk; a block that came back has been verified when it counts as there. */
export function storageRow(what: BenchCase, mechanism: StorageMechanism, storage: StorageState, samples: StorageSample[], copy: BenchRow, verified: boolean): BenchRow {
  const latency = summarise(samples.map(({ latencyUs }) => latencyUs));
  const { bytes, diskBytes } = samples[0]!;
  const rate = bytes / latency.p50 / 1e3;
  return {
    path: mechanism, ...shapeOfRow(what), bytes, wire_bytes: diskBytes,
    gb_per_s: rate, single_copy_gb_per_s: copy.gb_per_s, fraction_of_single_copy: rate / copy.gb_per_s,
    latency_us: latency, accepted_us: null, prepare_us: summarise(samples.map(() => 0)), post_us: summarise(samples.map(({ postUs }) => postUs)), put_us: latency,
    iterations: samples.length, verified, storage,
  };
}

/** The plain copy as a row of its own: one piece, nothing prepared. */
export function plainRow(what: BenchCase, kind: Baseline, bytes: number, seconds: number[], storage?: StorageState): BenchRow {
  const times = summarise(seconds.map((time) => time * 1e6));
  const nothing = summarise(seconds.map(() => 0));
  const rate = bytes / median(seconds) / 1e9;
  return {
    path: `plain-${kind}`, ...shapeOfRow(what), piece_bytes: bytes, pieces: 1, bytes, wire_bytes: bytes,
    gb_per_s: rate, single_copy_gb_per_s: rate, fraction_of_single_copy: 1,
    latency_us: times, accepted_us: null, prepare_us: nothing, post_us: nothing, put_us: times, iterations: seconds.length, verified: false,
    ...(storage && { storage }),
  };
}

export const isPlain = ({ path }: BenchRow) => path.startsWith('plain-');

/** nixlbench's columns in its order, then what it has not. */
const HEAD = [
  'piece B', 'pieces', 'GB/s', 'avg µs', 'prep µs', 'prep p99', 'post µs', 'post p99', 'tx µs', 'tx p99',
  'p50 µs', 'p99 µs', 'p99.9 µs', 'wire MB', 'path', 'at decode µs', 'direction', 'view', 'tokens', 'pages', 'dtype', 'of one copy',
];
const TEXT_COLUMNS = new Set(['path', 'direction', 'view', 'pages', 'dtype', 'of one copy']);

export function tableOf(rows: BenchRow[]): string {
  const us = (value: number) => value.toFixed(value < 100 ? 1 : 0);
  return table(HEAD, rows.map((row) => [
    row.piece_bytes, row.pieces, row.gb_per_s.toFixed(2), us(row.latency_us.avg), us(row.prepare_us.avg), us(row.prepare_us.p99),
    us(row.post_us.avg), us(row.post_us.p99), us(row.put_us.avg), us(row.put_us.p99),
    us(row.latency_us.p50), us(row.latency_us.p99), us(row.latency_us.p999), (row.wire_bytes / 1e6).toFixed(1), pathOf(row), row.accepted_us ? us(row.accepted_us.p50) : '', directionOf(row), row.view, row.in_flight > 1 ? `${row.in_flight}×${row.tokens}` : row.tokens,
    row.storage ? `${row.storage.pages_per_block}×${row.source_page_tokens}` : `${row.source_page_tokens}→${row.target_page_tokens}`, row.source_dtype === row.target_dtype ? row.source_dtype : `${row.source_dtype}→${row.target_dtype}`,
    isPlain(row) ? '' : `${(100 * row.fraction_of_single_copy).toFixed(0)} %`,
  ]), HEAD.map((name) => (TEXT_COLUMNS.has(name) ? 'left' : 'right')));
}

const pathOf = ({ path, storage }: BenchRow) => (storage?.direct_io === false ? `${path} (page cache)` : path);

function directionOf(row: BenchRow): string {
  if (row.storage) return row.direction === 'write' ? `${row.storage.memory} to file` : `file to ${row.storage.memory}`;
  return isPlain(row) ? '' : row.direction;
}

/** The same order for files; what is not named here follows. */
export const COLUMNS = [
  'piece_bytes', 'pieces', 'gb_per_s', 'latency_us_avg', 'prepare_us_avg', 'prepare_us_p99', 'post_us_avg', 'post_us_p99', 'put_us_avg', 'put_us_p99',
  'latency_us_p50', 'latency_us_p99', 'latency_us_p999', 'wire_bytes', 'path', 'fraction_of_single_copy',
];

type Cell = string | number | boolean | null | undefined;

/** The columns of `first`, then the others; those that only some rows have are empty in the rest. */
export function toCsv(rows: object[], first: string[] = []): string {
  const records = rows.map(flatten);
  const head = [...new Set([...first, ...records.flatMap((record) => Object.keys(record))])];
  return `${[head, ...records.map((record) => head.map((name) => csvCell(record[name])))].map((cells) => cells.join(',')).join('\n')}\n`;
}

function csvCell(value: Cell): string {
  const text = String(value ?? '');
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** `latency_us.p50` becomes the column `latency_us_p50`. */
function flatten(row: object): Record<string, Cell> {
  return Object.fromEntries(Object.entries(row).flatMap(([name, value]) =>
    typeof value === 'object' && value !== null ? Object.entries(value as Record<string, Cell>).map(([part, cell]) => [`${name}_${part}`, cell]) : [[name, value as Cell]]));
}

function seriesOf(row: BenchRow): string {
  if (row.storage) return `${pathOf(row)}, ${directionOf(row)}`;
  return `${row.setup}, ${row.view}${row.direction === 'pull' ? ', pull' : ''}`;
}

/** GB/s against piece size, a line for each path and view. */
export function plotOf(rows: BenchRow[]): string {
  const marks = rows.filter((row) => !isPlain(row)).map((row) => ({
    x: row.piece_bytes / 1024, y: row.gb_per_s, series: seriesOf(row), label: `${row.path} ${row.view}, ${row.tokens} tokens, ${row.source_dtype} to ${row.target_dtype}`,
  }));
  return scatter(marks, { title: 'KV hand-off: bandwidth by piece size', xLabel: 'piece, KiB', yLabel: 'GB/s (1e9)', lines: [...new Set(marks.map(({ series }) => series))] });
}
