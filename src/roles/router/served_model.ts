import { readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { TplaError } from '../../errors.js';
import type { ChatMessage, SamplingDefaults } from '../../http/openai_request.js';
import { ChatTemplate } from '../../model/chat_template.js';
import { loadCheckpoint } from '../../model/checkpoint.js';
import { loadModelConfig } from '../../model/config.js';
import { loadGenerationConfig } from '../../model/generation_config.js';
import type { ModelIdentity } from '../../model/spec.js';
import { Tokenizer } from '../../model/tokenizer.js';

/** What OpenAI clients get where the model's authors recommend nothing. */
const DEFAULTS: SamplingDefaults = { temperature: 1, topK: 0, topP: 1, minP: 0, repetitionPenalty: 1 };

/** The text side of the model that the fleet serves. */
export class ServedModel {
  readonly name: string;
  /** Unix seconds. */
  readonly created: number;
  readonly contextLength: number;
  readonly vocabSize: number;
  /** null: the directory has no weights to tell; the workers' identity is taken. */
  readonly identity: ModelIdentity | null;
  /** Tokens that end a text. */
  readonly stopTokenIds: readonly number[];
  readonly defaults: SamplingDefaults;
  readonly tokenizer: Tokenizer;
  readonly #template: ChatTemplate | null;
  readonly #longestToken: number;

  constructor(dir: string, name: string) {
    const { spec, eosTokenIds } = loadModelConfig(dir);
    const generation = loadGenerationConfig(dir);
    this.name = name;
    this.created = Math.floor(statSync(join(dir, 'config.json')).mtimeMs / 1000);
    this.contextLength = spec.contextLength;
    this.vocabSize = spec.vocabSize;
    this.identity = readdirSync(dir).some((file) => file.endsWith('.safetensors')) ? loadCheckpoint(dir, { name }).identity : null;
    this.tokenizer = Tokenizer.load(dir);
    this.#template = ChatTemplate.load(dir);
    const ends = [...eosTokenIds, ...generation.eosTokenIds, ...(this.tokenizer.eosTokenId === null ? [] : [this.tokenizer.eosTokenId])];
    this.stopTokenIds = [...new Set(ends)];
    this.defaults = {
      temperature: generation.temperature ?? DEFAULTS.temperature,
      topK: generation.topK ?? DEFAULTS.topK,
      topP: generation.topP ?? DEFAULTS.topP,
      minP: generation.minP ?? DEFAULTS.minP,
      repetitionPenalty: generation.repetitionPenalty ?? DEFAULTS.repetitionPenalty,
    };
    this.#longestToken = longestToken(this.tokenizer);
  }

  /** Prompt of a conversation. Throws REQUEST_INVALID where the model has no chat template. */
  renderChat(messages: ChatMessage[], options: { addGenerationPrompt: boolean; variables: Record<string, unknown> }): string {
    if (this.#template === null) {
      throw new TplaError('REQUEST_INVALID', `the model ${this.name} has no chat template; use /v1/completions`, { param: 'messages' });
    }
    return this.#template.render(messages as { role: string; content: string }[], options);
  }

  /** No encoding of a text has fewer tokens. */
  leastTokens(text: string): number {
    return Math.ceil(text.length / this.#longestToken);
  }
}

/** In bytes, which no text has fewer of than UTF-16 units. */
function longestToken(tokenizer: Tokenizer): number {
  let longest = 1;
  for (let id = 0; id < tokenizer.vocabSize; id++) longest = Math.max(longest, tokenizer.tokenBytes(id).length);
  return longest;
}
