import { costOfShape } from './cost.js';
import { label } from './print.js';
import type { BenchRates, BenchResult } from './run.js';
import { describeShape } from './shape.js';

const WIDTH = 960;
const HEIGHT = 600;
const MARGIN = { left: 80, right: 220, top: 50, bottom: 60 };
const COLOURS = ['#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#17becf', '#8c564b', '#e377c2'];

interface Point {
  group: string;
  /** flop per byte */
  intensity: number;
  tflops: number;
  title: string;
  hollow: boolean;
}

/** An SVG with both axes logarithmic: filled points are this run's, hollow ones those of the comparisons. */
export function rooflineSvg(result: BenchResult, rates: BenchRates): string {
  const points = pointsOf(result);
  const groups = [...new Set(points.map(({ group }) => group))];
  const ridge = (rates.matrix_tflops * 1e3) / rates.copy_gb_per_s;
  const x = logScale([...points.map(({ intensity }) => intensity), ridge], MARGIN.left, WIDTH - MARGIN.right);
  const y = logScale([...points.map(({ tflops }) => tflops), rates.matrix_tflops], HEIGHT - MARGIN.bottom, MARGIN.top);
  const roof = (intensity: number) => Math.min(rates.matrix_tflops, (intensity * rates.copy_gb_per_s) / 1e3);
  // The slope enters the picture where it meets the left or the lower edge.
  const enters = Math.max(x.low, (y.low * 1e3) / rates.copy_gb_per_s);
  const corners = [enters, ridge, x.high].map((intensity) => `${x.at(intensity).toFixed(1)},${y.at(roof(intensity)).toFixed(1)}`);
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${HEIGHT}" viewBox="0 0 ${WIDTH} ${HEIGHT}" font-family="sans-serif" font-size="12">`,
    `<rect width="${WIDTH}" height="${HEIGHT}" fill="white"/>`,
    text(MARGIN.left, 26, `Attention on ${escape(result.device.name)}: ${rates.copy_gb_per_s.toFixed(0)} GB/s copy, ${rates.matrix_tflops.toFixed(0)} TFLOP/s matrix rate`, 'font-size="15"'),
    ...x.ticks.map((tick) => line(x.at(tick), MARGIN.top, x.at(tick), HEIGHT - MARGIN.bottom) + text(x.at(tick), HEIGHT - MARGIN.bottom + 18, tickLabel(tick), 'text-anchor="middle"')),
    ...y.ticks.map((tick) => line(MARGIN.left, y.at(tick), WIDTH - MARGIN.right, y.at(tick)) + text(MARGIN.left - 8, y.at(tick) + 4, tickLabel(tick), 'text-anchor="end"')),
    text((MARGIN.left + WIDTH - MARGIN.right) / 2, HEIGHT - 16, 'floating-point operations per byte that must move', 'text-anchor="middle"'),
    `<text transform="translate(22 ${(MARGIN.top + HEIGHT - MARGIN.bottom) / 2}) rotate(-90)" text-anchor="middle">TFLOP/s</text>`,
    `<polyline points="${corners.join(' ')}" fill="none" stroke="black" stroke-width="1.5"/>`,
    ...points.map((point) => circle(x.at(point.intensity), y.at(point.tflops), colour(groups, point.group), point.hollow, point.title)),
    ...groups.map((group, i) => circle(WIDTH - MARGIN.right + 24, MARGIN.top + 10 + i * 20, colour(groups, group), group.includes(': '), group)
      + text(WIDTH - MARGIN.right + 36, MARGIN.top + 14 + i * 20, escape(group))),
    '</svg>',
    '',
  ].join('\n');
}

function pointsOf(result: BenchResult): Point[] {
  return result.rows.flatMap((row): Point[] => {
    if (row.timing === null) return [];
    const { bytes, flops } = costOfShape(row.shape);
    if (bytes === 0 || flops === 0) return [];
    const intensity = flops / bytes;
    const group = label(row.shape);
    const title = (who: string, ms: number) => `${who}: ${describeShape(row.shape)}: ${ms.toFixed(4)} ms`;
    return [
      { group, intensity, tflops: row.timing.tflops, title: title(row.kernel, row.timing.ms), hollow: false },
      ...row.compared.map(({ name, ms }) => ({ group: `${name}: ${group}`, intensity, tflops: flops / ms / 1e9, title: title(name, ms), hollow: true })),
    ];
  });
}

interface LogScale {
  low: number;
  high: number;
  ticks: number[];
  at(value: number): number;
}

/** From the power of ten below the least value to a little above the greatest. */
function logScale(values: number[], from: number, to: number): LogScale {
  const low = 10 ** Math.floor(Math.log10(Math.min(...values) * 0.9));
  const high = Math.max(...values) * 1.5;
  const ticks = [];
  for (let decade = low; decade <= high; decade *= 10) ticks.push(...[1, 2, 5].map((step) => step * decade).filter((tick) => tick <= high));
  const span = Math.log(high / low);
  return { low, high, ticks, at: (value) => from + ((to - from) * Math.log(value / low)) / span };
}

function colour(groups: string[], group: string): string {
  return COLOURS[groups.indexOf(group) % COLOURS.length] as string;
}

function circle(cx: number, cy: number, stroke: string, hollow: boolean, title: string): string {
  return `<circle cx="${cx.toFixed(1)}" cy="${cy.toFixed(1)}" r="4.5" fill="${hollow ? 'white' : stroke}" stroke="${stroke}" stroke-width="1.5"><title>${escape(title)}</title></circle>`;
}

function line(x1: number, y1: number, x2: number, y2: number): string {
  return `<line x1="${x1.toFixed(1)}" y1="${y1.toFixed(1)}" x2="${x2.toFixed(1)}" y2="${y2.toFixed(1)}" stroke="#ddd"/>`;
}

function text(x: number, y: number, content: string, attributes = ''): string {
  return `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" ${attributes}>${content}</text>`;
}

function tickLabel(value: number): string {
  return value >= 1 ? value.toFixed(0) : String(Number(value.toPrecision(1)));
}

function escape(content: string): string {
  return content.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
}
