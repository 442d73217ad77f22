import type { FinishReason } from '../../http/openai_types.js';
import type { TextPiece } from '../../http/openai_response.js';
import type { SampledToken } from '../../native/types.js';
import { ChoiceText, codePoints, type Detokenizer } from './choice_text.js';

export type ChoiceEvent =
  | ({ event: 'piece'; index: number } & TextPiece)
  | { event: 'finish'; index: number; reason: FinishReason };

/** One choice of a response: its text so far, when it ends, how fast its tokens came. */
export class Choice {
  readonly #index: number;
  readonly #text: ChoiceText;
  readonly #stopTokens: ReadonlySet<number>;
  /** Prompt text still to be let out before the choice's own. */
  #echo: string;
  #tokens = 0;
  #firstAt = NaN;
  #lastAt = NaN;
  #ended: 'no' | 'by decode' | 'by stop string' = 'no';

  constructor(index: number, detokenizer: Detokenizer, stops: readonly string[], stopTokens: ReadonlySet<number>, echo: string) {
    this.#index = index;
    this.#text = new ChoiceText(detokenizer, stops, codePoints(echo));
    this.#stopTokens = stopTokens;
    this.#echo = echo;
  }

  /** Tokens generated for it, the one that ended it included. */
  get tokens(): number { return this.#tokens; }
  get finished(): boolean { return this.#ended !== 'no'; }
  /** Ended at a stop string, of which decode does not know. */
  get stopped(): boolean { return this.#ended === 'by stop string'; }
  /** Mean time per token after the first; null for fewer than two. */
  get msPerToken(): number | null { return this.#tokens < 2 ? null : (this.#lastAt - this.#firstAt) / (this.#tokens - 1); }

  /** A token that decode sent at `now`; ignored once the choice has ended. */
  *push(sampled: SampledToken, now: number): Generator<ChoiceEvent> {
    if (this.finished) return;
    if (this.#tokens++ === 0) this.#firstAt = now;
    this.#lastAt = now;
    // an end-of-text token has no text; the finish event follows it
    if (this.#stopTokens.has(sampled.token)) return;
    const piece = this.#text.push(sampled);
    if (piece.stopped) this.#ended = 'by stop string';
    yield* this.#piece(piece);
    if (piece.stopped) yield { event: 'finish', index: this.#index, reason: 'stop' };
  }

  /** Decode ended it. */
  *finish(reason: FinishReason): Generator<ChoiceEvent> {
    if (this.finished) return;
    this.#ended = 'by decode';
    const piece = this.#text.finish();
    yield* this.#piece(piece);
    yield { event: 'finish', index: this.#index, reason: piece.stopped ? 'stop' : reason };
  }

  *#piece({ text, tokens }: TextPiece): Generator<ChoiceEvent> {
    const whole = this.#echo + text;
    this.#echo = '';
    if (whole !== '' || tokens.length > 0) yield { event: 'piece', index: this.#index, text: whole, tokens };
  }
}
