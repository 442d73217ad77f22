import type { MachineRates } from '../../native/attention.js';
import { lengthsText } from './rows.js';
import type { BenchResult } from './run.js';

const WIDTH = 860, HEIGHT = 560, LEFT = 70, RIGHT = 24, TOP = 40, BOTTOM = 60;

/** Log-log plot: work per byte against rate, one dot a row, under the two ceilings that were measured on the same GPU. */
export function rooflineSvg(machine: MachineRates, results: readonly BenchResult[]): string {
  const intensities = results.map((result) => result.flops / result.bytes);
  const ridge = machine.matrixFlopsPerSecond / machine.copyBytesPerSecond;
  const low = 2 ** Math.floor(Math.log2(Math.min(ridge, ...intensities) / 2)), high = 2 ** Math.ceil(Math.log2(Math.max(ridge, ...intensities) * 2));
  const peak = machine.matrixFlopsPerSecond / 1e12;
  const bottom = Math.min(...results.map((result) => result.tflops), low * machine.copyBytesPerSecond / 1e12) / 2, top = peak * 1.6;
  const x = (intensity: number) => LEFT + (WIDTH - LEFT - RIGHT) * Math.log(intensity / low) / Math.log(high / low);
  const y = (tflops: number) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * Math.log(tflops / bottom) / Math.log(top / bottom);
  const round = (value: number) => value.toFixed(1);
  const line = (x1: number, y1: number, x2: number, y2: number, style: string) => `<line x1="${round(x1)}" y1="${round(y1)}" x2="${round(x2)}" y2="${round(y2)}" ${style}/>`;
  const text = (atX: number, atY: number, content: string, extra = '') => `<text x="${round(atX)}" y="${round(atY)}" ${extra}>${escape(content)}</text>`;

  const parts: string[] = [];
  for (let intensity = low; intensity <= high; intensity *= 2) {
    parts.push(line(x(intensity), TOP, x(intensity), HEIGHT - BOTTOM, 'stroke="#eee"'), text(x(intensity), HEIGHT - BOTTOM + 18, String(intensity), 'text-anchor="middle"'));
  }
  for (let tflops = 2 ** Math.ceil(Math.log2(bottom)); tflops <= top; tflops *= 2) {
    parts.push(line(LEFT, y(tflops), WIDTH - RIGHT, y(tflops), 'stroke="#eee"'), text(LEFT - 8, y(tflops) + 4, String(tflops), 'text-anchor="end"'));
  }
  const roof = `${round(x(low))},${round(y(low * machine.copyBytesPerSecond / 1e12))} ${round(x(ridge))},${round(y(peak))} ${round(x(high))},${round(y(peak))}`;
  parts.push(`<polyline points="${roof}" fill="none" stroke="#333" stroke-width="2"/>`);
  parts.push(text(x(high) - 4, y(peak) - 8, `${peak.toFixed(0)} TFLOP/s`, 'text-anchor="end"'), text(x(low) + 6, y(low * machine.copyBytesPerSecond / 1e12) - 10, `${(machine.copyBytesPerSecond / 1e12).toFixed(2)} TB/s`));
  results.forEach((result, i) => {
    const label = `${result.kind === 'decode' ? `decode ${result.latent}` : 'prefill'}, batch ${result.batch}, ${result.heads} heads, ${lengthsText(result)} tokens, q ${result.qTokens}: ${result.ms.toFixed(4)} ms`;
    parts.push(`<circle cx="${round(x(intensities[i]!))}" cy="${round(y(result.tflops))}" r="4.5" fill="${result.kind === 'decode' ? '#1668b8' : '#c24a10'}" fill-opacity="0.75"><title>${escape(label)}</title></circle>`);
  });
  parts.push(text(WIDTH / 2, HEIGHT - 16, 'FLOP per byte', 'text-anchor="middle"'), text(16, TOP - 16, `TFLOP/s on ${machine.name}`));
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>\n${parts.join('\n')}\n</svg>\n`;
}

function escape(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
}
