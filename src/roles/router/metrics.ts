import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import type { WorkerRole } from '../../fleet/discovery.js';
import type { WorkerRegistry } from '../../fleet/registry.js';

const FIRST_TOKEN_BUCKETS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60];
const PER_TOKEN_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1];
const END_TO_END_BUCKETS = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600];

/** Recent requests weigh so much in the mean duration. */
const SMOOTHING = 0.1;

/** Prometheus metrics of route. */
export class RouterMetrics {
  readonly registry = new Registry();
  readonly #requests = this.#counter('tpla_route_requests_total', 'Requests answered, by endpoint and outcome (ok or error code)', ['endpoint', 'code']);
  readonly #errors = this.#counter('tpla_route_errors_total', 'Requests that ended with an error, by code', ['code']);
  readonly #retries = this.#counter('tpla_route_retries_total', 'Attempts that failed or were refused and were made again, by leg', ['leg']);
  readonly #promptTokens = this.#counter('tpla_route_prompt_tokens_total', 'Prompt tokens of finished requests, by whether their KV was found or computed', ['source']);
  readonly #generatedTokens = this.#counter('tpla_route_generated_tokens_total', 'Tokens generated for finished requests', []);
  readonly #firstToken = this.#histogram('tpla_route_ttft_seconds', 'Time from arrival to the first token', FIRST_TOKEN_BUCKETS);
  readonly #perToken = this.#histogram('tpla_route_tpot_seconds', 'Mean time per output token after the first, per choice', PER_TOKEN_BUCKETS);
  readonly #endToEnd = this.#histogram('tpla_route_e2e_seconds', 'Time from arrival to the end of a successful request', END_TO_END_BUCKETS);
  #meanMs = 1_000;

  constructor(fleet: WorkerRegistry, running: () => number) {
    new Gauge({ name: 'tpla_route_in_flight', help: 'Generation requests being served', registers: [this.registry], collect() { this.set(running()); } });
    new Gauge({
      name: 'tpla_route_worker_up', help: '1 where a worker takes requests', labelNames: ['role', 'worker'], registers: [this.registry],
      collect() { for (const worker of fleet.workers) this.set({ role: worker.role, worker: worker.address }, worker.usable ? 1 : 0); },
    });
    new Gauge({
      name: 'tpla_route_worker_legs', help: 'Requests that route has running on a worker', labelNames: ['role', 'worker'], registers: [this.registry],
      collect() { for (const worker of fleet.workers) this.set({ role: worker.role, worker: worker.address }, worker.legs); },
    });
  }

  /** Exponentially smoothed duration of successful requests. */
  get meanRequestMs(): number { return this.#meanMs; }

  answered(endpoint: string): void {
    this.#requests.inc({ endpoint, code: 'ok' });
  }

  failed(endpoint: string, code: string): void {
    this.#requests.inc({ endpoint, code });
    this.#errors.inc({ code });
  }

  retried(leg: WorkerRole): void {
    this.#retries.inc({ leg });
  }

  firstToken(ms: number): void {
    this.#firstToken.observe(ms / 1000);
  }

  perToken(ms: number): void {
    this.#perToken.observe(ms / 1000);
  }

  finished({ ms, promptTokens, cachedTokens, generatedTokens }: { ms: number; promptTokens: number; cachedTokens: number; generatedTokens: number }): void {
    this.#endToEnd.observe(ms / 1000);
    this.#promptTokens.inc({ source: 'cached' }, cachedTokens);
    this.#promptTokens.inc({ source: 'computed' }, promptTokens - cachedTokens);
    this.#generatedTokens.inc(generatedTokens);
    this.#meanMs += SMOOTHING * (ms - this.#meanMs);
  }

  #counter(name: string, help: string, labelNames: string[]): Counter {
    return new Counter({ name, help, labelNames, registers: [this.registry] });
  }

  #histogram(name: string, help: string, buckets: number[]): Histogram {
    return new Histogram({ name, help, buckets, registers: [this.registry] });
  }
}
