/** From prompts to the text of choices: what the endpoints send, whole or as a stream. */
import type { Clock } from '../../clock.js';
import { TplaError } from '../../errors.js';
import type { DecodeReport } from '../../fleet/protocol.js';
import type { FinishReason, TplaTimings, Usage } from '../../http/openai_types.js';
import type { TextPiece } from '../../http/openai_response.js';
import type { TextRequest } from '../../http/openai_request.js';
import { Choice } from './choice.js';
import { Generation, type GenerationContext } from './generation.js';
import { merge } from './merge.js';
import type { RouterMetrics } from './metrics.js';
import type { ServedModel } from './served_model.js';

/** Prompts of one request that are with workers at a time: one client's batch must not fill every queue. */
const MAX_CONCURRENT_PROMPTS = 32;

export interface TextJob {
  id: string;
  /** Arrival, on the clock. */
  arrivedAt: number;
  prompts: PromptJob[];
  request: TextRequest;
  maxTokens: (promptTokens: number) => number;
}

export interface PromptJob {
  tokens: number[];
  /** Prompt text that every choice repeats, '' for none. */
  echo: string;
}

/** Prompt p has the choices p·n … p·n + n-1. */
export type TextEvent =
  /** What came for choices `begin` … `end`-1 does not count. */
  | { event: 'restart'; begin: number; end: number }
  | ({ event: 'piece'; index: number } & TextPiece)
  | { event: 'finish'; index: number; reason: FinishReason }
  | { event: 'end'; usage: Usage; timings: TplaTimings };

export interface TextContext extends GenerationContext {
  model: ServedModel;
  clock: Clock;
  metrics: RouterMetrics;
}

/** Ends with 'end'. Aborting `signal` with a TplaError cancels everything at once and throws that error. */
export async function* generateText(job: TextJob, context: TextContext, signal: AbortSignal): AsyncGenerator<TextEvent> {
  const runs = job.prompts.map((prompt, i) => new PromptRun(job, prompt, i, context));
  yield* merge(runs.map((run) => run.events(signal)), MAX_CONCURRENT_PROMPTS);
  const usage = runs.map((run) => run.usage).reduce(addUsage);
  yield { event: 'end', usage, timings: runs[0]!.timings };
}

/** One prompt's choices. */
class PromptRun {
  readonly #job: TextJob;
  readonly #prompt: PromptJob;
  readonly #context: TextContext;
  readonly #first: number;
  readonly #generation: Generation;
  readonly #stopTokens: ReadonlySet<number>;
  #choices: Choice[] = [];
  #cachedTokens = 0;
  #firstTokenAt: number | null = null;
  #prefill: Pick<TplaTimings, 'prefill' | 'transfer'> = { prefill: null, transfer: null };
  #decode: DecodeReport | null = null;

  constructor(job: TextJob, prompt: PromptJob, index: number, context: TextContext) {
    const { request } = job;
    this.#job = job;
    this.#prompt = prompt;
    this.#context = context;
    this.#first = index * request.n;
    const stopTokenIds = [...new Set([...(request.ignoreEos ? [] : context.model.stopTokenIds), ...request.stopTokenIds])];
    this.#stopTokens = new Set(stopTokenIds);
    this.#generation = new Generation({
      id: job.prompts.length === 1 ? job.id : `${job.id}-${index}`,
      tokens: prompt.tokens,
      sampling: request.sampling,
      n: request.n,
      max_tokens: job.maxTokens(prompt.tokens.length),
      stop_token_ids: stopTokenIds,
      qos: request.qos,
    }, context);
  }

  get usage(): Usage {
    const completion = this.#choices.reduce((sum, choice) => sum + choice.tokens, 0);
    const prompt = this.#prompt.tokens.length;
    return { prompt_tokens: prompt, completion_tokens: completion, total_tokens: prompt + completion, prompt_tokens_details: { cached_tokens: this.#cachedTokens } };
  }

  get timings(): TplaTimings {
    return { ttft_ms: (this.#firstTokenAt ?? NaN) - this.#job.arrivedAt, ...this.#prefill, decode: this.#decode ?? this.#measuredDecode() };
  }

  async *events(signal: AbortSignal): AsyncGenerator<TextEvent> {
    let begun = false;
    this.#reset();
    for await (const event of this.#generation.run(signal, !this.#job.request.stream)) {
      switch (event.event) {
        case 'restart':
          this.#reset();
          if (begun) yield { event: 'restart', begin: this.#first, end: this.#first + this.#choices.length };
          begun = false;
          break;
        case 'cached':
          this.#cachedTokens = Math.max(this.#cachedTokens, event.tokens);
          break;
        case 'landed':
          this.#prefill = { prefill: event.prefill, transfer: event.transfer };
          break;
        case 'token': {
          const choice = this.#choice(event.index);
          // tokens that were on their way when it was stopped
          if (choice.finished) break;
          this.#noteFirstToken();
          begun = true;
          yield* choice.push(event.token, this.#context.clock.now());
          if (choice.stopped) {
            if (this.#stoppedEarly()) return this.#observe();
            this.#generation.stopChoice(event.index);
          }
          break;
        }
        case 'finish':
          begun = true;
          yield* this.#choice(event.index).finish(event.reason);
          if (this.#stoppedEarly()) return this.#observe();
          break;
        case 'done':
          this.#decode = event.decode;
          break;
      }
    }
    const open = this.#choices.findIndex((choice) => !choice.finished);
    if (open >= 0) throw new TplaError('PROTOCOL', `worker ${this.#generation.decode?.address} ended the request before its choice ${open} was finished`);
    this.#observe();
  }

  #reset(): void {
    const { n, stop } = this.#job.request;
    const { tokenizer } = this.#context.model;
    this.#choices = Array.from({ length: n }, (_, i) => new Choice(this.#first + i, tokenizer.stream(), stop, this.#stopTokens, this.#prompt.echo));
    this.#firstTokenAt = null;
    this.#cachedTokens = 0;
    this.#prefill = { prefill: null, transfer: null };
  }

  #choice(index: number): Choice {
    const choice = this.#choices[index];
    if (!choice) throw new TplaError('PROTOCOL', `worker ${this.#generation.decode?.address} sent choice ${index} of a request with ${this.#choices.length}`);
    return choice;
  }

  /** All choices have their text and decode would go on with some: nobody needs the rest. */
  #stoppedEarly(): boolean {
    return this.#choices.every((choice) => choice.finished) && this.#choices.some((choice) => choice.stopped);
  }

  #noteFirstToken(): void {
    if (this.#firstTokenAt !== null) return;
    this.#firstTokenAt = this.#context.clock.now();
    this.#context.metrics.firstToken(this.#firstTokenAt - this.#job.arrivedAt);
  }

  #observe(): void {
    for (const { msPerToken } of this.#choices) if (msPerToken !== null) this.#context.metrics.perToken(msPerToken);
  }

  /** Decode's part as route saw it; for requests that end at a stop string, which decode never finishes. */
  #measuredDecode(): DecodeReport {
    const attention = this.#generation.decode?.state?.attention;
    const times = this.#choices.map((choice) => choice.msPerToken).filter((ms) => ms !== null);
    return {
      attention: attention?.form ?? 'mla',
      ranks: attention?.ranks ?? 1,
      tokens: this.usage.completion_tokens,
      tpot_ms: times.length === 0 ? 0 : times.reduce((sum, ms) => sum + ms, 0) / times.length,
      kv_bytes_per_token_per_rank: attention?.kv_bytes_per_token_per_rank ?? 0,
      preemptions: 0,
    };
  }
}

function addUsage(a: Usage, b: Usage): Usage {
  return {
    prompt_tokens: a.prompt_tokens + b.prompt_tokens,
    completion_tokens: a.completion_tokens + b.completion_tokens,
    total_tokens: a.total_tokens + b.total_tokens,
    prompt_tokens_details: { cached_tokens: a.prompt_tokens_details.cached_tokens + b.prompt_tokens_details.cached_tokens },
  };
}
