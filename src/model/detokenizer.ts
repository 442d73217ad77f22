/** What decoding needs to know of a vocabulary. */
export interface TokenBytes {
  tokenBytes(token: number): Uint8Array;
  isSpecial(token: number): boolean;
}

/**
 * Turns generated tokens into text as they come. A character whose bytes are spread over several tokens is held back until it
 * is whole, so the pieces put together are the text, and every piece is valid by itself.
 */
export class Detokenizer {
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  readonly #vocabulary: TokenBytes;
  readonly #skipSpecial: boolean;

  constructor(vocabulary: TokenBytes, skipSpecialTokens: boolean) {
    this.#vocabulary = vocabulary;
    this.#skipSpecial = skipSpecialTokens;
  }

  /** Text that `token` completes; may be empty. */
  push(token: number): string {
    if (this.#skipSpecial && this.#vocabulary.isSpecial(token)) return '';
    return this.#decoder.decode(this.#vocabulary.tokenBytes(token), { stream: true });
  }

  /** The end: an unfinished character becomes U+FFFD. */
  flush(): string {
    return this.#decoder.decode();
  }
}
