import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Tokenizer as HfTokenizer } from 'tokenizers';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import { Tokenizer } from '../../src/model/tokenizer.js';
import { byteToken, writeTokenizer } from '../support/tokenizer.js';

const test = suite('model/tokenizer');
const dir = mkdtempSync(join(tmpdir(), 'tpla-tokenizer-'));
const TEXTS = ['', 'the inner tether', ' \n\ttabs', 'naïve café', '日本語のテキスト', '🙂👩‍👩‍👧 emoji', 'a\u0000b\uFEFFc', '<think>x</think>'];

test.before(() => writeTokenizer(dir));
test.after(() => rmSync(dir, { recursive: true }));

test('texts survive encoding and decoding, as the library decodes them', async () => {
  const tokenizer = Tokenizer.load(dir);
  const hf = HfTokenizer.fromFile(join(dir, 'tokenizer.json'));
  for (const text of TEXTS) {
    const ids = await tokenizer.encode(text);
    assert.is(ids[0], tokenizer.bosTokenId);
    assert.is(tokenizer.decode(ids), text);
    assert.is(tokenizer.decode(ids), await hf.decode(ids, true));
    assert.is(tokenizer.decode(ids, { skipSpecialTokens: false }), await hf.decode(ids, false));
  }
});

test('merges apply; add_bos_token rules the first token', async () => {
  const tokenizer = Tokenizer.load(dir);
  assert.equal(await tokenizer.encode(' the', { addSpecialTokens: false }), [tokenizer.tokenId('Ġthe')]);
  assert.equal(await tokenizer.encode('<｜begin▁of▁sentence｜>in'), [0, tokenizer.tokenId('in')]);
  writeTokenizer(dir, { add_bos_token: false });
  assert.equal(await Tokenizer.load(dir).encode('in'), [tokenizer.tokenId('in')]);
  writeTokenizer(dir);
});

test('any token sequence decodes as the library decodes it, invalid UTF-8 included', async () => {
  const tokenizer = Tokenizer.load(dir);
  const hf = HfTokenizer.fromFile(join(dir, 'tokenizer.json'));
  let state = 7;
  for (let round = 0; round < 200; round++) {
    const ids = Array.from({ length: 1 + (round % 12) }, () => (state = (state * 1103515245 + 12345) & 0x7fffffff) % tokenizer.vocabSize);
    assert.is(tokenizer.decode(ids, { skipSpecialTokens: false }), await hf.decode(ids, false), ids.join(' '));
  }
});

test('a stream holds a character back until its bytes are complete', () => {
  const tokenizer = Tokenizer.load(dir);
  const stream = tokenizer.stream();
  const pieces = Array.from(new TextEncoder().encode('é🙂x'), (byte) => stream.push(byteToken(byte)));
  assert.equal(pieces, ['', 'é', '', '', '', '🙂', 'x']);
  assert.is(stream.push(byteToken(0xf0)), '');
  assert.is(stream.flush(), '\uFFFD');
});

test('special tokens are skipped or shown; unknown ids are nothing', () => {
  const tokenizer = Tokenizer.load(dir);
  assert.ok(tokenizer.isSpecial(1));
  assert.not(tokenizer.isSpecial(tokenizer.tokenId('<think>')!));
  assert.is(tokenizer.decode([0, byteToken(65), 1, 99999]), 'A');
  assert.is(tokenizer.decode([byteToken(65), 1], { skipSpecialTokens: false }), 'A<｜end▁of▁sentence｜>');
});

test('what cannot be read is refused in one line', () => {
  const refusal = (change: (json: Record<string, unknown>) => unknown) => {
    const bad = mkdtempSync(join(dir, 'bad-'));
    const json = JSON.parse(readFileSync(join(dir, 'tokenizer.json'), 'utf8')) as Record<string, unknown>;
    writeFileSync(join(bad, 'tokenizer.json'), JSON.stringify(change(json)));
    try {
      Tokenizer.load(bad);
    } catch (error) {
      return error as TplaError;
    }
    throw new Error('accepted');
  };
  const metaspace = refusal((json) => ({ ...json, decoder: { type: 'Metaspace', replacement: '▁', prepend_scheme: 'always', split: true } }));
  assert.is(metaspace.code, 'MODEL_UNSUPPORTED');
  assert.match(metaspace.message, 'decoder Metaspace; supported: ByteLevel');
  assert.is(refusal((json) => ({ ...json, model: { type: 'Nothing' } })).code, 'CHECKPOINT_INVALID');
  const empty = mkdtempSync(join(dir, 'empty-'));
  writeFileSync(join(empty, 'tiktoken.model'), '');
  assert.throws(() => Tokenizer.load(empty), /no such file\. tiktoken\.model is not read/);
});

test.run();
