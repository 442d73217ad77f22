import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Tokenizer } from '../../../src/model/tokenizer.js';
import { ChoiceText } from '../../../src/roles/router/choice_text.js';
import { tokensOf } from '../../support/fake_workers.js';
import { writeTokenizer } from '../../support/tokenizer.js';

const test = suite('roles/router/choice_text');
const dir = mkdtempSync(join(tmpdir(), 'tpla-choice-'));
writeTokenizer(dir);
const tokenizer = Tokenizer.load(dir);
test.after(() => rmSync(dir, { recursive: true }));

function run(text: string, stops: string[], offset = 0) {
  const choice = new ChoiceText(tokenizer.stream(), stops, offset);
  const pieces: { text: string; tokens: { sampled: { token: number }; offset: number }[] }[] = [];
  for (const token of tokensOf(text)) {
    const piece = choice.push({ token, logprob: 0, top: [] });
    pieces.push(piece);
    if (piece.stopped) return { pieces, stopped: true };
  }
  const last = choice.finish();
  return { pieces: [...pieces, last], stopped: last.stopped };
}

test('pieces add up to the text, and every token is reported once, in order', () => {
  const { pieces } = run('héllo 🙂', ['llx']);
  assert.is(pieces.map(({ text }) => text).join(''), 'héllo 🙂');
  assert.equal(pieces.flatMap(({ tokens }) => tokens.map(({ sampled }) => sampled.token)), tokensOf('héllo 🙂'));
});

test('offsets are code points from the start of the choice, an echoed prompt included', () => {
  const { pieces } = run('a🙂b', [], 10);
  assert.equal(pieces.flatMap(({ tokens }) => tokens.map(({ offset }) => offset)), [10, 11, 11, 11, 11, 12]);
});

test('a token is reported with the piece in which its text ends', () => {
  const { pieces } = run('abx', ['aby']);
  assert.equal(pieces.map(({ text, tokens }) => [text, tokens.length]), [['', 0], ['', 0], ['abx', 3], ['', 0]]);
});

test('tokens of a stop string are not reported; those before are', () => {
  const { pieces, stopped } = run('ok STOP', ['STOP']);
  assert.ok(stopped);
  assert.is(pieces.map(({ text }) => text).join(''), 'ok ');
  assert.is(pieces.flatMap(({ tokens }) => tokens).length, 3);
});

test('half a character at the end becomes a replacement character', () => {
  const choice = new ChoiceText(tokenizer.stream(), []);
  choice.push({ token: tokensOf('é')[0]!, logprob: 0, top: [] });
  assert.is(choice.finish().text, '\ufffd');
});

test.run();
