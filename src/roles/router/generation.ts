/**
 * One prompt through the fleet: a decode worker reserves pages, a prefill worker computes the prompt and pushes its KV there, decode streams tokens.
 * Both legs live and die together; what breaks before the client has seen a token is tried again elsewhere.
 */
import type { Logger } from 'pino';
import { TplaError, toTplaError } from '../../errors.js';
import type { WorkerRole } from '../../fleet/discovery.js';
import type { DecodeReport, GenerateEvent, GenerateRequest, PrefillEvent, PrefillRequest, TransferReport } from '../../fleet/protocol.js';
import type { WorkerRegistry } from '../../fleet/registry.js';
import type { Worker } from '../../fleet/worker.js';
import { isConnectionFailure } from '../../http/client.js';
import type { PrefillTimings } from '../../http/openai_types.js';
import type { SampledToken } from '../../native/types.js';
import { failureKind } from '../../policy/retry.js';
import type { HandoffTicket, PrefillStats } from '../../transfer/types.js';
import { PromptBlocks, type Placer } from './placer.js';

export type GenerationEvent =
  /** What came so far does not count: another attempt begins. */
  | { event: 'restart' }
  /** Prompt tokens whose KV need not be computed, as known so far. */
  | { event: 'cached'; tokens: number }
  | { event: 'landed'; transfer: TransferReport; prefill: PrefillTimings }
  | { event: 'token'; index: number; token: SampledToken }
  | { event: 'finish'; index: number; reason: 'stop' | 'length' }
  | { event: 'done'; decode: DecodeReport };

export interface GenerationContext {
  registry: WorkerRegistry;
  placer: Placer;
  log: Logger;
  /** Attempts after the first. */
  retries: number;
  onRetry(leg: WorkerRole): void;
  retryAfterSeconds(): number;
}

/** Why an attempt ended, and on which worker; null: there was none to take it. */
class AttemptFailure extends TplaError {
  constructor(readonly error: TplaError, readonly worker: Worker | null, readonly retryable?: boolean) {
    super(error.code, error.message);
  }
}

/** Failures of the hand-off that decode reports and that are not its own. */
const HANDOFF_CODES: readonly string[] = ['HANDOFF_FAILED', 'CHECKSUM_MISMATCH', 'LEASE_EXPIRED', 'HANDSHAKE_REFUSED'];

export class Generation {
  readonly #request: GenerateRequest;
  readonly #context: GenerationContext;
  readonly #blocks: PromptBlocks;
  /** Workers that do not take this request now. */
  readonly #refused = new Map<Worker, TplaError>();
  /** Workers it failed on; used again only where there is no other. */
  readonly #avoided = new Set<Worker>();
  #attempts = 0;
  #decode: Worker | null = null;
  #prefill: Worker | null = null;

  constructor(request: GenerateRequest, context: GenerationContext) {
    this.#request = request;
    this.#context = context;
    this.#blocks = new PromptBlocks(request.tokens);
  }

  /** The workers of the current attempt. */
  get decode(): Worker | null { return this.#decode; }
  get prefill(): Worker | null { return this.#prefill; }

  /**
   * Runs until 'done'. Aborting `signal` with a TplaError cancels both legs at once and throws that error. With `restartable` (nothing reaches the client
   * before the end) attempts may also begin anew after tokens have come.
   */
  async *run(signal: AbortSignal, restartable: boolean): AsyncGenerator<GenerationEvent> {
    let failures = 0;
    let begun = false;
    for (;;) {
      try {
        for await (const event of this.#attempt(signal)) {
          begun ||= event.event === 'token';
          yield event;
        }
        return;
      } catch (thrown) {
        if (!(thrown instanceof AttemptFailure)) throw thrown;
        const { error, worker, retryable } = thrown;
        const kind = failureKind(error.code, retryable);
        if (worker === null || kind === 'final' || (begun && !restartable)) throw error;
        if (kind === 'refused') this.#refused.set(worker, error);
        else if (++failures > this.#context.retries) throw error;
        else this.#avoided.add(worker);
        this.#context.onRetry(worker.role);
        this.#context.log.info({ request: this.#request.id, worker: worker.address, code: error.code, kind }, `trying again: ${error.message}`);
        yield { event: 'restart' };
      }
    }
  }

  /** Ends one choice where it runs, while others go on. Best effort: a worker that does not hear of it generates to the end for nobody. */
  stopChoice(index: number): void {
    this.#decode?.client.json('POST', '/stop', { id: this.#attemptId(), index }, { timeoutMs: 5_000 }).catch((thrown: unknown) => {
      this.#context.log.debug({ request: this.#request.id, index }, `could not end a choice early: ${(thrown as Error).message}`);
    });
  }

  async *#attempt(signal: AbortSignal): AsyncGenerator<GenerationEvent> {
    this.#attempts++;
    this.#prefill = null;
    const decode = this.#decode = this.#pick('decode');
    const abort = linked(signal);
    const ended = decode.begin({ tokens: this.#request.tokens.length, fail: (error) => abort.controller.abort(new AttemptFailure(error, decode)) });
    let landed = false;
    let complete = false;
    try {
      for await (const event of decode.client.stream<GenerateEvent>('/generate', { ...this.#request, id: this.#attemptId() }, abort.controller.signal)) {
        switch (event.event) {
          case 'reserved':
            yield { event: 'cached', tokens: event.cached_tokens };
            if (event.ticket === null) this.#context.placer.remember(decode, this.#blocks);
            else this.#runPrefill(event.ticket, abort.controller.signal).catch((failure: unknown) => { if (!landed) abort.controller.abort(failure); });
            break;
          case 'landed':
            landed = true;
            this.#remember();
            yield { event: 'cached', tokens: event.prefill.promptTokens - event.prefill.computedTokens };
            yield { event: 'landed', transfer: event.transfer, prefill: this.#timings(event.prefill) };
            break;
          case 'recompute':
            // Without success decode computes it by itself.
            this.#runPrefill(event.ticket, abort.controller.signal, { tokens: event.tokens, n: 1 }).catch((failure: unknown) => {
              this.#context.log.debug({ request: this.#request.id, index: event.index }, `could not compute lost KV again: ${(failure as Error).message}`);
            });
            break;
          case 'finish':
            if (event.reason === 'cancelled') throw new AttemptFailure(new TplaError('WORKER_FAILED', `worker ${decode.address} cancelled the request`), decode);
            yield { event: 'finish', index: event.index, reason: event.reason };
            break;
          case 'error':
            throw this.#reported(event, decode);
          case 'done':
            complete = true;
            yield event;
            return;
          default:
            yield event;
        }
      }
      throw new AttemptFailure(new TplaError('PROTOCOL', `worker ${decode.address} ended its stream before the request was done`), decode);
    } catch (thrown) {
      throw signal.aborted ? signal.reason : this.#failed(thrown, decode);
    } finally {
      ended();
      abort.unlink();
      // a prefill that has delivered may end by itself
      if (!complete || !landed) abort.controller.abort(new TplaError('CANCELLED', 'the request has ended'));
    }
  }

  /** Runs the prefill leg to its end. A worker that refuses leaves the ticket unused, so the next may have it. */
  async #runPrefill(ticket: HandoffTicket, signal: AbortSignal, fields: Partial<Pick<PrefillRequest, 'tokens' | 'n'>> = {}): Promise<void> {
    const { id: _, max_tokens, stop_token_ids, ...rest } = this.#request;
    const request: PrefillRequest = { ...rest, ...fields, id: this.#attemptId(), ticket };
    for (;;) {
      const worker = this.#prefill = this.#pick('prefill');
      try {
        return await this.#runPrefillOn(worker, request, signal);
      } catch (thrown) {
        const failure = this.#failed(thrown, worker);
        if (signal.aborted || failureKind(failure.error.code, failure.retryable) !== 'refused') throw failure;
        this.#refused.set(worker, failure.error);
        this.#context.onRetry('prefill');
      }
    }
  }

  async #runPrefillOn(worker: Worker, request: PrefillRequest, signal: AbortSignal): Promise<void> {
    const abort = linked(signal);
    const [begin, end] = request.ticket.tokens;
    const ended = worker.begin({ tokens: end - begin, fail: (error) => abort.controller.abort(new AttemptFailure(error, worker)) });
    try {
      for await (const event of worker.client.stream<PrefillEvent>('/prefill', request, abort.controller.signal)) {
        if (event.event === 'error') throw this.#reported(event, worker);
        if (event.event === 'done') return;
      }
      throw new AttemptFailure(new TplaError('PROTOCOL', `worker ${worker.address} ended its stream before the prefill was done`), worker);
    } finally {
      ended();
      abort.unlink();
    }
  }

  /** Chooses among the workers that are up and have not refused. */
  #pick(role: WorkerRole): Worker {
    const up = this.#context.registry.usable(role);
    const open = up.filter((worker) => !this.#refused.has(worker));
    const fresh = open.filter((worker) => !this.#avoided.has(worker));
    const worker = this.#context.placer.pick(fresh.length > 0 ? fresh : open, this.#request.tokens.length, this.#blocks);
    if (worker === null) throw new AttemptFailure(this.#nobody(role), null);
    return worker;
  }

  #nobody(role: WorkerRole): TplaError {
    const refusals = [...this.#refused].filter(([worker]) => worker.role === role).map(([, error]) => error);
    if (refusals.length > 0 && refusals.every(({ code }) => code === 'DRAINING')) return refusals[0]!;
    if (refusals.length > 0) {
      return new TplaError('OVERLOADED', `every ${role} worker is full; try again later`, { retryAfterSeconds: this.#context.retryAfterSeconds() });
    }
    const states = this.#context.registry.workers.filter((worker) => worker.role === role)
      .map(({ address, health }) => `${address} is ${health.status}${health.reason === null ? '' : ` (${health.reason})`}`);
    return new TplaError('NO_WORKER', `no ${role} worker is up: ${states.join('; ')}`);
  }

  /** An error that a worker's stream ended with. Decode may be reporting what prefill did. */
  #reported({ error, retryable }: { error: { code: string; message: string }; retryable: boolean }, worker: Worker): AttemptFailure {
    const blamed = worker.role === 'decode' && HANDOFF_CODES.includes(error.code) ? this.#prefill ?? worker : worker;
    return new AttemptFailure(toTplaError(Object.assign(new Error(error.message), { code: error.code }), 'WORKER_FAILED'), blamed, retryable);
  }

  #failed(thrown: unknown, worker: Worker): AttemptFailure {
    if (thrown instanceof AttemptFailure) return thrown;
    const error = toTplaError(thrown);
    if (isConnectionFailure(error)) this.#context.registry.report(worker, error);
    return new AttemptFailure(error, worker);
  }

  #remember(): void {
    for (const worker of [this.#decode, this.#prefill]) if (worker) this.#context.placer.remember(worker, this.#blocks);
  }

  #timings({ promptTokens, computedTokens, queueMs, computeMs }: PrefillStats): PrefillTimings {
    return { attention: this.#prefill?.state?.attention.form ?? 'mla', tokens: promptTokens, computed_tokens: computedTokens, queue_ms: queueMs, ms: computeMs };
  }

  #attemptId(): string {
    return `${this.#request.id}.${this.#attempts}`;
  }
}

/** A controller that follows `signal` until unlinked. */
function linked(signal: AbortSignal): { controller: AbortController; unlink(): void } {
  const controller = new AbortController();
  const follow = () => controller.abort(signal.reason);
  if (signal.aborted) follow();
  else signal.addEventListener('abort', follow, { once: true });
  return { controller, unlink: () => signal.removeEventListener('abort', follow) };
}
