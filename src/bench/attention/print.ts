import { facts, table, type Align } from '../../report/table.js';
import type { BenchResult, BenchRow } from './run.js';
import type { AttentionShape } from './shape.js';
import { labelOfVariants } from './variants.js';

/** Times beside the row's own, which only some kinds of shape have. */
interface ExtraColumn {
  title: string;
  of: 'serial_ms' | 'serial_ratio' | 'absorbed_ms' | 'unabsorbed_ms' | 'choice_ratio';
  show: (value: number) => string;
}

const EXTRA: ExtraColumn[] = [
  { title: 'serial', of: 'serial_ms', show: (ms) => ms.toFixed(4) },
  { title: '× serial', of: 'serial_ratio', show: (ratio) => ratio.toFixed(2) },
  { title: 'absorbed', of: 'absorbed_ms', show: (ms) => ms.toFixed(4) },
  { title: 'un-absorbed', of: 'unabsorbed_ms', show: (ms) => ms.toFixed(4) },
  { title: 'of faster', of: 'choice_ratio', show: percent },
];

/** The results for a person to read. */
export function printResults(result: BenchResult): string {
  const { device, rates } = result;
  const about: [string, string][] = [['device', device.capability === null ? device.name : `${device.name}, compute capability ${device.capability}, ${device.multiprocessors} SMs`]];
  if (rates) {
    about.push(['copy', `${rates.copy_gb_per_s.toFixed(0)} GB/s, read + written`]);
    about.push(['matrix', `${rates.matrix_tflops.toFixed(rates.matrix_tflops < 10 ? 2 : 0)} TFLOP/s (${rates.matrix_source})`]);
  }
  for (const { name, rows, matched } of result.comparisons) about.push([name, matched === 0 ? `none of its ${rows} rows for ${device.gpu} has a shape of this run` : `${matched} of its ${rows} rows for ${device.gpu} match`]);
  return `${facts(about)}\n\n${rowTable(result)}`;
}

function rowTable(result: BenchResult): string {
  const timed = result.rows.some((row) => row.timing !== null);
  const extra = timed ? EXTRA.filter(({ of }) => result.rows.some((row) => row.timing !== null && row.timing[of] !== null)) : [];
  const names = result.comparisons.filter(({ matched }) => matched > 0).map(({ name }) => name);
  const head = ['shape', 'heads', 'batch', 'kv', 'q', 'kernel'];
  const align: Align[] = ['left', 'right', 'right', 'right', 'right', 'left'];
  if (timed) {
    head.push('ms', 'GB/s', 'TFLOP/s', 'of copy', 'of matrix', ...names.map((name) => `× ${name}`));
    align.push('right', 'right', 'right', 'right', 'right', ...names.map(() => 'right' as const));
  }
  head.push(...extra.map(({ title }) => title));
  align.push(...extra.map(() => 'right' as const));
  head.push('error', 'check');
  align.push('right', 'left');
  return table(head, result.rows.map((row) => cells(row, timed, extra, names)), align);
}

function cells(row: BenchRow, timed: boolean, extra: ExtraColumn[], names: string[]): (string | number)[] {
  const { shape, timing } = row;
  const before = [label(shape), ...sizes(shape), row.kernel];
  const times = !timed ? [] : timing === null ? ['', '', '', '', '', ...names.map(() => '')] : [
    timing.ms.toFixed(4), timing.gb_per_s.toFixed(timing.gb_per_s < 10 ? 2 : 0), timing.tflops.toFixed(timing.tflops < 10 ? 2 : 0), percent(timing.copy_fraction), percent(timing.mfu),
    ...names.map((name) => row.compared.find((one) => one.name === name)?.ratio?.toFixed(2) ?? ''),
  ];
  const others = extra.map(({ of, show }) => (timing === null || timing[of] === null ? '' : show(timing[of])));
  return [...before, ...times, ...others, row.check === null ? '' : row.check.worstRow.toExponential(1), row.verdict];
}

/** Heads, batch, tokens, query tokens. */
function sizes(shape: AttentionShape): (string | number)[] {
  if (shape.kind === 'pod') {
    const decode = sizes(shape.decode);
    return sizes(shape.prefill).map((size, i) => `${size} + ${decode[i]}`);
  }
  return [shape.heads, shape.kvLens.length, span(shape.kvLens), span(shape.qLens)];
}

/** Widths and what departs from the plain case. */
export function label(shape: AttentionShape): string {
  if (shape.kind === 'pod') return `${label(shape.prefill)} + ${label(shape.decode)}`;
  if (shape.kind === 'prefill') return `prefill ${shape.keyDim}/${shape.valueDim}${shape.causal ? '' : ' full'}`;
  if (shape.kind === 'chunk') {
    return `chunk${shape.kvDType === 'bf16' ? '' : ` ${shape.kvDType}`}${shape.page === 64 ? '' : ` page ${shape.page}`}${shape.causal ? '' : ' full'}`;
  }
  if (shape.kind === 'gqa') {
    return `gqa ${shape.headDim}, ${shape.heads / shape.kvHeads} to a KV head${shape.page === 64 ? '' : ` page ${shape.page}`}${shape.layout === 'nhd' ? '' : ` ${shape.layout}`}${labelOfVariants(shape.variants)}`;
  }
  return `decode ${shape.latent}+${shape.rope}${shape.kvDType === 'bf16' ? '' : ` ${shape.kvDType}`}${shape.page === 64 ? '' : ` page ${shape.page}`}${shape.latentScale ? ' scaled' : ''}${labelOfVariants(shape.variants)}`;
}

function span(lens: number[]): string {
  const least = Math.min(...lens);
  const most = Math.max(...lens);
  return least === most ? String(least) : `${least}..${most}`;
}

function percent(fraction: number): string {
  return `${(fraction * 100).toFixed(1)} %`;
}
