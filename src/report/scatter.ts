/** One mark of a scatter plot. */
export interface Mark {
  x: number;
  y: number;
  label: string;
  /** Marks of one series share a colour and, where `line`, are joined in order of x. */
  series: string;
}

export interface ScatterOptions {
  title: string;
  xLabel: string;
  yLabel: string;
  /** Series whose marks are joined. */
  lines?: string[];
}

const WIDTH = 860;
const HEIGHT = 520;
const MARGIN = { left: 84, right: 210, top: 44, bottom: 60 };
const COLOURS = ['#4269d0', '#efb118', '#ff725c', '#6cc5b0', '#3ca951', '#a463f2', '#97bbf5', '#9c6b4e', '#ff8ab7', '#9498a0'];

/** An SVG scatter plot with a logarithmic y axis: values over orders of magnitude against a linear x. */
export function scatter(marks: Mark[], options: ScatterOptions): string {
  const positive = marks.filter(({ y }) => y > 0);
  const [low, high] = [Math.floor(Math.log10(Math.min(...positive.map(({ y }) => y)))), Math.ceil(Math.log10(Math.max(...positive.map(({ y }) => y))))];
  const decades = Math.max(1, high - low);
  const xs = marks.map(({ x }) => x);
  const pad = Math.max(1, (Math.max(...xs) - Math.min(...xs)) * 0.05);
  const [left, right] = [Math.min(...xs) - pad, Math.max(...xs) + pad];
  const inner = { width: WIDTH - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
  const px = (x: number) => MARGIN.left + ((x - left) / (right - left)) * inner.width;
  const py = (y: number) => MARGIN.top + (1 - (Math.log10(Math.max(y, 10 ** low)) - low) / decades) * inner.height;
  const series = [...new Set(marks.map(({ series: name }) => name))];
  const colour = (name: string) => COLOURS[series.indexOf(name) % COLOURS.length]!;

  const parts: string[] = [];
  for (let decade = low; decade <= low + decades; decade++) {
    const y = py(10 ** decade);
    parts.push(line(MARGIN.left, y, WIDTH - MARGIN.right, y, '#e3e3e3'), text(MARGIN.left - 8, y + 4, `1e${decade}`, 'end'));
  }
  for (const x of ticks(left, right)) parts.push(line(px(x), HEIGHT - MARGIN.bottom, px(x), HEIGHT - MARGIN.bottom + 5, '#888'), text(px(x), HEIGHT - MARGIN.bottom + 20, String(x), 'middle'));
  parts.push(line(MARGIN.left, HEIGHT - MARGIN.bottom, WIDTH - MARGIN.right, HEIGHT - MARGIN.bottom, '#888'));
  for (const name of options.lines ?? []) {
    const points = marks.filter((mark) => mark.series === name).sort((a, b) => a.x - b.x);
    if (points.length > 1) parts.push(`<polyline fill="none" stroke="${colour(name)}" stroke-width="1.5" points="${points.map(({ x, y }) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(' ')}"/>`);
  }
  for (const mark of marks) {
    parts.push(`<circle cx="${px(mark.x).toFixed(1)}" cy="${py(mark.y).toFixed(1)}" r="4.5" fill="${colour(mark.series)}"><title>${escape(`${mark.label}: ${mark.y.toPrecision(3)} at ${mark.x}`)}</title></circle>`);
  }
  series.forEach((name, i) => {
    const y = MARGIN.top + 10 + i * 20;
    parts.push(`<circle cx="${WIDTH - MARGIN.right + 20}" cy="${y - 4}" r="4.5" fill="${colour(name)}"/>`, text(WIDTH - MARGIN.right + 32, y, name, 'start'));
  });
  parts.push(
    text(WIDTH / 2 - 60, 24, options.title, 'middle', 15),
    text(MARGIN.left + inner.width / 2, HEIGHT - 16, options.xLabel, 'middle'),
    `<g transform="translate(22 ${MARGIN.top + inner.height / 2}) rotate(-90)">${text(0, 0, options.yLabel, 'middle')}</g>`,
  );
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" font-family="sans-serif" font-size="12">\n<rect width="${WIDTH}" height="${HEIGHT}" fill="#fff"/>\n${parts.join('\n')}\n</svg>\n`;
}

/** Round numbers inside a range, about six of them. */
function ticks(low: number, high: number): number[] {
  const raw = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw)!;
  const out: number[] = [];
  for (let x = Math.ceil(low / step) * step; x <= high; x += step) out.push(Number(x.toPrecision(12)));
  return out;
}

function line(x1: number, y1: number, x2: number, y2: number, stroke: string): string {
  return `<line x1="${x1.toFixed(1)}" y1="${y1.toFixed(1)}" x2="${x2.toFixed(1)}" y2="${y2.toFixed(1)}" stroke="${stroke}"/>`;
}

function text(x: number, y: number, content: string, anchor: string, size = 12): string {
  return `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" text-anchor="${anchor}" font-size="${size}" fill="#333">${escape(content)}</text>`;
}

function escape(content: string): string {
  return content.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
}
