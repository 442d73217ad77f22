/** One request on the decode worker, from admission to its last event. */
import type { GenerateEvent, GenerateRequest, QosClass } from '../../fleet/protocol.js';
import type { PageTable } from '../../kv/page_table.js';
import type { Choice } from './choice.js';

export interface EventSink {
  write(event: GenerateEvent): void;
  end(): void;
}

/**
 * - waiting: for pages
 * - landing: pages are granted to a prefill worker
 * - running: choices exist
 * - ended: all pages are given back
 */
export type JobPhase = 'waiting' | 'landing' | 'running' | 'ended';

const QOS_RANK: Record<QosClass, number> = { interactive: 0, standard: 1, batch: 2 };

export class Job {
  readonly request: GenerateRequest;
  /** Order of arrival. */
  readonly serial: number;
  /** Ids of the prompt's full blocks. */
  readonly ids: readonly string[];
  /** Tokens, prompt included, at which every choice ends. */
  readonly maxLength: number;
  phase: JobPhase = 'waiting';
  /** The client has heard the last of it, though pages may still be held. */
  told = false;
  /** Set once the request is to end early: its client is gone, or the worker closes. */
  cancelled: Error | null = null;
  /** While landing: the prompt's pages, and how many tokens were there before. */
  table: PageTable | null = null;
  cachedTokens = 0;
  session: string | null = null;
  choices: Choice[] = [];
  preemptions = 0;
  readonly #early: GenerateEvent[] = [];
  #sink: EventSink | null = null;

  constructor(request: GenerateRequest, serial: number, ids: readonly string[], context: number) {
    this.request = request;
    this.serial = serial;
    this.ids = ids;
    this.maxLength = Math.min(request.tokens.length + request.max_tokens, context);
  }

  /** Events written before are kept until the stream is there. */
  attach(sink: EventSink): void {
    this.#sink = sink;
    for (const event of this.#early.splice(0)) sink.write(event);
    if (this.told) sink.end();
  }

  emit(event: GenerateEvent): void {
    if (this.told) return;
    if (this.#sink) this.#sink.write(event);
    else this.#early.push(event);
  }

  /** The last event was written. */
  endStream(): void {
    this.told = true;
    this.#sink?.end();
  }
}

/** Which of two goes first: the better class, then the older. */
export function comparePriority(a: Job, b: Job): number {
  return QOS_RANK[a.request.qos] - QOS_RANK[b.request.qos] || a.serial - b.serial;
}
