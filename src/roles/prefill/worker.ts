/**
 * The prefill worker: computes the part of each prompt that no cache has, several prompts a step, and pushes the KV of a layer to decode while
 * the next layers are computed. A prompt's pages are given back when nothing reads them any more: pushes, commit, copies to the pool.
 */
import type { Logger } from 'pino';
import type { Clock } from '../../clock.js';
import { TplaError, toTplaError } from '../../errors.js';
import type { PrefillRequest } from '../../fleet/protocol.js';
import { blockIds } from '../../kv/hash.js';
import type { PageSpace } from '../../kv/page_space.js';
import { PageTable } from '../../kv/page_table.js';
import type { BlockStore, KvSequence } from '../../kv/pool_client.js';
import type { ModelIdentity } from '../../model/spec.js';
import type { CancelFlag, Engine, KvArena, PrefillItem, SampledToken, Sampler, SamplingParams } from '../../native/types.js';
import { layerGroups } from '../../transfer/layer_groups.js';
import type { HandoffSender, HandoffSession } from '../../transfer/types.js';
import { samplingParams } from '../sampling.js';
import { errorEvent } from '../stream_error.js';
import { planChunks, type Chunk, type ChunkLimits } from './chunks.js';
import { Job } from './job.js';
import { checkPrefill, type PrefillLimits } from './request.js';

export interface PrefillParts {
  identity: ModelIdentity;
  arena: KvArena;
  space: PageSpace;
  engine: Engine;
  sender: HandoffSender;
  store: BlockStore | null;
  createSampler(params: SamplingParams): Sampler;
  clock: Clock;
  log: Logger;
}

export interface PrefillSettings extends PrefillLimits, ChunkLimits {
  maxWaiting: number;
}

export interface PrefillCounters {
  steps: number;
  requests: number;
  failed: number;
  cancelled: number;
  computedTokens: number;
  cachedTokens: number;
  pushedBytes: number;
  accountingErrors: number;
}

export class PrefillWorker {
  readonly counters: PrefillCounters = { steps: 0, requests: 0, failed: 0, cancelled: 0, computedTokens: 0, cachedTokens: 0, pushedBytes: 0, accountingErrors: 0 };
  /** Called with what a step took, in milliseconds. */
  onStep: (ms: number, tokens: number) => void = () => {};
  readonly #parts: PrefillParts;
  readonly #settings: PrefillSettings;
  readonly #jobs = new Set<Job>();
  /** Requests whose hand-off is being opened. */
  #opening = 0;
  #serial = 0;
  #draining = false;
  #closed = false;
  #changed = false;
  #wake: () => void = () => {};
  /** The step that runs: who has a part in it, and how to stop it. */
  #step: { jobs: Job[]; flag: CancelFlag } | null = null;
  readonly #onIdle = new Set<() => void>();
  readonly #loop: Promise<void>;

  constructor(parts: PrefillParts, settings: PrefillSettings) {
    this.#parts = parts;
    this.#settings = settings;
    this.#loop = this.#run();
  }

  // ---------------------------------------------------------------- state

  get draining(): boolean {
    return this.#draining;
  }

  get running(): number {
    return this.#jobs.size - this.#inPhase('waiting').length;
  }

  get waiting(): number {
    return this.#opening + this.#inPhase('waiting').length;
  }

  get pendingTokens(): number {
    return [...this.#jobs].reduce((sum, { remaining }) => sum + remaining, 0);
  }

  get contextLength(): number {
    return Math.min(this.#settings.contextLength, this.#settings.capacityTokens);
  }

  // ---------------------------------------------------------------- requests

  /**
   * Opens the hand-off at once, so that decode hears of this worker while the prompt waits its turn. Where this throws OVERLOADED or DRAINING the
   * ticket is unused and another worker may have it.
   */
  async accept(request: PrefillRequest, gone: AbortSignal): Promise<Job> {
    if (this.#draining) throw new TplaError('DRAINING', 'this worker is about to stop; send the request to another');
    checkPrefill(request, this.#settings);
    if (this.waiting > this.#settings.maxWaiting) {
      throw new TplaError('OVERLOADED', `${this.waiting} prompts wait already (max_waiting ${this.#settings.maxWaiting}); try another worker, or again later`);
    }
    const { identity, arena, space, clock } = this.#parts;
    const acceptedAt = clock.now();
    const session = await this.#open(request, gone);
    const ids = blockIds(request.tokens, identity, { dtype: arena.layout.dtype, pageTokens: space.pageTokens, salt: '' });
    const job = new Job(request, this.#serial++, ids, space.pageTokens, session, acceptedAt);
    this.#jobs.add(job);
    this.counters.requests++;
    gone.addEventListener('abort', () => this.#cancel(job, leftBehind()), { once: true });
    session.aborted.addEventListener('abort', () => this.#cancel(job, toTplaError(session.aborted.reason, 'HANDOFF_FAILED')), { once: true });
    if (session.aborted.aborted) this.#cancel(job, toTplaError(session.aborted.reason, 'HANDOFF_FAILED'));
    if (this.#closed) this.#cancel(job, new TplaError('DRAINING', 'this worker stops'));
    this.#admit();
    this.#poke();
    return job;
  }

  async #open({ ticket }: PrefillRequest, gone: AbortSignal): Promise<HandoffSession> {
    this.#opening++;
    try {
      const session = await this.#parts.sender.open(ticket);
      if (!gone.aborted) return session;
      session.fail('the request was cancelled');
      throw leftBehind();
    } finally {
      this.#opening--;
      this.#poke();
    }
  }

  /** Takes nothing new; resolves when all prompts have been handed over. */
  async drain(): Promise<void> {
    this.#draining = true;
    while (this.#jobs.size + this.#opening > 0) await new Promise<void>((resolve) => this.#onIdle.add(resolve));
  }

  /** Ends all prompts at once with DRAINING; resolves when nothing touches the arena any more. */
  async close(): Promise<void> {
    this.#draining = true;
    this.#closed = true;
    for (const job of this.#jobs) this.#cancel(job, new TplaError('DRAINING', 'this worker stops'));
    this.#poke();
    await this.#loop;
  }

  #cancel(job: Job, error: TplaError): void {
    if (job.cancelled || !this.#jobs.has(job)) return;
    job.cancelled = error;
    job.session.fail(error.message);
    if (this.#step?.jobs.every(({ cancelled }) => cancelled !== null)) Atomics.store(this.#step.flag, 0, 1);
    this.#poke();
  }

  // ---------------------------------------------------------------- loop

  async #run(): Promise<void> {
    for (;;) {
      this.#changed = false;
      this.#reap();
      this.#admit();
      const chunks = planChunks(this.#inPhase('computing'), this.#settings);
      if (chunks.length > 0) await this.#compute(chunks);
      else if (this.#closed && this.#jobs.size === 0 && this.#opening === 0) return;
      else await this.#change();
    }
  }

  #poke(): void {
    this.#changed = true;
    this.#wake();
  }

  async #change(): Promise<void> {
    if (this.#changed) return;
    if (this.#jobs.size === 0) {
      this.#checkAccounting();
      for (const resolve of this.#onIdle) resolve();
      this.#onIdle.clear();
    }
    await new Promise<void>((resolve) => { this.#wake = resolve; });
  }

  /** At rest nothing may be referenced. */
  #checkAccounting(): void {
    const { space, log } = this.#parts;
    const faults = space.check();
    if (space.counts.used > 0) faults.push(`${space.counts.used} pages are referenced though no request is here`);
    if (faults.length === 0) return;
    this.counters.accountingErrors += faults.length;
    log.error({ faults: faults.slice(0, 20) }, 'page accounting is wrong');
  }

  #inPhase(phase: Job['phase']): Job[] {
    return [...this.#jobs].filter((job) => job.phase === phase);
  }

  #reap(): void {
    for (const job of this.#jobs) if (job.cancelled && (job.phase === 'waiting' || job.phase === 'computing')) this.#endSoon(job, () => this.#abandon(job));
  }

  // ---------------------------------------------------------------- before computing

  /** Pages for the whole prompt, in order of arrival; who does not fit yet holds up those behind it, so that none starves. */
  #admit(): void {
    const { space } = this.#parts;
    for (const job of this.#inPhase('waiting')) {
      if (job.cancelled) continue;
      const table = new PageTable(space, 0);
      job.table = table;
      const cached = space.cachedPrefix(job.cacheable, 0);
      for (const id of job.ids.slice(0, cached)) table.adopt(id);
      if (space.pagesFor(job.request.tokens.length) - cached > space.lanes[0]!.available) {
        table.release();
        job.table = null;
        return;
      }
      table.grow(job.request.tokens.length);
      job.computed = cached * space.pageTokens;
      job.phase = 'loading';
      job.emit({ event: 'started' });
      this.#load(job).then(() => {
        job.phase = 'computing';
        this.#poke();
      }, (error) => this.#fault(job, error));
    }
  }

  /** Takes from the pool what goes beyond this worker's own cache, and pushes on what decode lacks of the prefix. */
  async #load(job: Job): Promise<void> {
    const { store, space, clock, arena } = this.#parts;
    const own = job.computed / space.pageTokens;
    const wanted = job.cacheable;
    if (store?.connected && wanted.length > own) {
      const lease = await store.find(wanted);
      const loaded = job.cancelled ? own : await store.load(lease, own, lease.blocks, this.#sequence(job));
      lease.release();
      job.computed = Math.max(own, loaded) * space.pageTokens;
      for (let index = own; index < loaded; index++) job.table!.publish(index, job.ids[index]!);
    }
    job.cached = job.computed;
    const { layers } = arena.layout;
    const bytes = arena.bytesPerTokenPerRank * job.computed;
    for (const group of layerGroups(job.session.path, layers, bytes)) this.#push(job, group, 0, job.computed, clock.now());
  }

  // ---------------------------------------------------------------- computing

  async #compute(chunks: Chunk<Job>[]): Promise<void> {
    const { engine, clock } = this.#parts;
    const started = clock.now();
    const items = chunks.map(({ candidate, count }) => prefillItem(candidate, count));
    const jobs = chunks.map(({ candidate }) => candidate);
    const flag = new Int32Array(1);
    this.#step = { jobs, flag };
    for (const job of jobs) if (job.lastStep < 0) job.queueMs = started - job.acceptedAt;
    let logits: Float32Array[];
    try {
      logits = await engine.prefill(items, (layer) => {
        const now = clock.now();
        chunks.forEach(({ candidate, count }) => this.#push(candidate, [layer, layer + 1], candidate.computed, candidate.computed + count, now));
      }, flag);
    } catch (thrown) {
      // A step is stopped only once all who have a part in it are cancelled; anything else is the engine's failure.
      for (const job of jobs) this.#cancel(job, toTplaError(thrown));
      return;
    } finally {
      this.#step = null;
    }
    const ms = clock.now() - started;
    const step = this.counters.steps++;
    const tokens = chunks.reduce((sum, { count }) => sum + count, 0);
    this.counters.computedTokens += tokens;
    this.onStep(ms, tokens);
    chunks.forEach(({ candidate: job, count }, i) => {
      job.computed += count;
      job.computeMs += ms;
      job.lastStep = step;
      if (job.remaining === 0 && !job.cancelled) this.#endSoon(job, () => this.#deliver(job, logits[i]!));
    });
  }

  #push(job: Job, layers: [number, number], begin: number, end: number, now: number): void {
    const { layout, bytesPerTokenPerRank } = this.#parts.arena;
    job.push(layers, begin, end, bytesPerTokenPerRank / layout.layers, now, (error) => this.#cancel(job, error));
  }

  // ---------------------------------------------------------------- after computing

  /** Runs the end of a job beside the loop. */
  #endSoon(job: Job, end: () => Promise<void>): void {
    job.phase = 'ending';
    end().catch((error) => this.#fault(job, error)).finally(() => {
      job.table?.release();
      job.table = null;
      this.#jobs.delete(job);
      this.#poke();
    });
  }

  async #deliver(job: Job, logits: Float32Array): Promise<void> {
    const { clock, store } = this.#parts;
    const { request, session } = job;
    const prefill = {
      promptTokens: request.tokens.length, pooledTokens: job.cached, skippedTokens: request.ticket.tokens[0],
      computedTokens: request.tokens.length - job.cached, queueMs: job.queueMs, computeMs: job.computeMs,
    };
    try {
      await session.commit({ firstTokens: this.#firstTokens(request, logits), prefill });
    } catch (error) {
      job.cancelled ??= toTplaError(error, 'HANDOFF_FAILED');
      return this.#abandon(job);
    }
    this.counters.cachedTokens += job.cached;
    this.counters.pushedBytes += job.pushedBytes;
    const transfer = { path: session.path, bytes: job.pushedBytes, ms: clock.now() - (job.firstPushAt ?? clock.now()) };
    job.emit({ event: 'done', prefill, transfer });
    job.end();
    await job.pushesEnded();
    job.ids.forEach((id, index) => job.table!.publish(index, id));
    if (store?.connected) await store.offer(job.ids, 0, this.#sequence(job));
  }

  #firstTokens({ tokens, sampling, n }: PrefillRequest, logits: Float32Array): SampledToken[] {
    const prompt = Int32Array.from(tokens);
    return Array.from({ length: n }, (_, choice) => {
      const sampler = this.#parts.createSampler(samplingParams(sampling, choice));
      sampler.accept(prompt, true);
      return sampler.sample(logits, 0);
    });
  }

  /** The end of a job that was cancelled: its client is told, its pages stay until no push reads them. */
  async #abandon(job: Job): Promise<void> {
    const error = job.cancelled!;
    if (error.code === 'CANCELLED') this.counters.cancelled++;
    else {
      this.counters.failed++;
      this.#parts.log.warn({ request: job.request.id, code: error.code }, error.message);
    }
    job.session.fail(error.message);
    job.emit(errorEvent(error));
    job.end();
    await job.pushesEnded();
  }

  #fault(job: Job, thrown: unknown): void {
    this.#parts.log.error({ request: job.request.id, err: thrown }, 'unexpected failure');
    job.phase = job.phase === 'loading' ? 'computing' : job.phase;
    this.#cancel(job, toTplaError(thrown));
    job.emit(errorEvent(toTplaError(thrown)));
    job.end();
  }

  #sequence({ table }: Job): KvSequence {
    return { arena: this.#parts.arena, pages: table!.tables() };
  }
}

function leftBehind(): TplaError {
  return new TplaError('CANCELLED', 'the request was cancelled');
}

function prefillItem({ request, computed, table, remaining }: Job, count: number): PrefillItem {
  return {
    tokens: Int32Array.from(request.tokens.slice(computed, computed + count)),
    position: computed,
    pages: table!.tables()[0]!,
    logits: count === remaining ? 'last' : 'none',
  };
}
