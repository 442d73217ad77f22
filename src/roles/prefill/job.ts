/** One prompt on the prefill worker. */
import { TplaError } from '../../errors.js';
import type { PrefillEvent, PrefillRequest } from '../../fleet/protocol.js';
import type { PageTable } from '../../kv/page_table.js';
import type { HandoffSession } from '../../transfer/types.js';

export interface EventSink {
  write(event: PrefillEvent): void;
  end(): void;
}

/**
 * - waiting: for pages
 * - loading: its cached prefix is being copied in and pushed on
 * - computing: takes part in steps
 * - ending: all is computed, or it was cancelled; pushes, commit and the pool are waited for
 */
export type JobPhase = 'waiting' | 'loading' | 'computing' | 'ending';

export class Job {
  readonly request: PrefillRequest;
  readonly serial: number;
  /** Ids of the prompt's full blocks. */
  readonly ids: readonly string[];
  readonly session: HandoffSession;
  readonly acceptedAt: number;
  /** Blocks that may be taken from a cache: at least one token is computed, whose logits give the first token. */
  readonly cacheable: readonly string[];
  phase: JobPhase = 'waiting';
  cancelled: TplaError | null = null;
  table: PageTable | null = null;
  /** Tokens whose KV is in the table's pages; of them, found in a cache. */
  computed = 0;
  cached = 0;
  lastStep = -1;
  queueMs = 0;
  computeMs = 0;
  firstPushAt: number | null = null;
  pushedBytes = 0;
  readonly #pushes = new Set<Promise<void>>();
  readonly #early: PrefillEvent[] = [];
  #sink: EventSink | null = null;
  #ended = false;

  constructor(request: PrefillRequest, serial: number, ids: readonly string[], pageTokens: number, session: HandoffSession, now: number) {
    this.request = request;
    this.serial = serial;
    this.ids = ids;
    this.cacheable = ids.slice(0, Math.floor((request.tokens.length - 1) / pageTokens));
    this.session = session;
    this.acceptedAt = now;
  }

  get remaining(): number {
    return this.request.tokens.length - this.computed;
  }

  /** Sends what of tokens [begin, end) decode wants. A push that fails cancels the job. */
  push(layers: [number, number], begin: number, end: number, bytesPerTokenPerLayer: number, now: number, onFailure: (error: TplaError) => void): void {
    const [wantedBegin, wantedEnd] = this.request.ticket.tokens;
    const range: [number, number] = [Math.max(begin, wantedBegin), Math.min(end, wantedEnd)];
    if (range[0] >= range[1] || this.cancelled) return;
    this.firstPushAt ??= now;
    this.pushedBytes += (range[1] - range[0]) * (layers[1] - layers[0]) * bytesPerTokenPerLayer;
    const push = this.session.push(layers, range, this.table!.tables()[0]!).catch((error: unknown) => {
      onFailure(error instanceof TplaError ? error : new TplaError('HANDOFF_FAILED', (error as Error).message, { cause: error }));
    });
    this.#pushes.add(push);
    void push.finally(() => this.#pushes.delete(push));
  }

  /** Resolves when no push reads this job's pages any more. */
  async pushesEnded(): Promise<void> {
    await Promise.all(this.#pushes);
  }

  /** Events written before are kept until the stream is there. */
  attach(sink: EventSink): void {
    this.#sink = sink;
    for (const event of this.#early.splice(0)) sink.write(event);
    if (this.#ended) sink.end();
  }

  emit(event: PrefillEvent): void {
    if (this.#ended) return;
    if (this.#sink) this.#sink.write(event);
    else this.#early.push(event);
  }

  end(): void {
    this.#ended = true;
    this.#sink?.end();
  }
}
