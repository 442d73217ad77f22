import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import { ChatTemplate } from '../../src/model/chat_template.js';
import { loadGenerationConfig } from '../../src/model/generation_config.js';
import { BOS, EOS, writeTokenizer } from '../support/tokenizer.js';

const test = suite('model/chat_template');
const root = mkdtempSync(join(tmpdir(), 'tpla-chat-'));
test.after(() => rmSync(root, { recursive: true }));

const TEMPLATE = `{{ bos_token }}{% for message in messages %}
  {%- if message['role'] == 'system' %}{{ message['content'] }}
  {%- elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
  {%- elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}
  {%- else %}{{ raise_exception('role ' + message['role'] + ' is not known') }}
  {%- endif %}
{%- endfor %}
{%- if tools %}[{{ tools | length }} tools]{% endif %}
{%- if add_generation_prompt %}<｜Assistant｜>{% if thinking %}<think>{% endif %}{% endif %}`;

function load(config: Record<string, unknown>, files: Record<string, string> = {}): ChatTemplate | null {
  const dir = mkdtempSync(join(root, 'model-'));
  writeTokenizer(dir, config);
  for (const [name, text] of Object.entries(files)) writeFileSync(join(dir, name), text);
  return ChatTemplate.load(dir);
}

const HELLO = [{ role: 'system', content: 'Be brief.' }, { role: 'user', content: 'Hi' }];

test('renders turns with the special tokens of the tokenizer', () => {
  const template = load({ chat_template: TEMPLATE })!;
  assert.is(template.render(HELLO), `${BOS}Be brief.<｜User｜>Hi<｜Assistant｜>`);
  assert.is(template.render([...HELLO, { role: 'assistant', content: 'Yes' }], { addGenerationPrompt: false }), `${BOS}Be brief.<｜User｜>Hi<｜Assistant｜>Yes${EOS}`);
  assert.is(template.render(HELLO, { tools: [{}], variables: { thinking: true } }), `${BOS}Be brief.<｜User｜>Hi[1 tools]<｜Assistant｜><think>`);
});

test('text parts are joined, other parts refused', () => {
  const template = load({ chat_template: TEMPLATE })!;
  assert.is(template.render([{ role: 'user', content: [{ type: 'text', text: 'a' }, { type: 'text', text: 'b' }] }]), `${BOS}<｜User｜>ab<｜Assistant｜>`);
  assert.throws(() => template.render([{ role: 'user', content: [{ type: 'image_url' }] }]), /messages\[0\]\.content: a part of type "image_url"/);
});

test('a file goes before the field; named templates serve tools; none is null', () => {
  assert.is(load({ chat_template: 'field' }, { 'chat_template.jinja': 'file' })!.render(HELLO), 'file');
  const named = load({ chat_template: [{ name: 'default', template: 'plain' }, { name: 'tool_use', template: 'with tools' }] })!;
  assert.is(named.render(HELLO), 'plain');
  assert.is(named.render(HELLO, { tools: [{}] }), 'with tools');
  assert.is(load({}), null);
});

test("the template's refusal is the client's error; a broken template is the checkpoint's", () => {
  const template = load({ chat_template: TEMPLATE })!;
  try {
    template.render([{ role: 'robot', content: '' }]);
    assert.unreachable();
  } catch (error) {
    assert.is((error as TplaError).code, 'REQUEST_INVALID');
    assert.is((error as TplaError).param, 'messages');
    assert.match((error as TplaError).message, 'role robot is not known');
  }
  assert.throws(() => load({ chat_template: '{% if %}' }), (error: TplaError) => error.code === 'CHECKPOINT_INVALID');
});

test('generation_config.json: defaults of the authors, or nothing', () => {
  const dir = mkdtempSync(join(root, 'generation-'));
  assert.equal(loadGenerationConfig(dir), { eosTokenIds: [], temperature: null, topP: null, topK: null, minP: null, repetitionPenalty: null });
  writeFileSync(join(dir, 'generation_config.json'), JSON.stringify({ eos_token_id: [1, 2], do_sample: true, temperature: 0.6, top_p: 0.95 }));
  assert.equal(loadGenerationConfig(dir), { eosTokenIds: [1, 2], temperature: 0.6, topP: 0.95, topK: null, minP: null, repetitionPenalty: null });
  writeFileSync(join(dir, 'generation_config.json'), JSON.stringify({ eos_token_id: 1, do_sample: false, temperature: 0.6 }));
  assert.is(loadGenerationConfig(dir).temperature, 0);
});

test.run();
