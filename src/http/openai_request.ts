/** Reads OpenAI request bodies. Whatever is not understood is refused with the field at fault; nothing is ignored that would change the answer. */
import type { QosClass, SamplingRequest } from '../fleet/protocol.js';
import { TplaError } from '../errors.js';
import { Fields, invalid, shown } from './fields.js';

export interface SamplingDefaults {
  temperature: number;
  topK: number;
  topP: number;
  minP: number;
  repetitionPenalty: number;
}

export interface RequestLimits {
  vocabSize: number;
  defaults: SamplingDefaults;
  /** Whether `model` names what is served. */
  serves(model: string): boolean;
}

/** What completions and chat completions have in common. */
export interface TextRequest {
  stream: boolean;
  includeUsage: boolean;
  timings: boolean;
  n: number;
  /** null: as the endpoint's default says. */
  maxTokens: number | null;
  sampling: SamplingRequest;
  stop: string[];
  stopTokenIds: number[];
  /** Generate past the end-of-text tokens; for benchmarks. */
  ignoreEos: boolean;
  qos: QosClass;
}

export interface CompletionRequest extends TextRequest {
  prompts: (string | number[])[];
  echo: boolean;
}

export interface ChatMessage {
  role: 'system' | 'user' | 'assistant';
  content: string;
  name?: string;
}

export interface ChatRequest extends TextRequest {
  messages: ChatMessage[];
  /** Further variables of the chat template, such as `thinking`. */
  templateVariables: Record<string, unknown>;
}

export interface TokenizeRequest {
  input: { prompt: string } | Pick<ChatRequest, 'messages' | 'templateVariables'>;
  /** null: as the model's own template or tokenizer has it. */
  addSpecialTokens: boolean | null;
  addGenerationPrompt: boolean;
  tokenStrings: boolean;
}

const MAX_PROMPTS = 256;
const MAX_CHOICES = 128;
const MAX_STOPS = 4;
const MAX_TOP_LOGPROBS = 20;
const SERVICE_TIERS = { auto: 'standard', default: 'standard', flex: 'batch', priority: 'interactive' } as const satisfies Record<string, QosClass>;

export function readCompletion(body: unknown, limits: RequestLimits): CompletionRequest {
  const fields = new Fields(body);
  readModel(fields, limits);
  refuseUnsupported(fields, COMPLETION_UNSUPPORTED);
  const prompts = readPrompts(fields, limits);
  const echo = fields.boolean('echo') ?? false;
  const logprobs = fields.number('logprobs', { min: 0, max: MAX_TOP_LOGPROBS, integer: true }) ?? -1;
  if (echo && logprobs >= 0) throw invalid('echo', 'echo together with logprobs is not supported: the logprobs of a prompt are not computed; leave one of them out');
  const common = readCommon(fields, limits, logprobs, fields.number('max_tokens', { min: 1, integer: true }));
  const bestOf = fields.number('best_of', { min: 1, integer: true });
  if (bestOf !== undefined && bestOf !== common.n) throw invalid('best_of', `best_of is supported only where it equals n (${common.n}); got ${bestOf}`);
  fields.refuseOthers();
  return { ...common, prompts, echo };
}

export function readChat(body: unknown, limits: RequestLimits): ChatRequest {
  const fields = new Fields(body);
  readModel(fields, limits);
  refuseUnsupported(fields, CHAT_UNSUPPORTED);
  const messages = readMessages(fields);
  const wanted = fields.boolean('logprobs') ?? false;
  const top = fields.number('top_logprobs', { min: 0, max: MAX_TOP_LOGPROBS, integer: true });
  if (top !== undefined && !wanted) throw invalid('top_logprobs', 'top_logprobs needs "logprobs": true');
  const [older, newer] = [fields.number('max_tokens', { min: 1, integer: true }), fields.number('max_completion_tokens', { min: 1, integer: true })];
  if (older !== undefined && newer !== undefined && older !== newer) {
    throw invalid('max_tokens', `max_tokens (${older}) and max_completion_tokens (${newer}) name the same limit; send one of them`);
  }
  const common = readCommon(fields, limits, wanted ? top ?? 0 : -1, newer ?? older);
  const templateVariables = readTemplateVariables(fields);
  fields.refuseOthers();
  return { ...common, messages, templateVariables };
}

export function readTokenize(body: unknown, limits: RequestLimits): TokenizeRequest {
  const fields = new Fields(body);
  if (fields.raw('model') !== undefined) readModel(fields, limits);
  const prompt = fields.string('prompt');
  if ((prompt === undefined) === (fields.raw('messages') === undefined)) throw invalid('prompt', 'send either prompt (a string) or messages');
  const request: TokenizeRequest = {
    input: prompt === undefined ? { messages: readMessages(fields), templateVariables: readTemplateVariables(fields) } : { prompt },
    addSpecialTokens: fields.boolean('add_special_tokens') ?? null,
    addGenerationPrompt: fields.boolean('add_generation_prompt') ?? true,
    tokenStrings: fields.boolean('return_token_strs') ?? false,
  };
  fields.refuseOthers();
  return request;
}

export function readDetokenize(body: unknown, limits: RequestLimits): { tokens: number[] } {
  const fields = new Fields(body);
  if (fields.raw('model') !== undefined) readModel(fields, limits);
  const tokens = readTokens('tokens', fields.required('tokens', fields.array('tokens')), limits);
  fields.refuseOthers();
  return { tokens };
}

function readModel(fields: Fields, limits: RequestLimits): void {
  const model = fields.required('model', fields.string('model'));
  if (!limits.serves(model)) {
    throw new TplaError('MODEL_NOT_FOUND', `the model ${shown(model)} is not served here; GET /v1/models lists what is`, { param: 'model' });
  }
}

function readCommon(fields: Fields, limits: RequestLimits, logprobs: number, maxTokens: number | undefined): TextRequest {
  const stream = fields.boolean('stream') ?? false;
  const streamOptions = fields.object('stream_options');
  if (streamOptions !== undefined && !stream) throw invalid('stream_options', 'stream_options needs "stream": true');
  const includeUsage = streamOptions?.boolean('include_usage') ?? false;
  // obfuscation pads events against traffic analysis; route never pads
  streamOptions?.boolean('include_obfuscation');
  streamOptions?.refuseOthers();
  acceptHints(fields);
  return {
    stream,
    includeUsage,
    timings: fields.boolean('tpla_timings') ?? false,
    n: fields.number('n', { min: 1, max: MAX_CHOICES, integer: true }) ?? 1,
    maxTokens: maxTokens ?? null,
    sampling: readSampling(fields, limits, logprobs),
    stop: readStop(fields),
    stopTokenIds: readTokens('stop_token_ids', fields.array('stop_token_ids') ?? [], limits),
    ignoreEos: fields.boolean('ignore_eos') ?? false,
    qos: SERVICE_TIERS[fields.oneOf('service_tier', Object.keys(SERVICE_TIERS) as (keyof typeof SERVICE_TIERS)[]) ?? 'auto'],
  };
}

/** Fields that describe the caller, not the answer: checked for type and otherwise without effect. */
function acceptHints(fields: Fields): void {
  for (const name of ['user', 'safety_identifier', 'prompt_cache_key']) fields.string(name);
  fields.object('metadata');
}

function readSampling(fields: Fields, { vocabSize, defaults }: RequestLimits, logprobs: number): SamplingRequest {
  const topK = fields.number('top_k', { min: -1, integer: true }) ?? defaults.topK;
  return {
    temperature: fields.number('temperature', { min: 0, max: 2 }) ?? defaults.temperature,
    top_k: Math.max(topK, 0),
    top_p: fields.number('top_p', { min: 0, max: 1, above: true }) ?? defaults.topP,
    min_p: fields.number('min_p', { min: 0, max: 1 }) ?? defaults.minP,
    repetition_penalty: fields.number('repetition_penalty', { min: 0, max: 10, above: true }) ?? defaults.repetitionPenalty,
    presence_penalty: fields.number('presence_penalty', { min: -2, max: 2 }) ?? 0,
    frequency_penalty: fields.number('frequency_penalty', { min: -2, max: 2 }) ?? 0,
    seed: readSeed(fields),
    logprobs,
    logit_bias: readLogitBias(fields, vocabSize),
  };
}

/** Decimal text of an unsigned 64-bit seed; drawn where the request has none, so that a retry on another worker repeats the same choices. */
function readSeed(fields: Fields): string {
  const seed = fields.number('seed', { min: -(2 ** 63), max: 2 ** 63 });
  if (seed === undefined) return String(Math.floor(Math.random() * Number.MAX_SAFE_INTEGER));
  if (!Number.isInteger(seed)) throw invalid('seed', `seed must be a whole number; got ${seed}`);
  return String(BigInt.asUintN(64, BigInt(seed)));
}

function readLogitBias(fields: Fields, vocabSize: number): SamplingRequest['logit_bias'] {
  const biases = fields.object('logit_bias');
  return (biases?.names() ?? []).map((name) => {
    const token = /^\d+$/.test(name) ? Number(name) : -1;
    if (!(token >= 0 && token < vocabSize)) throw invalid('logit_bias', `logit_bias maps token ids below ${vocabSize} to biases; got the key ${shown(name)}`);
    return { token, bias: biases!.required(name, biases!.number(name, { min: -100, max: 100 })) };
  });
}

function readStop(fields: Fields): string[] {
  const value = fields.raw('stop');
  const stops = value === undefined ? [] : typeof value === 'string' ? [value] : value;
  if (!Array.isArray(stops) || stops.length > MAX_STOPS || stops.some((stop) => typeof stop !== 'string' || stop === '')) {
    throw invalid('stop', `stop must be a string or an array of up to ${MAX_STOPS} strings, none of them empty; got ${shown(value)}`);
  }
  return stops as string[];
}

function readPrompts(fields: Fields, limits: RequestLimits): (string | number[])[] {
  const value = fields.required('prompt', fields.raw('prompt'));
  if (typeof value === 'string') return [value];
  if (!Array.isArray(value)) throw invalid('prompt', `prompt must be a string, an array of strings, an array of token ids, or an array of arrays of token ids; got ${shown(value)}`);
  if (value.length === 0) throw invalid('prompt', 'prompt is an empty array; send at least one token or string');
  if (typeof value[0] === 'number') return [readTokens('prompt', value, limits)];
  if (value.length > MAX_PROMPTS) throw invalid('prompt', `prompt has ${value.length} prompts; one request takes at most ${MAX_PROMPTS}`);
  return value.map((prompt, i) => {
    const path = `prompt[${i}]`;
    if (typeof prompt !== typeof value[0]) throw invalid(path, `${path} is of another kind than prompt[0]; prompts are all strings or all arrays of token ids`);
    if (typeof prompt === 'string') return prompt;
    if (!Array.isArray(prompt) || prompt.length === 0) throw invalid(path, `${path} must be a string or a non-empty array of token ids; got ${shown(prompt)}`);
    return readTokens(path, prompt, limits);
  });
}

function readTokens(path: string, values: unknown[], { vocabSize }: RequestLimits): number[] {
  values.forEach((value, i) => {
    if (typeof value !== 'number' || !Number.isInteger(value) || value < 0 || value >= vocabSize) {
      throw invalid(`${path}[${i}]`, `${path}[${i}] must be a token id, a whole number from 0 to ${vocabSize - 1}; got ${shown(value)}`);
    }
  });
  return values as number[];
}

// ---------------------------------------------------------------- messages

const ROLES = ['system', 'developer', 'user', 'assistant'] as const;

function readMessages(fields: Fields): ChatMessage[] {
  const values = fields.required('messages', fields.array('messages'));
  if (values.length === 0) throw invalid('messages', 'messages is empty; send at least one message');
  return values.map((value, i) => readMessage(new Fields(value, `messages[${i}]`)));
}

function readTemplateVariables(fields: Fields): Record<string, unknown> {
  fields.object('chat_template_kwargs');
  return (fields.raw('chat_template_kwargs') ?? {}) as Record<string, unknown>;
}

function readMessage(message: Fields): ChatMessage {
  const roleGiven = message.raw('role');
  if (roleGiven === 'tool' || roleGiven === 'function') throw invalid(message.path('role'), `messages of role ${shown(roleGiven)} are not supported: tools are not`);
  const role = message.required('role', message.oneOf('role', ROLES));
  for (const name of ['tool_calls', 'function_call', 'audio']) {
    if (message.raw(name) !== undefined) throw invalid(message.path(name), `${message.path(name)} is not supported; send text content`);
  }
  message.raw('refusal');
  const content = message.raw('content');
  if (content === undefined) throw invalid(message.path('content'), `${message.path('content')} is required: a string or an array of text parts`);
  const name = message.string('name');
  message.refuseOthers();
  return { role: role === 'developer' ? 'system' : role, content: readContent(message.path('content'), content), ...(name === undefined ? {} : { name }) };
}

function readContent(path: string, content: unknown): string {
  if (typeof content === 'string') return content;
  if (!Array.isArray(content)) throw invalid(path, `${path} must be a string or an array of text parts; got ${shown(content)}`);
  return content.map((value, i) => {
    const part = new Fields(value, `${path}[${i}]`);
    const type = part.required('type', part.string('type'));
    if (type !== 'text') throw invalid(part.path('type'), `content parts of type ${shown(type)} are not supported: the model reads text only`);
    return part.required('text', part.string('text'));
  }).join('');
}

// ---------------------------------------------------------------- what is not supported

/** A field that is refused unless its value asks for nothing. */
interface Unsupported {
  neutral(value: unknown): boolean;
  why: string;
}

const never = () => false;
const empty = (value: unknown) => Array.isArray(value) && value.length === 0;
const isFalse = (value: unknown) => value === false;
const plainText = (value: unknown) => typeof value === 'object' && (value as { type?: unknown }).type === 'text';
const TOOLS = 'tools are not supported; describe them in the prompt instead';

const COMPLETION_UNSUPPORTED: Record<string, Unsupported> = {
  suffix: { neutral: (value) => value === '', why: 'insertion before a suffix is not supported' },
  response_format: { neutral: plainText, why: 'constrained output is not supported; only {"type": "text"} is' },
};

const CHAT_UNSUPPORTED: Record<string, Unsupported> = {
  tools: { neutral: empty, why: TOOLS },
  tool_choice: { neutral: (value) => value === 'none' || value === 'auto', why: TOOLS },
  functions: { neutral: empty, why: TOOLS },
  function_call: { neutral: (value) => value === 'none' || value === 'auto', why: TOOLS },
  parallel_tool_calls: { neutral: (value) => typeof value === 'boolean', why: TOOLS },
  response_format: { neutral: plainText, why: 'constrained output is not supported; only {"type": "text"} is' },
  modalities: { neutral: (value) => Array.isArray(value) && value.length === 1 && value[0] === 'text', why: 'only the modality "text" is supported' },
  audio: { neutral: never, why: 'audio is not supported' },
  prediction: { neutral: never, why: 'predicted outputs are not supported' },
  reasoning_effort: { neutral: never, why: 'the served model takes no reasoning effort' },
  verbosity: { neutral: never, why: 'the served model takes no verbosity' },
  web_search_options: { neutral: never, why: 'web search is not supported' },
  store: { neutral: isFalse, why: 'completions are not stored' },
};

function refuseUnsupported(fields: Fields, table: Record<string, Unsupported>): void {
  for (const [name, { neutral, why }] of Object.entries(table)) {
    const value = fields.raw(name);
    if (value !== undefined && !neutral(value)) throw invalid(name, `${name}: ${why}; got ${shown(value)}`);
  }
}
