import type { PlacedToken, TextPiece } from '../../http/openai_response.js';
import type { SampledToken } from '../../native/types.js';
import { StopStrings } from './stop_strings.js';

/** Text of a token sequence as it grows; text of a character that is not complete yet is held back. */
export interface Detokenizer {
  push(token: number): string;
  /** Text of what is incomplete when the sequence ends. */
  flush(): string;
}

/**
 * Turns the tokens of one choice into the text a client sees: detokenised, cut at the first stop string, every token reported with the piece
 * that holds the end of its text. Concatenated, the pieces are the choice.
 */
export class ChoiceText {
  readonly #detokenizer: Detokenizer;
  readonly #stops: StopStrings;
  /** UTF-16 units detokenised, and let out. */
  #produced = 0;
  #released = 0;
  /** Code points detokenised. */
  #offset: number;
  /** Tokens not reported yet, with their text's range in UTF-16 units. */
  readonly #waiting: (PlacedToken & { begin: number; end: number })[] = [];

  /** `offset`: code points that precede the choice in its text (an echoed prompt). */
  constructor(detokenizer: Detokenizer, stops: readonly string[], offset = 0) {
    this.#detokenizer = detokenizer;
    this.#stops = new StopStrings(stops);
    this.#offset = offset;
  }

  push(sampled: SampledToken): TextPiece & { stopped: boolean } {
    const text = this.#detokenizer.push(sampled.token);
    this.#waiting.push({ sampled, offset: this.#offset, begin: this.#produced, end: this.#produced + text.length });
    return this.#advance(text);
  }

  /** The rest, when the choice has ended by itself. */
  finish(): TextPiece & { stopped: boolean } {
    const last = this.#advance(this.#detokenizer.flush());
    if (last.stopped) return last;
    const tokens = [...last.tokens, ...this.#waiting.splice(0)];
    return { text: last.text + this.#stops.flush(), tokens: tokens.map(placed), stopped: false };
  }

  #advance(text: string): TextPiece & { stopped: boolean } {
    this.#produced += text.length;
    this.#offset += codePoints(text);
    const out = this.#stops.push(text);
    this.#released += out.text.length;
    // at a stop string, a token that reaches into it from before still has text of its own
    const next = this.#waiting.findIndex(({ begin, end }) => (out.stopped ? begin >= this.#released : end > this.#released));
    const tokens = this.#waiting.splice(0, next < 0 ? this.#waiting.length : next);
    return { text: out.text, tokens: tokens.map(placed), stopped: out.stopped };
  }
}

function placed({ sampled, offset }: PlacedToken): PlacedToken {
  return { sampled, offset };
}

export function codePoints(text: string): number {
  let count = 0;
  for (const _ of text) count++;
  return count;
}
