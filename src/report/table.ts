import Table from 'cli-table3';

const PLAIN = {
  top: '', 'top-mid': '', 'top-left': '', 'top-right': '',
  bottom: '', 'bottom-mid': '', 'bottom-left': '', 'bottom-right': '',
  left: '', 'left-mid': '', right: '', 'right-mid': '',
  mid: '', 'mid-mid': '', middle: '  ',
};

export type Align = 'left' | 'right';

/** Columns under a heading, without rules or colours, so that it can be read, pasted and cut. */
export function table(head: string[], rows: (string | number)[][], align: Align[] = []): string {
  const drawn = new Table({ head, chars: PLAIN, colAligns: align, style: { head: [], border: [], 'padding-left': 0, 'padding-right': 0 } });
  drawn.push(...rows.map((row) => row.map(String)));
  return trimLines(drawn.toString());
}

/** Facts, one a line: `name  value`. */
export function facts(rows: [string, string | number][]): string {
  const drawn = new Table({ chars: PLAIN, style: { head: [], border: [], 'padding-left': 0, 'padding-right': 0 } });
  drawn.push(...rows.map((row) => row.map(String)));
  return trimLines(drawn.toString());
}

function trimLines(text: string): string {
  return text.split('\n').map((line) => line.trimEnd()).join('\n');
}
