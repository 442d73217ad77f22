/** Which (layer, token) cells of a hand-off have arrived. Every cell must arrive once: a second time could replace what was verified. */
export class Coverage {
  readonly #tokens: [number, number];
  /** Per layer, disjoint token ranges in order, none touching the next. */
  readonly #layers: [number, number][][];

  constructor(layers: number, tokens: [number, number]) {
    this.#tokens = tokens;
    this.#layers = Array.from({ length: layers }, () => []);
  }

  /** Adds a rectangle; false, and nothing added, where it leaves the hand-off or overlaps what is there. */
  add([firstLayer, endLayer]: [number, number], [begin, end]: [number, number]): boolean {
    if (firstLayer < 0 || firstLayer >= endLayer || endLayer > this.#layers.length) return false;
    if (begin >= end || begin < this.#tokens[0] || end > this.#tokens[1]) return false;
    const touched = this.#layers.slice(firstLayer, endLayer);
    if (touched.some((ranges) => ranges.some((range) => begin < range[1] && range[0] < end))) return false;
    for (const ranges of touched) insert(ranges, begin, end);
    return true;
  }

  get complete(): boolean {
    const [begin, end] = this.#tokens;
    return this.#layers.every((ranges) => ranges.length === 1 && ranges[0]![0] === begin && ranges[0]![1] === end);
  }

  /** `layer 3 lacks tokens [64, 128)`: the first gap. */
  firstGap(): string {
    const [begin, end] = this.#tokens;
    for (const [layer, ranges] of this.#layers.entries()) {
      const first = ranges[0];
      if (first === undefined) return `layer ${layer} lacks tokens [${begin}, ${end})`;
      if (first[0] > begin) return `layer ${layer} lacks tokens [${begin}, ${first[0]})`;
      if (first[1] < end) return `layer ${layer} lacks tokens [${first[1]}, ${ranges[1]?.[0] ?? end})`;
    }
    return 'nothing is missing';
  }
}

/** Inserts a range that overlaps none, joining neighbours it touches. */
function insert(ranges: [number, number][], begin: number, end: number): void {
  let at = ranges.findIndex((range) => range[0] >= end);
  if (at < 0) at = ranges.length;
  const before = ranges[at - 1];
  const after = ranges[at];
  const joinsBefore = before !== undefined && before[1] === begin;
  const joinsAfter = after !== undefined && after[0] === end;
  if (joinsBefore && joinsAfter) {
    before[1] = after[1];
    ranges.splice(at, 1);
  } else if (joinsBefore) {
    before[1] = end;
  } else if (joinsAfter) {
    after[0] = begin;
  } else {
    ranges.splice(at, 0, [begin, end]);
  }
}
