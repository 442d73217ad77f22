import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Tokenizer as HfTokenizer } from 'tokenizers';
import { TplaError } from '../errors.js';
import { Detokenizer } from './detokenizer.js';
import { readTokenizerConfig } from './tokenizer_config.js';

/**
 * `tokenizer.json` of a checkpoint. Encoding is the Hugging Face library's, off the event loop; decoding is byte-exact and
 * immediate, since every byte-level token stands for fixed bytes.
 */
export class Tokenizer {
  /** One more than the largest token id. */
  readonly vocabSize: number;
  readonly bosTokenId: number | null;
  readonly eosTokenId: number | null;
  readonly #hf: HfTokenizer;
  readonly #bytes: (Uint8Array | undefined)[];
  readonly #special: Set<number>;
  readonly #addBos: boolean;

  /** Throws CHECKPOINT_INVALID without a readable tokenizer.json, MODEL_UNSUPPORTED for one that is not byte-level. */
  static load(dir: string): Tokenizer {
    const path = join(dir, 'tokenizer.json');
    if (!existsSync(path)) {
      const tiktoken = existsSync(join(dir, 'tiktoken.model')) ? ' tiktoken.model is not read; save the tokenizer with transformers as tokenizer.json.' : '';
      throw new TplaError('CHECKPOINT_INVALID', `${path}: no such file.${tiktoken}`);
    }
    const text = readFileSync(path, 'utf8');
    try {
      return new Tokenizer(HfTokenizer.fromString(text), JSON.parse(text) as TokenizerJson, dir);
    } catch (error) {
      if (error instanceof TplaError) throw error;
      throw new TplaError('CHECKPOINT_INVALID', `${path} is not a tokenizer: ${(error as Error).message}`, { cause: error });
    }
  }

  private constructor(hf: HfTokenizer, json: TokenizerJson, dir: string) {
    requireByteLevel(json, dir);
    const config = readTokenizerConfig(dir);
    this.#hf = hf;
    this.#bytes = [];
    for (const [token, id] of Object.entries(hf.getVocab(true))) this.#bytes[id] = tokenBytes(token);
    this.vocabSize = this.#bytes.length;
    this.#special = new Set((json.added_tokens ?? []).filter(({ special }) => special).map(({ id }) => id));
    this.bosTokenId = config.bosToken === null ? null : hf.tokenToId(config.bosToken);
    this.eosTokenId = config.eosToken === null ? null : hf.tokenToId(config.eosToken);
    this.#addBos = config.addBosToken && this.bosTokenId !== null;
  }

  /**
   * Token ids of a text. With special tokens, what the post-processor adds, and the beginning-of-sequence token where
   * tokenizer_config.json asks for it (`add_bos_token`). A rendered chat template already has its own: encode it without.
   */
  async encode(text: string, options: { addSpecialTokens?: boolean } = {}): Promise<number[]> {
    const addSpecialTokens = options.addSpecialTokens ?? true;
    const ids = (await this.#hf.encode(text, null, { addSpecialTokens })).getIds();
    if (addSpecialTokens && this.#addBos && ids[0] !== this.bosTokenId) ids.unshift(this.bosTokenId!);
    return ids;
  }

  /** Text of tokens; bytes that are not UTF-8 become U+FFFD, unknown ids nothing. */
  decode(tokens: ArrayLike<number>, options: { skipSpecialTokens?: boolean } = {}): string {
    const stream = this.stream(options);
    let text = '';
    for (let i = 0; i < tokens.length; i++) text += stream.push(tokens[i]!);
    return text + stream.flush();
  }

  /** Decodes tokens one at a time as they are generated. */
  stream(options: { skipSpecialTokens?: boolean } = {}): Detokenizer {
    return new Detokenizer(this, options.skipSpecialTokens ?? true);
  }

  /** The bytes a token stands for; empty for an id the vocabulary does not have. */
  tokenBytes(token: number): Uint8Array {
    return this.#bytes[token] ?? new Uint8Array();
  }

  isSpecial(token: number): boolean {
    return this.#special.has(token);
  }

  tokenId(token: string): number | null {
    return this.#hf.tokenToId(token);
  }
}

interface TokenizerJson {
  added_tokens?: { id: number; content: string; special: boolean }[];
  decoder?: { type: string; decoders?: { type: string }[] } | null;
}

function requireByteLevel(json: TokenizerJson, dir: string): void {
  const decoder = json.decoder;
  const stages = decoder?.type === 'Sequence' ? (decoder.decoders ?? []) : decoder ? [decoder] : [];
  const types = stages.map(({ type }) => type).filter((type) => type !== 'Fuse');
  if (types.length === 1 && types[0] === 'ByteLevel') return;
  throw new TplaError('MODEL_UNSUPPORTED', `${join(dir, 'tokenizer.json')}: decoder ${types.join(' + ') || 'none'}; supported: ByteLevel`);
}

// ---------------------------------------------------------------- the byte-level alphabet

/**
 * Byte-level BPE writes each byte as one printable character (Radford et al. 2019): printable Latin-1 stands for itself, the
 * other 68 bytes are U+0100 and up in order.
 */
const CHARACTER_BYTES = new Map<string, number>();
for (let byte = 0, next = 0x100; byte < 256; byte++) {
  const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
  CHARACTER_BYTES.set(String.fromCodePoint(printable ? byte : next++), byte);
}

/** A token with any character outside the alphabet (`<｜begin▁of▁sentence｜>`) is literal text. */
function tokenBytes(token: string): Uint8Array {
  const bytes = Array.from(token, (character) => CHARACTER_BYTES.get(character));
  return bytes.includes(undefined) ? new TextEncoder().encode(token) : Uint8Array.from(bytes as number[]);
}
