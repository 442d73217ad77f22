import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

/** Tokens 0 and 1, as in DeepSeek's vocabulary. */
export const BOS = '<｜begin▁of▁sentence｜>';
export const EOS = '<｜end▁of▁sentence｜>';
const MERGES = ['Ġ t', 'h e', 'Ġt he', 'i n', 'e r'];

/** Token ids of the single bytes: 2 + byte, in the order of the byte-level alphabet's bytes. */
export function byteToken(byte: number): number {
  return 2 + byte;
}

/** A byte-level BPE with a handful of merges: every text can be encoded, some tokens are half a character. */
export function writeTokenizer(dir: string, config: Record<string, unknown> = {}): void {
  const vocab: Record<string, number> = { [BOS]: 0, [EOS]: 1 };
  for (let byte = 0, next = 0x100; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    vocab[String.fromCodePoint(printable ? byte : next++)] = byteToken(byte);
  }
  for (const merge of MERGES) vocab[merge.replace(' ', '')] = Object.keys(vocab).length;
  const special = (id: number, content: string) => ({ id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true });
  const json = {
    version: '1.0', truncation: null, padding: null,
    added_tokens: [special(0, BOS), special(1, EOS), { ...special(vocab.er! + 1, '<think>'), special: false }],
    normalizer: null,
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
    post_processor: null,
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: { type: 'BPE', dropout: null, unk_token: null, continuing_subword_prefix: null, end_of_word_suffix: null, fuse_unk: false, byte_fallback: false, ignore_merges: false, vocab, merges: MERGES },
  };
  mkdirSync(dir, { recursive: true });
  writeFileSync(join(dir, 'tokenizer.json'), JSON.stringify(json));
  writeFileSync(join(dir, 'tokenizer_config.json'), JSON.stringify({ add_bos_token: true, bos_token: { __type: 'AddedToken', content: BOS }, eos_token: EOS, ...config }));
}
