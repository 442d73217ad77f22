import type { Logger } from 'pino';
import type { Clock } from '../../clock.js';
import type { RouteConfig } from '../../config/types.js';
import { TplaError } from '../../errors.js';
import { workersFromConfig } from '../../fleet/discovery.js';
import { WorkerRegistry } from '../../fleet/registry.js';
import type { RequestLimits } from '../../http/openai_request.js';
import type { ResponseEnd } from '../../http/openai_response.js';
import { retryAfterSeconds } from '../../policy/retry.js';
import type { RoleContext } from '../role.js';
import type { Lifetime } from './lifetime.js';
import { RouterMetrics } from './metrics.js';
import { Placer } from './placer.js';
import { ServedModel } from './served_model.js';
import type { TextContext } from './text_generation.js';

/** How an answer that had begun went out. */
export interface Outcome {
  end: ResponseEnd | null;
  /** What broke it off. */
  error: TplaError | null;
}

/** What the endpoints share: the model, the fleet, and the requests that run. */
export class Router {
  readonly id: string;
  readonly clock: Clock;
  readonly log: Logger;
  readonly model: ServedModel;
  readonly registry: WorkerRegistry;
  readonly metrics: RouterMetrics;
  readonly limits: RequestLimits;
  readonly requestTimeoutMs: number;
  readonly textContext: TextContext;
  readonly #lifetimes = new Set<Lifetime>();
  #draining = false;
  #idle: (() => void)[] = [];

  constructor(config: RouteConfig, { log, clock }: RoleContext) {
    this.id = config.id;
    this.clock = clock;
    this.log = log;
    this.requestTimeoutMs = config.request_timeout_ms;
    this.model = new ServedModel(config.model, config.model_name);
    this.registry = new WorkerRegistry({ workers: workersFromConfig(config), identity: this.model.identity, pollIntervalMs: config.health_interval_ms, clock, log });
    this.metrics = new RouterMetrics(this.registry);
    this.limits = { vocabSize: this.model.vocabSize, defaults: this.model.defaults, serves: (name) => name === this.model.name };
    this.textContext = {
      registry: this.registry,
      placer: new Placer(this.registry, clock),
      model: this.model,
      metrics: this.metrics,
      clock,
      log,
      retries: config.retries,
      onRetry: (leg) => this.metrics.retried(leg),
      retryAfterSeconds: () => retryAfterSeconds(this.metrics.meanRequestMs),
    };
  }

  get draining(): boolean {
    return this.#draining;
  }

  /** Tokens of prompt and answer together that the model takes and some decode worker that is up has been set up for. */
  get contextLength(): number {
    const workers = this.registry.usable('decode').map(({ state }) => state!.context_length);
    return workers.length === 0 ? this.model.contextLength : Math.min(this.model.contextLength, Math.max(...workers));
  }

  /** Changes when answers to the same seed may. */
  get systemFingerprint(): string | null {
    const identity = this.registry.identity;
    return identity && `fp_${identity.fingerprint.slice(0, 12)}${identity.reparam === 'none' ? '' : `_${identity.reparam.slice(0, 12)}`}`;
  }

  /** Whether a request could be served now. */
  get ready(): boolean {
    return this.registry.usable('decode').length > 0 && this.registry.usable('prefill').length > 0;
  }

  refuseWhenDraining(): void {
    if (this.#draining) throw new TplaError('DRAINING', 'this route is shutting down; send the request to another one', { retryAfterSeconds: 1 });
  }

  /** Counts a request until the returned function is called. */
  begin(lifetime: Lifetime): () => void {
    this.#lifetimes.add(lifetime);
    this.metrics.begun();
    return () => {
      this.#lifetimes.delete(lifetime);
      this.metrics.ended();
      if (this.#lifetimes.size === 0) for (const resolve of this.#idle.splice(0)) resolve();
    };
  }

  /** Accounts for a request whose answer has begun: complete, or broken off. */
  finished({ endpoint, id, arrivedAt, end, error }: Outcome & { endpoint: string; id: string; arrivedAt: number }): void {
    const ms = this.clock.now() - arrivedAt;
    if (error || !end) {
      const code = error?.code ?? 'INTERNAL';
      this.metrics.failed(endpoint, code);
      this.log[code === 'CANCELLED' ? 'info' : 'warn']({ request: id, endpoint, code, ms }, error?.message ?? 'the answer has no end');
      return;
    }
    const { prompt_tokens: promptTokens, completion_tokens: generatedTokens, prompt_tokens_details: { cached_tokens: cachedTokens } } = end.usage;
    this.metrics.answered(endpoint);
    this.metrics.finished({ ms, promptTokens, cachedTokens, generatedTokens });
    this.log.info({ request: id, endpoint, promptTokens, cachedTokens, generatedTokens, ms }, 'request done');
  }

  /** Refuses new requests; resolves when none runs. */
  async drain(): Promise<void> {
    this.#draining = true;
    await this.#untilIdle();
  }

  /** Ends what runs. */
  async close(): Promise<void> {
    this.#draining = true;
    for (const lifetime of this.#lifetimes) lifetime.end(new TplaError('DRAINING', 'this route was shut down'));
    await this.#untilIdle();
    await this.registry.close();
  }

  #untilIdle(): Promise<void> {
    return this.#lifetimes.size === 0 ? Promise.resolve() : new Promise((resolve) => { this.#idle.push(resolve); });
  }
}
