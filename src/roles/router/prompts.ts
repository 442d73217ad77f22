/** From request bodies to token ids that fit the context. */
import { TplaError } from '../../errors.js';
import { invalid } from '../../http/fields.js';
import type { ChatRequest, CompletionRequest, TextRequest } from '../../http/openai_request.js';
import type { ServedModel } from './served_model.js';
import type { PromptJob } from './text_generation.js';

/** What OpenAI's completions endpoint generates where max_tokens is absent. Chat fills the context. */
const COMPLETION_TOKENS = 16;

export interface Prepared {
  prompts: PromptJob[];
  maxTokens(promptTokens: number): number;
}

export async function prepareCompletion(request: CompletionRequest, model: ServedModel, contextLength: number): Promise<Prepared> {
  const maxTokens = (promptTokens: number) => request.maxTokens ?? Math.min(COMPLETION_TOKENS, contextLength - promptTokens);
  const prompts = await Promise.all(request.prompts.map(async (prompt, i) => {
    const param = request.prompts.length === 1 ? 'prompt' : `prompt[${i}]`;
    const tokens = typeof prompt === 'string' ? await encode(prompt, { model, contextLength, addSpecialTokens: true, param }) : prompt;
    checkLength(tokens, request, model, contextLength, param);
    const echo = !request.echo ? '' : typeof prompt === 'string' ? prompt : model.tokenizer.decode(tokens, { skipSpecialTokens: false });
    return { tokens, echo };
  }));
  return { prompts, maxTokens };
}

export async function prepareChat(request: ChatRequest, model: ServedModel, contextLength: number): Promise<Prepared> {
  const text = model.renderChat(request.messages, { addGenerationPrompt: true, variables: request.templateVariables });
  const tokens = await encode(text, { model, contextLength, addSpecialTokens: false, param: 'messages' });
  checkLength(tokens, request, model, contextLength, 'messages');
  return { prompts: [{ tokens, echo: '' }], maxTokens: (promptTokens) => request.maxTokens ?? contextLength - promptTokens };
}

interface EncodeOptions {
  model: ServedModel;
  contextLength: number;
  addSpecialTokens: boolean;
  param: string;
}

/** A text that cannot fit whatever its tokens are is refused without encoding megabytes first. */
function encode(text: string, { model, contextLength, addSpecialTokens, param }: EncodeOptions): Promise<number[]> {
  const least = model.leastTokens(text);
  if (least > contextLength) throw tooLong(`at least ${least}`, model, contextLength, param);
  return model.tokenizer.encode(text, { addSpecialTokens });
}

function checkLength(tokens: number[], request: TextRequest, model: ServedModel, contextLength: number, param: string): void {
  if (tokens.length === 0) throw invalid(param, `${param} is empty; send at least one token`);
  if (tokens.length >= contextLength) throw tooLong(tokens.length, model, contextLength, param);
  if (request.maxTokens === null || tokens.length + request.maxTokens <= contextLength) return;
  throw new TplaError('CONTEXT_LENGTH_EXCEEDED',
    `the context length of ${model.name} is ${contextLength} tokens; ${tokens.length + request.maxTokens} are asked for, ${tokens.length} of them in the prompt and ${request.maxTokens} to be generated; lower max_tokens to ${contextLength - tokens.length} or shorten the prompt`,
    { param: 'max_tokens' });
}

function tooLong(promptTokens: number | string, model: ServedModel, contextLength: number, param: string): TplaError {
  return new TplaError('CONTEXT_LENGTH_EXCEEDED',
    `the prompt has ${promptTokens} tokens, the context length of ${model.name} is ${contextLength}, and at least one token is generated; shorten the prompt`, { param });
}
