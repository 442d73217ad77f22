/** Responses of the OpenAI surface, as sent. Requests are described by `openai_request.ts`, which reads them. */
import type { DecodeReport, TransferReport } from '../fleet/protocol.js';
import type { KvForm } from '../native/types.js';

export type FinishReason = 'stop' | 'length';

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  /** Prompt tokens whose KV was found instead of computed. */
  prompt_tokens_details: { cached_tokens: number };
}

/**
 * Where the time of a request went; an extension, sent as `tpla` in the response (streaming: in the last chunk) where the request asks for it with
 * `"tpla_timings": true` or the header `x-tpla-timings: true`. Times are milliseconds of one request.
 */
export interface TplaTimings {
  /** From the request's arrival to its first token, at route. */
  ttft_ms: number;
  /** null where decode held the whole prompt already. */
  prefill: PrefillTimings | null;
  transfer: TransferReport | null;
  decode: DecodeReport;
}

export interface PrefillTimings {
  attention: KvForm;
  /** Prompt tokens, and how many of them were computed. */
  tokens: number;
  computed_tokens: number;
  queue_ms: number;
  /** Computing alone, without the queue. */
  ms: number;
}

// ---------------------------------------------------------------- /v1/completions

export interface CompletionLogprobs {
  /** Tokens as text; bytes that are no UTF-8 alone as `bytes:\x..`. */
  tokens: string[];
  token_logprobs: (number | null)[];
  top_logprobs: (Record<string, number> | null)[];
  /** Code points from the start of `text`. */
  text_offset: number[];
}

export interface CompletionChoice {
  index: number;
  text: string;
  logprobs: CompletionLogprobs | null;
  finish_reason: FinishReason | null;
}

/** Also the form of its stream chunks, where `usage` is null but in the last. */
export interface Completion {
  id: string;
  object: 'text_completion';
  created: number;
  model: string;
  system_fingerprint: string | null;
  choices: CompletionChoice[];
  usage?: Usage | null;
  tpla?: TplaTimings;
}

// ---------------------------------------------------------------- /v1/chat/completions

export interface ChatTokenLogprob {
  token: string;
  logprob: number;
  bytes: number[];
}

export interface ChatLogprobs {
  content: (ChatTokenLogprob & { top_logprobs: ChatTokenLogprob[] })[];
  refusal: null;
}

export interface ChatChoice {
  index: number;
  message: { role: 'assistant'; content: string; refusal: null };
  logprobs: ChatLogprobs | null;
  finish_reason: FinishReason;
}

export interface ChatCompletion {
  id: string;
  object: 'chat.completion';
  created: number;
  model: string;
  system_fingerprint: string | null;
  choices: ChatChoice[];
  usage: Usage;
  tpla?: TplaTimings;
}

export interface ChatChunkChoice {
  index: number;
  delta: { role?: 'assistant'; content?: string; refusal?: null };
  logprobs: ChatLogprobs | null;
  finish_reason: FinishReason | null;
}

export interface ChatChunk {
  id: string;
  object: 'chat.completion.chunk';
  created: number;
  model: string;
  system_fingerprint: string | null;
  choices: ChatChunkChoice[];
  usage?: Usage | null;
  tpla?: TplaTimings;
}

// ---------------------------------------------------------------- models, tokens

export interface ModelCard {
  id: string;
  object: 'model';
  /** Unix seconds. */
  created: number;
  owned_by: string;
  max_model_len: number;
}

export interface ModelList {
  object: 'list';
  data: ModelCard[];
}

export interface TokenizeResponse {
  tokens: number[];
  count: number;
  max_model_len: number;
  token_strs?: string[];
}

export interface DetokenizeResponse {
  prompt: string;
}
