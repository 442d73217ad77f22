/**
 * Messages between route and the workers: HTTP/1.1, JSON bodies, NDJSON streams. KV bytes never travel here.
 *
 *   POST serve-decode  /generate   GenerateRequest → stream of GenerateEvent
 *   POST serve-prefill /prefill    PrefillRequest  → stream of PrefillEvent
 *   POST serve-decode  /stop       StopRequest     → {}; ends one choice of a running request (a stop string was found)
 *   GET  any role      /health     200 {status:'ok'|'draining'}; 503 until ready
 *   GET  any role      /state      the role's state object
 *   GET  any role      /metrics    Prometheus text
 *
 * Closing a stream cancels its request. Errors before the stream starts are HTTP errors with an ErrorBody; later ones are
 * the stream's last line, {event:'error'}.
 */
import type { ErrorCode } from '../errors.js';
import type { ModelIdentity } from '../model/spec.js';
import type { KvForm, KvDType, SampledToken } from '../native/types.js';
import type { HandoffTicket, PrefillStats, TransferPath } from '../transfer/types.js';

export interface ErrorBody {
  error: { message: string; type: string; param: string | null; code: ErrorCode };
}

/** JSON form of SamplingParams: seed as decimal text, -1 logprobs = none. */
export interface SamplingRequest {
  temperature: number;
  top_k: number;
  top_p: number;
  min_p: number;
  repetition_penalty: number;
  presence_penalty: number;
  frequency_penalty: number;
  seed: string;
  logprobs: number;
  logit_bias: { token: number; bias: number }[];
}

export type QosClass = 'interactive' | 'standard' | 'batch';

export interface GenerateRequest {
  id: string;
  tokens: number[];
  sampling: SamplingRequest;
  /** Number of choices; they share the prompt's pages. */
  n: number;
  max_tokens: number;
  /** Token ids that end a choice (eos among them); the token itself is reported, finish_reason 'stop'. */
  stop_token_ids: number[];
  qos: QosClass;
}

/**
 * Ends choice `index` of the running request `id`: its finish event follows with reason 'stop', the other choices go on. Unknown ids and
 * finished choices are no error. Stop strings are found by route, which holds the text; a request's last choice is ended by closing the stream.
 */
export interface StopRequest {
  id: string;
  index: number;
}

export type GenerateEvent =
  /** Pages are reserved; route now sends `ticket` to a prefill worker. `ticket` is null where decode holds the whole prompt already. */
  | { event: 'reserved'; ticket: HandoffTicket | null; cached_tokens: number }
  /** The prompt's KV has landed and is verified. */
  | { event: 'landed'; transfer: TransferReport; prefill: PrefillStats }
  | { event: 'token'; index: number; token: SampledToken; }
  /**
   * KV of a preempted choice was lost together with the pool: route sends `tokens` and `ticket` to a prefill worker once more, with n = 1 and the
   * request's other fields. The first token that comes with it is not used. Without an answer within the lease decode computes it by itself.
   */
  | { event: 'recompute'; index: number; tokens: number[]; ticket: HandoffTicket }
  | { event: 'finish'; index: number; reason: 'stop' | 'length' | 'cancelled' }
  | { event: 'done'; decode: DecodeReport }
  | { event: 'error'; error: ErrorBody['error']; retryable: boolean };

export interface TransferReport {
  path: TransferPath;
  bytes: number;
  ms: number;
}

export interface DecodeReport {
  attention: KvForm;
  ranks: number;
  tokens: number;
  /** Mean time per output token after the first. */
  tpot_ms: number;
  kv_bytes_per_token_per_rank: number;
  preemptions: number;
}

export interface PrefillRequest {
  id: string;
  tokens: number[];
  ticket: HandoffTicket;
  sampling: SamplingRequest;
  n: number;
  qos: QosClass;
}

export type PrefillEvent =
  | { event: 'started' }
  | { event: 'done'; prefill: PrefillStats; transfer: TransferReport }
  | { event: 'error'; error: ErrorBody['error']; retryable: boolean };

export interface WorkerState {
  role: 'prefill' | 'decode';
  id: string;
  model: ModelIdentity;
  context_length: number;
  draining: boolean;
  /** Requests running, and waiting for a place. */
  running: number;
  waiting: number;
  /** Prefill: tokens still to compute. Decode: tokens in flight. */
  pending_tokens: number;
  pages: { total: number; used: number; cached: number };
  attention: { form: KvForm; ranks: number; dtype: KvDType; kv_bytes_per_token_per_rank: number };
  /** Tokens per cached block; 64 where left out. */
  page_tokens?: number;
  /** Chained ids of cached prefix blocks, newest last, at most a few thousand; for prefix-aware placement. */
  cached_blocks?: string[];
}
