/** The demo model's tokenizer and chat template against what transformers made of them; see test/goldens/README.md. */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { ChatTemplate, type ChatMessage } from '../../src/model/chat_template.js';
import { Tokenizer } from '../../src/model/tokenizer.js';

const test = suite('model/tokenizer goldens');
const root = fileURLToPath(new URL('../..', import.meta.url));
const goldens = JSON.parse(readFileSync(`${root}/test/goldens/demo/tokenizer.json`, 'utf8')) as {
  strings: { text: string; ids: number[]; ids_with_special: number[]; decoded: string }[];
  chats: { messages: ChatMessage[]; add_generation_prompt: boolean; text: string; ids: number[] }[];
};
const tokenizer = Tokenizer.load(`${root}/models/demo`);

test('strings to ids and back', async () => {
  for (const { text, ids, ids_with_special, decoded } of goldens.strings) {
    assert.equal(await tokenizer.encode(text, { addSpecialTokens: false }), ids, text);
    assert.equal(await tokenizer.encode(text), ids_with_special, text);
    assert.is(tokenizer.decode(ids, { skipSpecialTokens: false }), decoded);
  }
});

test('one token at a time gives the same text', () => {
  for (const { ids, decoded } of goldens.strings) {
    const stream = tokenizer.stream({ skipSpecialTokens: false });
    assert.is(ids.map((id) => stream.push(id)).join('') + stream.flush(), decoded);
  }
});

test('chats', async () => {
  const template = ChatTemplate.load(`${root}/models/demo`)!;
  for (const { messages, add_generation_prompt, text, ids } of goldens.chats) {
    assert.is(template.render(messages, { addGenerationPrompt: add_generation_prompt }), text);
    assert.equal(await tokenizer.encode(text, { addSpecialTokens: false }), ids);
  }
});

test.run();
