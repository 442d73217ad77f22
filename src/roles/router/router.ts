import { setTimeout } from 'node:timers/promises';
import type { Logger } from 'pino';
import type { Clock } from '../../clock.js';
import type { RouteConfig } from '../../config/types.js';
import { TplaError } from '../../errors.js';
import { workersFromConfig } from '../../fleet/discovery.js';
import { WorkerRegistry } from '../../fleet/registry.js';
import type { RequestLimits } from '../../http/openai_request.js';
import { retryAfterSeconds } from '../../policy/retry.js';
import type { RoleStatus } from '../endpoints.js';
import type { RoleContext } from '../role.js';
import type { Outcome } from './answer.js';
import type { Lifetime } from './lifetime.js';
import { RouterMetrics } from './metrics.js';
import { Placer } from './placer.js';
import { ServedModel } from './served_model.js';
import type { TextContext } from './text_generation.js';

/** How long a client that does not read may hold up the end. */
const FAREWELL_MS = 1_000;

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
    this.metrics = new RouterMetrics(this.registry, () => this.running);
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

  /** Requests that text is generated for. */
  get running(): number {
    return this.#lifetimes.size;
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

  get status(): RoleStatus {
    if (this.#draining) return 'draining';
    return this.registry.usable('decode').length > 0 && this.registry.usable('prefill').length > 0 ? 'ok' : 'unavailable';
  }

  refuseWhenDraining(): void {
    if (this.#draining) throw new TplaError('DRAINING', 'this route is shutting down; send the request to another one', { retryAfterSeconds: 1 });
  }

  /** Counts a request until its response has gone out. */
  begin(lifetime: Lifetime): void {
    this.#lifetimes.add(lifetime);
    void lifetime.closed.then(() => {
      this.#lifetimes.delete(lifetime);
      if (this.#lifetimes.size === 0) for (const resolve of this.#idle.splice(0)) resolve();
    });
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

  /** Ends what runs, and gives clients a moment to take the error. */
  async close(): Promise<void> {
    this.#draining = true;
    for (const lifetime of this.#lifetimes) lifetime.end(new TplaError('DRAINING', 'this route was shut down'));
    const farewell = new AbortController();
    await Promise.race([this.#untilIdle(), setTimeout(FAREWELL_MS, undefined, farewell).catch(() => {})]);
    farewell.abort();
    await this.registry.close();
  }

  #untilIdle(): Promise<void> {
    return this.#lifetimes.size === 0 ? Promise.resolve() : new Promise((resolve) => { this.#idle.push(resolve); });
  }
}
