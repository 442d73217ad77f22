/** Finds the first stop string in text that comes in pieces. Text that may still turn out to begin one is held back, so no part of a stop string is ever let out. */
export class StopStrings {
  readonly #stops: readonly string[];
  #held = '';

  constructor(stops: readonly string[]) {
    this.#stops = stops;
  }

  /** Text that may be let out now, and whether a stop string followed it; after that nothing more may be pushed. */
  push(piece: string): { text: string; stopped: boolean } {
    const text = this.#held + piece;
    const found = Math.min(...this.#stops.map((stop) => text.indexOf(stop)).map((at) => (at < 0 ? Infinity : at)));
    if (found !== Infinity) {
      this.#held = '';
      return { text: text.slice(0, found), stopped: true };
    }
    const keep = Math.max(0, ...this.#stops.map((stop) => beginning(text, stop)));
    this.#held = text.slice(text.length - keep);
    return { text: text.slice(0, text.length - keep), stopped: false };
  }

  /** What is still held back when the text ends. */
  flush(): string {
    const text = this.#held;
    this.#held = '';
    return text;
  }
}

/** Length of the longest end of `text` that is a proper beginning of `stop`. */
function beginning(text: string, stop: string): number {
  for (let length = Math.min(text.length, stop.length - 1); length > 0; length--) {
    if (text.endsWith(stop.slice(0, length))) return length;
  }
  return 0;
}
