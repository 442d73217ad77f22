import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError, type ErrorCode } from '../../src/errors.js';
import { readChat, readCompletion, type RequestLimits } from '../../src/http/openai_request.js';

const limits: RequestLimits = {
  vocabSize: 320,
  defaults: { temperature: 0.7, topK: 0, topP: 1, minP: 0, repetitionPenalty: 1 },
  serves: (model) => model === 'tiny',
};
const completion = { model: 'tiny', prompt: 'x' };
const chat = { model: 'tiny', messages: [{ role: 'user', content: 'x' }] };

function refusal(read: () => unknown): { code: ErrorCode; param: string | null; message: string } {
  try {
    read();
  } catch (error) {
    assert.instance(error, TplaError);
    const { code, param, message } = error as TplaError;
    return { code, param, message };
  }
  throw new Error('it was accepted');
}

/** What is wrong, the field that must be named, and a word of the message. */
const BAD_COMPLETIONS: [Record<string, unknown>, string, RegExp][] = [
  [{ model: undefined }, 'model', /required/],
  [{ model: 7 }, 'model', /must be a string; got 7/],
  [{ prompt: undefined }, 'prompt', /required/],
  [{ prompt: null }, 'prompt', /required/],
  [{ prompt: 5 }, 'prompt', /string, an array of strings/],
  [{ prompt: [] }, 'prompt', /empty/],
  [{ prompt: [1, 'x'] }, 'prompt[1]', /token id.*got "x"/],
  [{ prompt: [1, 320] }, 'prompt[1]', /from 0 to 319; got 320/],
  [{ prompt: [1.5] }, 'prompt[0]', /got 1.5/],
  [{ prompt: [-1] }, 'prompt[0]', /got -1/],
  [{ prompt: ['a', [1]] }, 'prompt[1]', /another kind/],
  [{ prompt: [[1], []] }, 'prompt[1]', /non-empty/],
  [{ prompt: [[1], [2, null]] }, 'prompt[1][1]', /token id/],
  [{ prompt: Array(300).fill('a') }, 'prompt', /300 prompts.*256/],
  [{ max_tokens: 0 }, 'max_tokens', /at least 1; got 0/],
  [{ max_tokens: 1.5 }, 'max_tokens', /whole number/],
  [{ max_tokens: '5' }, 'max_tokens', /got "5"/],
  [{ n: 0 }, 'n', /at least 1 and at most 128/],
  [{ n: 129 }, 'n', /at most 128/],
  [{ best_of: 2 }, 'best_of', /equals n/],
  [{ temperature: -0.1 }, 'temperature', /at least 0 and at most 2/],
  [{ temperature: 2.1 }, 'temperature', /at most 2/],
  [{ temperature: Infinity }, 'temperature', /Infinity/],
  [{ top_p: 0 }, 'top_p', /above 0/],
  [{ top_k: -2 }, 'top_k', /at least -1/],
  [{ min_p: 1.1 }, 'min_p', /at most 1/],
  [{ repetition_penalty: 0 }, 'repetition_penalty', /above 0/],
  [{ presence_penalty: 3 }, 'presence_penalty', /at most 2/],
  [{ frequency_penalty: 'high' }, 'frequency_penalty', /a number/],
  [{ seed: 0.5 }, 'seed', /whole number/],
  [{ logit_bias: [1] }, 'logit_bias', /JSON object/],
  [{ logit_bias: { hello: 1 } }, 'logit_bias', /got the key "hello"/],
  [{ logit_bias: { 320: 1 } }, 'logit_bias', /below 320/],
  [{ logit_bias: { 3: 101 } }, 'logit_bias.3', /at most 100/],
  [{ logprobs: 21 }, 'logprobs', /at most 20/],
  [{ logprobs: true }, 'logprobs', /whole number/],
  [{ echo: true, logprobs: 1 }, 'echo', /not supported/],
  [{ echo: 'yes' }, 'echo', /true or false/],
  [{ stop: ['a', 'b', 'c', 'd', 'e'] }, 'stop', /up to 4/],
  [{ stop: '' }, 'stop', /none of them empty/],
  [{ stop: [1] }, 'stop', /strings/],
  [{ stream: 'true' }, 'stream', /true or false/],
  [{ stream_options: { include_usage: true } }, 'stream_options', /needs "stream": true/],
  [{ stream: true, stream_options: { include_usage: 1 } }, 'stream_options.include_usage', /true or false/],
  [{ stream: true, stream_options: { usage: true } }, 'stream_options.usage', /unrecognized/],
  [{ suffix: 'end' }, 'suffix', /not supported/],
  [{ service_tier: 'gold' }, 'service_tier', /"auto", "default", "flex", "priority"/],
  [{ stop_token_ids: [1, 999] }, 'stop_token_ids[1]', /got 999/],
  [{ temprature: 1 }, 'temprature', /unrecognized request argument: temprature/],
  [{ user: 5 }, 'user', /string/],
];

for (const [fields, param, message] of BAD_COMPLETIONS) {
  test(`completion with ${JSON.stringify(fields)?.slice(0, 60)} is refused at ${param}`, () => {
    const found = refusal(() => readCompletion({ ...completion, ...fields }, limits));
    assert.is(found.code, 'REQUEST_INVALID');
    assert.is(found.param, param);
    assert.match(found.message, message);
  });
}

const BAD_CHATS: [Record<string, unknown>, string, RegExp][] = [
  [{ messages: undefined }, 'messages', /required/],
  [{ messages: [] }, 'messages', /empty/],
  [{ messages: 'hi' }, 'messages', /an array/],
  [{ messages: ['hi'] }, 'messages[0]', /JSON object/],
  [{ messages: [{ content: 'x' }] }, 'messages[0].role', /required/],
  [{ messages: [{ role: 'wizard', content: 'x' }] }, 'messages[0].role', /one of "system", "developer", "user", "assistant"/],
  [{ messages: [{ role: 'tool', content: 'x' }] }, 'messages[0].role', /tools are not/],
  [{ messages: [{ role: 'user' }] }, 'messages[0].content', /required/],
  [{ messages: [{ role: 'user', content: 5 }] }, 'messages[0].content', /text parts/],
  [{ messages: [{ role: 'user', content: [{ type: 'text', text: 'a' }, { type: 'image_url', image_url: {} }] }] }, 'messages[0].content[1].type', /image_url.*text only/],
  [{ messages: [{ role: 'user', content: [{ type: 'input_audio' }] }] }, 'messages[0].content[0].type', /input_audio/],
  [{ messages: [{ role: 'user', content: [{ type: 'text' }] }] }, 'messages[0].content[0].text', /required/],
  [{ messages: [{ role: 'assistant', content: 'x', tool_calls: [{}] }] }, 'messages[0].tool_calls', /not supported/],
  [{ messages: [{ role: 'user', content: 'x', weight: 1 }] }, 'messages[0].weight', /unrecognized/],
  [{ tools: [{ type: 'function' }] }, 'tools', /not supported/],
  [{ tool_choice: 'required' }, 'tool_choice', /not supported/],
  [{ functions: [{}] }, 'functions', /not supported/],
  [{ response_format: { type: 'json_schema' } }, 'response_format', /only \{"type": "text"\} is/],
  [{ response_format: { type: 'json_object' } }, 'response_format', /constrained/],
  [{ modalities: ['text', 'audio'] }, 'modalities', /only the modality "text"/],
  [{ audio: { voice: 'alloy' } }, 'audio', /not supported/],
  [{ prediction: {} }, 'prediction', /not supported/],
  [{ reasoning_effort: 'high' }, 'reasoning_effort', /no reasoning effort/],
  [{ web_search_options: {} }, 'web_search_options', /not supported/],
  [{ store: true }, 'store', /not stored/],
  [{ logprobs: 3 }, 'logprobs', /true or false/],
  [{ top_logprobs: 2 }, 'top_logprobs', /needs "logprobs": true/],
  [{ logprobs: true, top_logprobs: 21 }, 'top_logprobs', /at most 20/],
  [{ max_tokens: 5, max_completion_tokens: 6 }, 'max_tokens', /same limit/],
  [{ chat_template_kwargs: 'x' }, 'chat_template_kwargs', /JSON object/],
  [{ prompt: 'x' }, 'prompt', /unrecognized/],
];

for (const [fields, param, message] of BAD_CHATS) {
  test(`chat with ${JSON.stringify(fields)?.slice(0, 60)} is refused at ${param}`, () => {
    const found = refusal(() => readChat({ ...chat, ...fields }, limits));
    assert.is(found.code, 'REQUEST_INVALID');
    assert.is(found.param, param);
    assert.match(found.message, message);
  });
}

test('an unknown model is said before anything else', () => {
  const found = refusal(() => readCompletion({ model: 'gpt-5', nonsense: 1 }, limits));
  assert.equal([found.code, found.param], ['MODEL_NOT_FOUND', 'model']);
});

test('what asks for nothing is accepted: nulls, empty lists, neutral values', () => {
  const neutral = {
    tools: [], tool_choice: 'none', functions: [], parallel_tool_calls: true, response_format: { type: 'text' }, modalities: ['text'], store: false, audio: null, logit_bias: null,
    stop: null, temperature: null, n: null, stream: null, stream_options: null, user: 'u', metadata: {}, safety_identifier: 'i', prompt_cache_key: 'k', seed: null, service_tier: 'default',
  };
  const request = readChat({ ...chat, ...neutral }, limits);
  assert.equal([request.n, request.stream, request.stop, request.qos, request.sampling.temperature, request.maxTokens], [1, false, [], 'standard', 0.7, null]);
  assert.equal(readCompletion({ ...completion, suffix: null, best_of: 1, echo: false, logprobs: null }, limits).prompts, ['x']);
});

test('what is asked for arrives', () => {
  const request = readChat({ ...chat, stop: 'END', stream: true, stream_options: { include_usage: true }, max_completion_tokens: 7, n: 2, logprobs: true, top_logprobs: 5, seed: 42, service_tier: 'priority', tpla_timings: true, ignore_eos: true }, limits);
  assert.equal([request.stop, request.stream, request.includeUsage, request.maxTokens, request.n, request.sampling.logprobs, request.sampling.seed, request.qos, request.timings, request.ignoreEos],
    [['END'], true, true, 7, 2, 5, '42', 'interactive', true, true]);
  assert.is(readChat({ ...chat, logprobs: true }, limits).sampling.logprobs, 0);
  assert.is(readChat(chat, limits).sampling.logprobs, -1);
  assert.is(readCompletion({ ...completion, logprobs: 0 }, limits).sampling.logprobs, 0);
});

test('seeds of 64 bits, negative ones as two\'s complement', () => {
  const seed = (value: number) => readCompletion({ ...completion, seed: value }, limits).sampling.seed;
  assert.equal([seed(0), seed(-1), seed(2 ** 53), seed(-(2 ** 63))], ['0', '18446744073709551615', '9007199254740992', '9223372036854775808']);
  assert.is.not(readCompletion(completion, limits).sampling.seed, readCompletion(completion, limits).sampling.seed);
});

test('names from the prototype are no fields', () => {
  const found = refusal(() => readCompletion({ ...completion, constructor: 1 }, limits));
  assert.is(found.param, 'constructor');
  assert.is(refusal(() => readCompletion(Object.create({ model: 'tiny', prompt: 'x' }), limits)).param, 'model');
});

test.run();
