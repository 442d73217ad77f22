/**
 * The decode worker: takes requests in, grants pages to prefill workers, and runs all sequences whose prompt has landed, one step after the
 * other. While a step runs, pages are taken and given back only for sequences that have no part in it; so no step ever writes into a page
 * that belongs to somebody else by now.
 */
import type { Logger } from 'pino';
import type { Clock } from '../../clock.js';
import { TplaError, toTplaError } from '../../errors.js';
import type { DecodeReport, GenerateRequest } from '../../fleet/protocol.js';
import { BlockChain, blockIds } from '../../kv/hash.js';
import type { PageSpace } from '../../kv/page_space.js';
import type { PageCopy } from '../../kv/page_table.js';
import type { BlockStore } from '../../kv/pool_client.js';
import type { ModelIdentity } from '../../model/spec.js';
import type { DecodeItem, Engine, KvArena, SampledToken, Sampler, SamplingParams } from '../../native/types.js';
import type { HandoffCommit, HandoffReceiver } from '../../transfer/types.js';
import { samplingParams } from '../sampling.js';
import { errorEvent } from '../stream_error.js';
import { admitPrompt, readmit, type AdmissionInput } from './admission.js';
import { planBatch, type BatchRow, type PagePolicy } from './batch.js';
import { Choice } from './choice.js';
import { comparePriority, Job } from './job.js';
import { decodesApproximately, noteDecoded, Parking, type ParkingCounters } from './parking.js';
import { checkGenerate, effectiveContext, type DecodeLimits } from './request.js';

export interface DecodeParts {
  identity: ModelIdentity;
  arena: KvArena;
  space: PageSpace;
  engine: Engine;
  receiver: HandoffReceiver;
  store: BlockStore | null;
  createSampler(params: SamplingParams): Sampler;
  copyPage(copy: PageCopy): void;
  clock: Clock;
  log: Logger;
}

export interface DecodeSettings extends DecodeLimits {
  maxWaiting: number;
  /** Whose first token is generated on. */
  firstToken: 'prefill' | 'decode';
  leaseMs: number;
}

export interface DecodeCounters extends ParkingCounters {
  steps: number;
  tokens: number;
  requests: number;
  failed: number;
  cancelled: number;
  preemptions: number;
  accountingErrors: number;
}

export class DecodeWorker {
  readonly counters: DecodeCounters = { steps: 0, tokens: 0, requests: 0, failed: 0, cancelled: 0, preemptions: 0, relandedTokens: 0, recomputedTokens: 0, accountingErrors: 0 };
  /** Called with what a step took, in milliseconds. */
  onStep: (ms: number, rows: number) => void = () => {};
  /** Called with every hand-off that has been taken in. */
  onLanded: (commit: HandoffCommit) => void = () => {};
  readonly #parts: DecodeParts;
  readonly #settings: DecodeSettings;
  readonly #parking: Parking;
  readonly #jobs = new Map<string, Job>();
  readonly #choices = new Set<Choice>();
  #serial = 0;
  #draining = false;
  #closed = false;
  /** Pages or phases have changed since the loop last looked. */
  #changed = false;
  #wake: () => void = () => {};
  readonly #admissions = new Map<Job, { resolve(): void; reject(error: Error): void }>();
  readonly #loop: Promise<void>;
  readonly #onIdle = new Set<() => void>();

  constructor(parts: DecodeParts, settings: DecodeSettings) {
    this.#parts = parts;
    this.#settings = settings;
    this.#parking = new Parking(parts, settings, this.counters, (commit) => this.onLanded(commit));
    this.#loop = this.#run();
  }

  // ---------------------------------------------------------------- state

  get draining(): boolean {
    return this.#draining;
  }

  get running(): number {
    return this.#jobs.size - this.#admissions.size;
  }

  get waiting(): number {
    return this.#admissions.size;
  }

  /** Tokens of all sequences that hold or await pages. */
  get pendingTokens(): number {
    let tokens = 0;
    for (const job of this.#jobs.values()) {
      tokens += job.choices.length === 0 ? job.request.tokens.length : job.choices.reduce((sum, choice) => sum + (choice.live ? choice.tokens.length : 0), 0);
    }
    return tokens;
  }

  get contextLength(): number {
    return effectiveContext(this.#settings);
  }

  // ---------------------------------------------------------------- requests

  /** Resolves once pages are reserved; its events, 'reserved' first, go to the sink that is then attached. Rejects where there is no place for it. */
  async accept(request: GenerateRequest, gone: AbortSignal): Promise<Job> {
    if (this.#draining) throw new TplaError('DRAINING', 'this worker is about to stop; send the request to another');
    checkGenerate(request, this.#settings);
    if (this.#jobs.has(request.id)) throw new TplaError('REQUEST_INVALID', `request ${request.id} is running already`, { param: 'id' });
    const { identity, space, arena } = this.#parts;
    const ids = blockIds(request.tokens, identity, { dtype: arena.layout.dtype, pageTokens: space.pageTokens, salt: '' });
    const job = new Job(request, this.#serial++, ids, this.contextLength);
    this.#jobs.set(request.id, job);
    const admitted = new Promise<void>((resolve, reject) => this.#admissions.set(job, { resolve, reject }));
    this.#admit();
    if (job.phase === 'waiting' && this.#admissions.size > this.#settings.maxWaiting) {
      this.#admissions.delete(job);
      this.#forget(job);
      throw new TplaError('OVERLOADED', `${this.#admissions.size} requests wait for pages already (max_waiting ${this.#settings.maxWaiting}); try another worker, or again later`);
    }
    this.counters.requests++;
    const leave = () => this.#cancel(job, new TplaError('CANCELLED', 'the client closed its stream'));
    gone.addEventListener('abort', leave, { once: true });
    if (gone.aborted) leave();
    this.#poke();
    await admitted;
    return job;
  }

  /** Ends one choice with reason 'stop'. */
  stop(id: string, index: number): void {
    const choice = this.#jobs.get(id)?.choices[index];
    if (!choice) return;
    choice.stopRequested = true;
    this.#poke();
  }

  /** Takes nothing new; resolves when all requests have ended. Those that still wait for pages are turned away. */
  async drain(): Promise<void> {
    this.#draining = true;
    for (const job of [...this.#admissions.keys()]) this.#cancel(job, new TplaError('DRAINING', 'this worker is about to stop; send the request to another'));
    if (this.#jobs.size > 0) await new Promise<void>((resolve) => this.#onIdle.add(resolve));
  }

  /** Ends all requests at once with DRAINING; resolves when no step and no copy of ours touches the arena any more. Hand-offs are the receiver's to end. */
  async close(): Promise<void> {
    this.#draining = true;
    for (const job of this.#jobs.values()) this.#cancel(job, new TplaError('DRAINING', 'this worker stops'));
    this.#closed = true;
    this.#poke();
    await this.#loop;
  }

  #cancel(job: Job, error: TplaError): void {
    if (job.cancelled || job.phase === 'ended') return;
    job.cancelled = error;
    if (error.code === 'CANCELLED') this.counters.cancelled++;
    if (job.phase === 'waiting') {
      const admission = this.#admissions.get(job)!;
      this.#admissions.delete(job);
      this.#forget(job);
      admission.reject(error);
    } else if (job.session !== null) {
      this.#tell(job, error);
      this.#parts.receiver.cancel(job.session);
    }
    for (const { session } of job.choices) if (session !== null) this.#parts.receiver.cancel(session);
    this.#poke();
  }

  /** Last event of a request that broke off. Its pages may be needed for longer. */
  #tell(job: Job, error: TplaError): void {
    if (job.told) return;
    if (error.code !== 'CANCELLED') {
      this.counters.failed++;
      this.#parts.log.warn({ request: job.request.id, code: error.code }, error.message);
    }
    job.emit(errorEvent(error));
    job.endStream();
  }

  #fail(job: Job, error: TplaError): void {
    this.#tell(job, error);
    this.#forget(job);
  }

  /** The request holds nothing any more. */
  #forget(job: Job): void {
    job.phase = 'ended';
    this.#jobs.delete(job.request.id);
    if (this.#jobs.size > 0) return;
    for (const resolve of this.#onIdle) resolve();
    this.#onIdle.clear();
  }

  // ---------------------------------------------------------------- loop

  async #run(): Promise<void> {
    for (;;) {
      this.#changed = false;
      this.#reap();
      this.#readmit();
      this.#admit();
      const rows = this.#plan();
      if (rows.length > 0) await this.#step(rows);
      else if (this.#closed && this.#choices.size === 0) return;
      else await this.#change();
    }
  }

  #poke(): void {
    this.#changed = true;
    this.#wake();
  }

  async #change(): Promise<void> {
    if (this.#changed) return;
    if (this.#jobs.size === 0) this.#checkAccounting();
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

  /** Ends choices that are to end, and requests none of whose choices lives. */
  #reap(): void {
    for (const choice of this.#choices) {
      if (choice.phase === 'leaving' || choice.phase === 'returning') continue;
      if (choice.job.cancelled) this.#release(choice);
      else if (choice.stopRequested && choice.live) this.#finish(choice, 'stop');
    }
    for (const job of this.#jobs.values()) {
      if (job.phase !== 'running' || job.choices.some(({ live }) => live)) continue;
      if (job.cancelled) this.#fail(job, toTplaError(job.cancelled));
      else {
        job.emit({ event: 'done', decode: this.#report(job) });
        job.endStream();
        this.#forget(job);
      }
    }
  }

  /** Whether sequences that lack pages can be parked without losing their KV. */
  get #policy(): PagePolicy {
    return this.#parts.store?.connected ? 'preempt' : 'avoid';
  }

  #phase(phase: Choice['phase']): Choice[] {
    return [...this.#choices].filter((choice) => choice.phase === phase);
  }

  get #landing(): Job[] {
    return [...this.#jobs.values()].filter(({ phase }) => phase === 'landing');
  }

  #admissionInput(): AdmissionInput {
    return {
      space: this.#parts.space, policy: this.#policy, landing: this.#landing,
      holding: [...this.#choices].filter(({ phase }) => phase === 'running' || phase === 'leaving' || phase === 'returning'),
    };
  }

  // ---------------------------------------------------------------- landing

  /** Grants pages to requests in order; one that does not fit yet holds up those behind it, so that none starves. */
  #admit(): void {
    const queue = [...this.#admissions.keys()].sort(comparePriority);
    for (const job of queue) {
      if (this.#phase('parked').length > 0) return;
      const active = this.#choices.size + this.#landing.reduce((sum, { request }) => sum + request.n, 0);
      if (active + job.request.n > this.#settings.maxBatch) return;
      if (!admitPrompt(job, this.#admissionInput())) return;
      const { resolve } = this.#admissions.get(job)!;
      this.#admissions.delete(job);
      if (job.cachedTokens === job.request.tokens.length) this.#startCached(job);
      else this.#grant(job);
      resolve();
    }
  }

  #grant(job: Job): void {
    const { receiver } = this.#parts;
    const table = job.table!;
    job.phase = 'landing';
    const { ticket, committed, failing } = receiver.open({
      tokens: [job.cachedTokens, job.request.tokens.length], pages: table.tables(), leaseMs: this.#settings.leaseMs,
      ...(table.rank === undefined ? {} : { rank: table.rank }),
    });
    job.session = ticket.session;
    job.emit({ event: 'reserved', ticket, cached_tokens: job.cachedTokens });
    // The client hears of a failure at once; its pages come back when `committed` says that no write can reach them.
    failing.addEventListener('abort', () => this.#tell(job, toTplaError(failing.reason, 'HANDOFF_FAILED')), { once: true });
    committed.then((commit) => this.#landed(job, commit), (error) => this.#notLanded(job, toTplaError(error, 'HANDOFF_FAILED'))).finally(() => this.#poke());
  }

  #notLanded(job: Job, error: TplaError): void {
    job.table!.release();
    job.table = null;
    job.session = null;
    this.#fail(job, job.cancelled ? toTplaError(job.cancelled) : error);
  }

  #landed(job: Job, commit: HandoffCommit): void {
    const { firstTokens, path, bytes, transferMs, prefill } = commit;
    if (job.cancelled) return this.#notLanded(job, toTplaError(job.cancelled));
    if (firstTokens.length !== job.request.n) {
      return this.#notLanded(job, new TplaError('PROTOCOL', `prefill sent ${firstTokens.length} first tokens for ${job.request.n} choices`));
    }
    job.session = null;
    this.onLanded(commit);
    job.ids.forEach((id, index) => job.table!.publish(index, id));
    job.emit({ event: 'landed', transfer: { path, bytes, ms: transferMs }, prefill });
    if (this.#settings.firstToken === 'decode') return this.#decodeLastToken(job);
    const choices = this.#fork(job, job.request.tokens.length);
    firstTokens.forEach((token, index) => this.#advance(choices[index]!, token));
  }

  /** The first token is drawn after a decode step over the last prompt token, whose KV that step writes once more. */
  #decodeLastToken(job: Job): void {
    for (const choice of this.#fork(job, job.request.tokens.length - 1)) noteDecoded(choice, this.#parts.arena.layout);
  }

  /** The whole prompt is in this worker's cache: nothing is pushed. */
  #startCached(job: Job): void {
    job.emit({ event: 'reserved', ticket: null, cached_tokens: job.cachedTokens });
    this.#decodeLastToken(job);
  }

  /** The choices of a request, over the prompt's pages. */
  #fork(job: Job, computed: number): Choice[] {
    const table = job.table!;
    job.table = null;
    job.phase = 'running';
    const prompt = Int32Array.from(job.request.tokens);
    job.choices = Array.from({ length: job.request.n }, (_, index) => {
      const sampler = this.#parts.createSampler(samplingParams(job.request.sampling, index));
      sampler.accept(prompt, true);
      return new Choice(job, index, sampler, index === 0 ? table : table.fork(), computed);
    });
    for (const choice of job.choices) this.#choices.add(choice);
    return job.choices;
  }

  // ---------------------------------------------------------------- steps

  #plan(): BatchRow[] {
    const batch = planBatch({
      space: this.#parts.space, policy: this.#policy, running: this.#phase('running'),
      leaving: this.#phase('leaving'), landing: this.#landing, maxBatch: this.#settings.maxBatch,
    });
    for (const copy of batch.copies) this.#parts.copyPage(copy);
    for (const victim of batch.victims) this.#park(victim);
    return batch.rows;
  }

  async #step(rows: BatchRow[]): Promise<void> {
    const { engine, clock } = this.#parts;
    const started = clock.now();
    let logits: Float32Array;
    try {
      logits = await engine.decode(rows.flatMap(decodeItems));
    } catch (thrown) {
      for (const job of new Set(rows.map(({ choice }) => choice.job))) job.cancelled ??= toTplaError(thrown);
      return;
    }
    this.counters.steps++;
    this.onStep(clock.now() - started, rows.length);
    const vocab = logits.length / rows.reduce((sum, { count }) => sum + count, 0);
    let row = 0;
    for (const { choice, count } of rows) {
      row += count;
      choice.computed += count;
      if (choice.pending === 0 && !choice.job.cancelled) this.#draw(choice, logits.subarray((row - 1) * vocab, row * vocab));
    }
  }

  #draw(choice: Choice, logits: Float32Array): void {
    try {
      this.#advance(choice, choice.sampler.sample(logits, choice.generated));
    } catch (thrown) {
      choice.job.cancelled = toTplaError(thrown);
    }
  }

  /** Takes a new token in: reports it, and ends the choice where it was the last. */
  #advance(choice: Choice, token: SampledToken): void {
    const { request } = choice.job;
    choice.tokens.push(token.token);
    choice.sampler.accept(Int32Array.of(token.token), false);
    choice.lastAt = this.#parts.clock.now();
    if (choice.generated === 1) choice.firstAt = choice.lastAt;
    this.counters.tokens++;
    choice.job.emit({ event: 'token', index: choice.index, token });
    if (request.stop_token_ids.includes(token.token)) this.#finish(choice, 'stop');
    else if (choice.tokens.length >= choice.maxLength) this.#finish(choice, 'length');
  }

  #finish(choice: Choice, reason: 'stop' | 'length'): void {
    choice.job.emit({ event: 'finish', index: choice.index, reason });
    if (choice.phase === 'running') this.#publishGenerated(choice);
    this.#release(choice);
  }

  /**
   * What decode computed is as good as what prefill would have computed, except where its attention is approximate: there only prompts are shared,
   * so that a prompt's KV is always exact.
   */
  #publishGenerated({ table, tokens, computed, job }: Choice): void {
    const { identity, arena, space } = this.#parts;
    if (decodesApproximately(arena.layout)) return;
    const chain = new BlockChain(identity, { dtype: arena.layout.dtype, pageTokens: space.pageTokens, salt: '' });
    const ids = chain.append(tokens.slice(0, computed));
    for (let index = job.ids.length; index < ids.length; index++) table.publish(index, ids[index]!);
  }

  #release(choice: Choice): void {
    if (choice.phase === 'running') choice.table.release();
    choice.lease?.release();
    choice.lease = null;
    choice.phase = 'finished';
    this.#choices.delete(choice);
    this.#changed = true;
  }

  #report(job: Job): DecodeReport {
    const { arena } = this.#parts;
    const gaps = job.choices.reduce((sum, { generated }) => sum + Math.max(0, generated - 1), 0);
    const ms = job.choices.reduce((sum, { firstAt, lastAt }) => sum + (lastAt - firstAt), 0);
    return {
      attention: arena.layout.form, ranks: arena.layout.ranks, tokens: job.choices.reduce((sum, { generated }) => sum + generated, 0),
      tpot_ms: gaps > 0 ? ms / gaps : 0, kv_bytes_per_token_per_rank: arena.bytesPerTokenPerRank, preemptions: job.preemptions,
    };
  }

  // ---------------------------------------------------------------- preemption

  #park(choice: Choice): void {
    choice.phase = 'leaving';
    choice.job.preemptions++;
    this.counters.preemptions++;
    this.#parking.park(choice).then(() => {
      choice.table.release();
      choice.phase = 'parked';
      this.#poke();
    });
  }

  /** Brings parked sequences back, the most important first. */
  #readmit(): void {
    for (const choice of this.#phase('parked').sort((a, b) => comparePriority(a.job, b.job) || a.index - b.index)) {
      const parked = choice.computed;
      if (!readmit(choice, this.#admissionInput())) return;
      choice.phase = 'returning';
      this.#parking.bringBack(choice, parked).then(() => {
        choice.phase = 'running';
        this.#poke();
      });
    }
  }
}

function decodeItems({ choice, count }: BatchRow): DecodeItem[] {
  const { table, tokens, computed } = choice;
  const pages = table.tables();
  return Array.from({ length: count }, (_, i) => ({
    token: tokens[computed + i]!, position: computed + i, pages, ...(table.rank === undefined ? {} : { rank: table.rank }),
  }));
}
