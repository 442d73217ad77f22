/** Builds OpenAI response objects, whole and as stream chunks, from the text of choices. */
import type { SampledToken } from '../native/types.js';
import type {
  ChatChunk, ChatChunkChoice, ChatCompletion, ChatLogprobs, ChatTokenLogprob, Completion, CompletionChoice, CompletionLogprobs, FinishReason, TplaTimings, Usage,
} from './openai_types.js';

/** A token and the code points of its choice's text before it. */
export interface PlacedToken {
  sampled: SampledToken;
  offset: number;
}

/** A piece of a choice's text and the tokens that end in it. */
export interface TextPiece {
  text: string;
  tokens: PlacedToken[];
}

export interface FinishedChoice extends TextPiece {
  index: number;
  reason: FinishReason;
}

/** What comes with the last chunk, or in the whole response. */
export interface ResponseEnd {
  usage: Usage;
  /** null: not asked for. */
  timings: TplaTimings | null;
}

export interface ResponseOptions {
  id: string;
  /** Unix seconds. */
  created: number;
  model: string;
  systemFingerprint: string | null;
  logprobs: boolean;
  /** Send `usage`: null in every chunk, numbers in the last. */
  includeUsage: boolean;
  tokenBytes(token: number): Uint8Array;
}

export interface ResponseFormat {
  whole(choices: FinishedChoice[], end: ResponseEnd): Completion | ChatCompletion;
  /** What precedes a choice's text; null: nothing. */
  open(index: number): Completion | ChatChunk | null;
  piece(index: number, piece: TextPiece): Completion | ChatChunk;
  finish(index: number, reason: FinishReason): Completion | ChatChunk;
  /** The chunk after all choices; null where neither usage nor timings were asked for. */
  end(end: ResponseEnd): Completion | ChatChunk | null;
}

export function completionFormat(options: ResponseOptions): ResponseFormat {
  const head = { id: options.id, object: 'text_completion' as const, created: options.created, model: options.model, system_fingerprint: options.systemFingerprint };
  const choice = (index: number, piece: TextPiece, finish_reason: FinishReason | null): CompletionChoice =>
    ({ index, text: piece.text, logprobs: options.logprobs ? completionLogprobs(piece.tokens, options) : null, finish_reason });
  const chunk = (choices: CompletionChoice[]): Completion => ({ ...head, choices, ...(options.includeUsage ? { usage: null } : {}) });
  return {
    whole: (choices, end) => ({ ...head, choices: choices.map((piece) => choice(piece.index, piece, piece.reason)), ...ending(end, true) }),
    open: () => null,
    piece: (index, piece) => chunk([choice(index, piece, null)]),
    finish: (index, reason) => chunk([{ index, text: '', logprobs: null, finish_reason: reason }]),
    end: (end) => (options.includeUsage || end.timings ? { ...chunk([]), ...ending(end, options.includeUsage) } : null),
  };
}

export function chatFormat(options: ResponseOptions): ResponseFormat {
  const head = { id: options.id, created: options.created, model: options.model, system_fingerprint: options.systemFingerprint };
  const logprobs = (piece: TextPiece) => (options.logprobs ? chatLogprobs(piece.tokens, options) : null);
  const chunk = (choices: ChatChunkChoice[]): ChatChunk =>
    ({ ...head, object: 'chat.completion.chunk', choices, ...(options.includeUsage ? { usage: null } : {}) });
  return {
    whole: (choices, end) => ({
      ...head,
      object: 'chat.completion',
      choices: choices.map((piece) => ({
        index: piece.index,
        message: { role: 'assistant', content: piece.text, refusal: null },
        logprobs: logprobs(piece),
        finish_reason: piece.reason,
      })),
      usage: end.usage,
      ...ending(end, false),
    }),
    open: (index) => chunk([{ index, delta: { role: 'assistant', content: '', refusal: null }, logprobs: null, finish_reason: null }]),
    piece: (index, piece) => chunk([{ index, delta: { content: piece.text }, logprobs: logprobs(piece), finish_reason: null }]),
    finish: (index, reason) => chunk([{ index, delta: {}, logprobs: null, finish_reason: reason }]),
    end: (end) => (options.includeUsage || end.timings ? { ...chunk([]), ...ending(end, options.includeUsage) } : null),
  };
}

function ending({ usage, timings }: ResponseEnd, withUsage: boolean): { usage?: Usage; tpla?: TplaTimings } {
  return { ...(withUsage ? { usage } : {}), ...(timings ? { tpla: timings } : {}) };
}

// ---------------------------------------------------------------- logprobs

type Vocabulary = Pick<ResponseOptions, 'tokenBytes'>;

function completionLogprobs(tokens: PlacedToken[], vocabulary: Vocabulary): CompletionLogprobs {
  return {
    tokens: tokens.map(({ sampled }) => tokenText(vocabulary.tokenBytes(sampled.token))),
    token_logprobs: tokens.map(({ sampled }) => sampled.logprob),
    top_logprobs: tokens.map(({ sampled }) => (sampled.top.length === 0 ? null : Object.fromEntries(sampled.top.map(({ token, logprob }) => [tokenText(vocabulary.tokenBytes(token)), logprob])))),
    text_offset: tokens.map(({ offset }) => offset),
  };
}

function chatLogprobs(tokens: PlacedToken[], vocabulary: Vocabulary): ChatLogprobs {
  const entry = ({ token, logprob }: { token: number; logprob: number }): ChatTokenLogprob => {
    const bytes = vocabulary.tokenBytes(token);
    return { token: tokenText(bytes), logprob, bytes: [...bytes] };
  };
  return { content: tokens.map(({ sampled }) => ({ ...entry(sampled), top_logprobs: sampled.top.map(entry) })), refusal: null };
}

const UTF8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** Text of one token; part of a character as `bytes:\xe2\x80`, the way OpenAI writes it, so that different tokens stay different. */
function tokenText(bytes: Uint8Array): string {
  try {
    return UTF8.decode(bytes);
  } catch {
    return `bytes:${Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join('')}`;
  }
}
