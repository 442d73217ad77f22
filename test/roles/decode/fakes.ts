/** Stand-ins for what a decode worker is connected to: engine, hand-off and pool, over the fake model. */
import { setImmediate as nextTurn } from 'node:timers/promises';
import { pino } from 'pino';
import { TplaError } from '../../../src/errors.js';
import type { GenerateEvent, GenerateRequest } from '../../../src/fleet/protocol.js';
import { PageSpace } from '../../../src/kv/page_space.js';
import type { BlockLease, BlockStore, KvSequence } from '../../../src/kv/pool_client.js';
import type { DecodeItem, Engine, KvArena, KvForm } from '../../../src/native/types.js';
import { DecodeWorker, type DecodeSettings } from '../../../src/roles/decode/worker.js';
import type { Job } from '../../../src/roles/decode/job.js';
import { FakeMemory, nextToken, PAGE, VOCAB } from '../fake_model.js';
import type { HandoffCommit, HandoffGrant, HandoffReceiver, HandoffTicket } from '../../../src/transfer/types.js';

class FakeEngine {
  steps = 0;
  rowsPerStep: number[] = [];
  failNext = false;

  constructor(readonly memory: FakeMemory) {}

  async decode(items: DecodeItem[]): Promise<Float32Array> {
    this.steps++;
    this.rowsPerStep.push(items.length);
    if (this.failNext) {
      this.failNext = false;
      throw new TplaError('INTERNAL', 'the engine failed');
    }
    const tables = items.map(({ pages }) => pages.map((table) => table.slice()));
    await nextTurn();
    items.forEach(({ token, position, rank }, i) => this.memory.write(tables[i]!, position, token, rank));
    const logits = new Float32Array(items.length * VOCAB);
    items.forEach(({ position, rank }, i) => {
      const context = Array.from({ length: position + 1 }, (_, p) => this.memory.read(tables[i]!, p, rank));
      logits[i * VOCAB + nextToken(context)] = 1;
    });
    return logits;
  }
}

export class FakeReceiver implements HandoffReceiver {
  readonly address = 'unix:/nowhere';
  readonly open_ = new Map<string, { grant: HandoffGrant; failing: AbortController; settle: { resolve(commit: HandoffCommit): void; reject(error: Error): void } }>();
  #serial = 0;

  constructor(readonly memory: FakeMemory) {}

  open(grant: HandoffGrant): { ticket: HandoffTicket; committed: Promise<HandoffCommit>; failing: AbortSignal } {
    const session = `session ${this.#serial++}`;
    const failing = new AbortController();
    const committed = new Promise<HandoffCommit>((resolve, reject) => this.open_.set(session, { grant, failing, settle: { resolve, reject } }));
    return { ticket: { address: this.address, session, tokens: grant.tokens }, committed, failing: failing.signal };
  }

  /** What a prefill worker does: writes the granted tokens, and commits. */
  land(ticket: HandoffTicket, prompt: readonly number[], n: number, firstToken = nextToken(prompt)): void {
    const { grant, settle } = this.open_.get(ticket.session)!;
    for (let p = ticket.tokens[0]; p < ticket.tokens[1]; p++) this.memory.write(grant.pages, p, prompt[p]!, grant.rank);
    this.open_.delete(ticket.session);
    settle.resolve({
      firstTokens: Array.from({ length: n }, () => ({ token: firstToken, logprob: NaN, top: [] })),
      path: 'shm', bytes: 1000, transferMs: 1,
      prefill: { promptTokens: prompt.length, pooledTokens: 0, skippedTokens: ticket.tokens[0], computedTokens: prompt.length, queueMs: 0, computeMs: 1 },
    });
  }

  fail(session: string, error: TplaError): void {
    this.open_.get(session)?.settle.reject(error);
    this.open_.delete(session);
  }

  cancel(session: string): void {
    this.fail(session, new TplaError('CANCELLED', 'cancelled'));
  }

  stats() {
    return { open: this.open_.size, draining: 0, committed: 0, bytes: 0, failed: {} };
  }

  async close(): Promise<void> {}
}

/** A pool of so many blocks. */
export class FakeStore implements BlockStore {
  connected = true;
  pinned = 0;
  parks = 0;
  /** Per park, how many blocks were stored under shareable names. */
  readonly named: number[] = [];

  constructor(readonly memory: FakeMemory, readonly capacity = Infinity) {}

  async find(): Promise<BlockLease> {
    return { blocks: 0, release() {} };
  }

  async offer(): Promise<void> {}

  async park(ids: readonly string[], tokens: number, source: KvSequence): Promise<BlockLease> {
    this.parks++;
    this.named.push(ids.length);
    const rows = Array.from({ length: tokens }, (_, p) => this.memory.read(source.pages, p, source.rank));
    await nextTurn();
    const blocks = this.connected ? Math.min(Math.ceil(tokens / PAGE), this.capacity - this.pinned) : 0;
    this.pinned += blocks;
    const store = this;
    return {
      get blocks() { return store.connected ? blocks : 0; },
      release: () => { this.pinned -= blocks; },
      rows,
    } as BlockLease;
  }

  async load(lease: BlockLease, begin: number, end: number, target: KvSequence): Promise<number> {
    if (lease.blocks < end) return begin;
    const { rows } = lease as unknown as { rows: number[] };
    await nextTurn();
    for (let p = begin * PAGE; p < Math.min(end * PAGE, rows.length); p++) this.memory.write(target.pages, p, rows[p]!, target.rank);
    return end;
  }

  async close(): Promise<void> {}
}

export interface Rig {
  worker: DecodeWorker;
  space: PageSpace;
  engine: FakeEngine;
  receiver: FakeReceiver;
  memory: FakeMemory;
  store: FakeStore | null;
  copies: number;
}

export interface RigOptions {
  form?: KvForm;
  ranks?: number;
  /** Per rank. */
  pages: number;
  store?: (memory: FakeMemory) => FakeStore;
  settings?: Partial<DecodeSettings>;
}

export function createRig({ form = 'mla', ranks = 1, pages, store: createStore, settings = {} }: RigOptions): Rig {
  const memory = new FakeMemory(form, ranks);
  const space = new PageSpace(memory.layout, pages);
  const engine = new FakeEngine(memory);
  const receiver = new FakeReceiver(memory);
  const store = createStore?.(memory) ?? null;
  const rig: Rig = { worker: undefined as never, space, engine, receiver, memory, store, copies: 0 };
  rig.worker = new DecodeWorker({
    identity: { name: 'fake', fingerprint: 'f', reparam: 'none' },
    arena: { layout: memory.layout, bytesPerTokenPerRank: 96 } as KvArena,
    space, engine: engine as unknown as Engine, receiver, store,
    createSampler: () => ({ accept() {}, sample: (logits) => ({ token: logits.indexOf(1), logprob: NaN, top: [] }) }),
    copyPage: ({ from, to, rank }) => {
      rig.copies++;
      memory.copyPage(from, to, rank);
    },
    clock: { now: () => performance.now() },
    log: pino({ level: 'silent' }),
  }, { vocabSize: VOCAB, contextLength: 2048, capacityTokens: space.capacityTokens, maxBatch: 64, maxWaiting: 64, leaseMs: 1000, firstToken: 'prefill', ...settings });
  return rig;
}

let serial = 0;

export function request(tokens: number[], fields: Partial<GenerateRequest> = {}): GenerateRequest {
  return {
    id: `request ${serial++}`, tokens, n: 1, max_tokens: 16, stop_token_ids: [], qos: 'standard',
    sampling: { temperature: 0, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0, seed: '0', logprobs: -1, logit_bias: [] },
    ...fields,
  };
}

/** A request in progress, as its client sees it. */
export class Client {
  readonly events: GenerateEvent[] = [];
  readonly gone = new AbortController();
  readonly ended: Promise<void>;
  job: Job | undefined;

  constructor(readonly rig: Rig, readonly request: GenerateRequest, { land = true, landAfterMs = 0, reland = true, firstToken }: { land?: boolean; landAfterMs?: number; reland?: boolean; firstToken?: number } = {}) {
    this.ended = this.#run(land, landAfterMs, reland, firstToken);
  }

  text(index = 0): number[] {
    return this.events.flatMap((event) => (event.event === 'token' && event.index === index ? [event.token.token] : []));
  }

  find<E extends GenerateEvent['event']>(name: E): Extract<GenerateEvent, { event: E }> | undefined {
    return this.events.find((event) => event.event === name) as never;
  }

  async #run(land: boolean, landAfterMs: number, reland: boolean, firstToken: number | undefined): Promise<void> {
    this.job = await this.rig.worker.accept(this.request, this.gone.signal);
    await new Promise<void>((resolve) => {
      this.job!.attach({
        write: (event) => {
          this.events.push(event);
          if (event.event === 'recompute') {
            if (reland) this.rig.receiver.land(event.ticket, event.tokens, 1);
            else this.rig.receiver.fail(event.ticket.session, new TplaError('LEASE_EXPIRED', 'no prefill worker came'));
          }
          if (event.event !== 'reserved' || event.ticket === null || !land) return;
          const { ticket } = event;
          const arrive = () => { if (this.rig.receiver.open_.has(ticket.session)) this.rig.receiver.land(ticket, this.request.tokens, this.request.n, firstToken); };
          if (landAfterMs > 0) setTimeout(arrive, landAfterMs);
          else arrive();
        },
        end: resolve,
      });
    });
  }
}
