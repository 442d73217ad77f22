/** Stand-ins for what a prefill worker is connected to: engine, decode's side of the hand-off and pool, over the fake model. */
import { setImmediate as nextTurn } from 'node:timers/promises';
import { pino } from 'pino';
import { TplaError } from '../../../src/errors.js';
import type { PrefillEvent, PrefillRequest } from '../../../src/fleet/protocol.js';
import { PageSpace } from '../../../src/kv/page_space.js';
import type { BlockLease, BlockStore, KvSequence } from '../../../src/kv/pool_client.js';
import type { CancelFlag, Engine, KvArena, PrefillItem, SampledToken } from '../../../src/native/types.js';
import { PrefillWorker, type PrefillSettings } from '../../../src/roles/prefill/worker.js';
import type { HandoffSender, HandoffSession, HandoffTicket, PrefillStats } from '../../../src/transfer/types.js';
import { FakeMemory, nextToken, PAGE, VOCAB } from '../fake_model.js';

export class FakeEngine {
  /** Per step, tokens of each prompt. */
  readonly steps: number[][] = [];
  failNext = false;
  /** A step waits here before each layer. */
  gate: () => Promise<void> = nextTurn;
  flagged = 0;

  constructor(readonly memory: FakeMemory) {}

  async prefill(items: PrefillItem[], onLayer?: (layer: number) => void, flag?: CancelFlag): Promise<Float32Array[]> {
    this.steps.push(items.map(({ tokens }) => tokens.length));
    if (this.failNext) {
      this.failNext = false;
      throw new TplaError('INTERNAL', 'the engine failed');
    }
    for (let layer = 0; layer < this.memory.layout.layers; layer++) {
      await this.gate();
      if (flag && flag[0] !== 0) {
        this.flagged++;
        throw new TplaError('CANCELLED', 'flag');
      }
      for (const { tokens, position, pages } of items) tokens.forEach((token, i) => this.memory.write([pages], position + i, token));
      onLayer?.(layer);
    }
    return items.map(({ tokens, position, pages, logits }) => {
      if (logits !== 'last') return new Float32Array(0);
      const context = Array.from({ length: position + tokens.length }, (_, p) => this.memory.read([pages], p));
      const row = new Float32Array(VOCAB);
      row[nextToken(context)] = 1;
      return row;
    });
  }
}

/** Decode's side of one hand-off. */
export class FakeSession implements HandoffSession {
  readonly sent = { bytes: 0, wireBytes: 0, placedAt: 0 };
  readonly path = 'shm';
  readonly abort = new AbortController();
  readonly aborted = this.abort.signal;
  /** [layer][token], the token read from prefill's pages when it was pushed. */
  readonly cells = new Map<string, number>();
  committed: { firstTokens: SampledToken[]; prefill: PrefillStats } | undefined;
  failed: string | undefined;
  reading = 0;

  constructor(readonly ticket: HandoffTicket, readonly memory: FakeMemory, readonly turns: number) {}

  async push([beginLayer, endLayer]: [number, number], [begin, end]: [number, number], srcPages: Int32Array): Promise<void> {
    if (this.failed !== undefined || this.aborted.aborted) throw new TplaError('HANDOFF_FAILED', 'over');
    this.reading++;
    const pages = srcPages.slice();
    for (let turn = 0; turn < this.turns; turn++) await nextTurn();
    for (let layer = beginLayer; layer < endLayer; layer++) for (let p = begin; p < end; p++) {
      const cell = `${layer}/${p}`;
      if (this.cells.has(cell)) throw new Error(`layer ${layer} of token ${p} was pushed twice`);
      this.cells.set(cell, this.memory.read([pages], p));
    }
    this.reading--;
  }

  async commit(result: { firstTokens: SampledToken[]; prefill: PrefillStats }): Promise<void> {
    while (this.reading > 0) await nextTurn();
    if (this.aborted.aborted) throw this.aborted.reason as Error;
    this.committed = result;
  }

  fail(reason: string): void {
    if (!this.committed) this.failed ??= reason;
  }
}

export class FakeStore implements BlockStore {
  connected = true;
  readonly blocks = new Map<string, number[]>();
  pinned = 0;

  constructor(readonly memory: FakeMemory) {}

  async find(ids: readonly string[]): Promise<BlockLease> {
    await nextTurn();
    const gap = ids.findIndex((id) => !this.blocks.has(id));
    const found = gap < 0 ? [...ids] : ids.slice(0, gap);
    this.pinned += found.length;
    return { blocks: found.length, release: () => { this.pinned -= found.length; }, ids: found } as BlockLease;
  }

  async load(lease: BlockLease, begin: number, end: number, target: KvSequence): Promise<number> {
    const { ids } = lease as unknown as { ids: string[] };
    for (let block = begin; block < end; block++) this.blocks.get(ids[block]!)!.forEach((token, i) => this.memory.write(target.pages, block * PAGE + i, token));
    await nextTurn();
    return Math.max(begin, end);
  }

  async offer(ids: readonly string[], begin: number, source: KvSequence): Promise<void> {
    await nextTurn();
    ids.forEach((id, i) => this.blocks.set(id, Array.from({ length: PAGE }, (_, t) => this.memory.read(source.pages, (begin + i) * PAGE + t))));
  }

  async park(): Promise<BlockLease> {
    return { blocks: 0, release() {} };
  }

  async close(): Promise<void> {}
}

export interface Rig {
  worker: PrefillWorker;
  engine: FakeEngine;
  memory: FakeMemory;
  space: PageSpace;
  store: FakeStore | null;
  sessions: Map<string, FakeSession>;
  /** Turns of the event loop that a push takes. */
  pushTurns: number;
}

export function createRig({ pages, pool = false, settings = {} }: { pages: number; pool?: boolean; settings?: Partial<PrefillSettings> }): Rig {
  const memory = new FakeMemory('mla', 1);
  const space = new PageSpace(memory.layout, pages);
  const engine = new FakeEngine(memory);
  const sessions = new Map<string, FakeSession>();
  const store = pool ? new FakeStore(memory) : null;
  const rig: Rig = { worker: undefined as never, engine, memory, space, store, sessions, pushTurns: 2 };
  const sender: HandoffSender = {
    async open(ticket) {
      await nextTurn();
      const session = new FakeSession(ticket, memory, rig.pushTurns);
      sessions.set(ticket.session, session);
      return session;
    },
    async close() {},
  };
  rig.worker = new PrefillWorker({
    identity: { name: 'fake', fingerprint: 'f', reparam: 'none' },
    arena: { layout: memory.layout, bytesPerTokenPerRank: 96 } as KvArena,
    space, engine: engine as unknown as Engine, sender, store,
    createSampler: () => ({ accept() {}, sample: (logits) => ({ token: logits.indexOf(1), logprob: NaN, top: [] }) }),
    clock: { now: () => performance.now() }, log: pino({ level: 'silent' }),
  }, { vocabSize: VOCAB, contextLength: 4096, capacityTokens: space.capacityTokens, chunkTokens: 128, maxBatchTokens: 256, maxWaiting: 64, ...settings });
  return rig;
}

let serial = 0;

export function request(tokens: number[], { begin = 0, n = 1 }: { begin?: number; n?: number } = {}): PrefillRequest {
  const id = `request ${serial++}`;
  return {
    id, tokens, n, qos: 'standard', ticket: { address: 'unix:/nowhere', session: `session of ${id}`, tokens: [begin, tokens.length] },
    sampling: { temperature: 0, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0, seed: '0', logprobs: -1, logit_bias: [] },
  };
}

/** A prompt on its way, as route sees it. */
export class Client {
  readonly events: PrefillEvent[] = [];
  readonly gone = new AbortController();
  readonly ended: Promise<void>;

  constructor(readonly rig: Rig, readonly request: PrefillRequest) {
    this.ended = this.#run();
  }

  get session(): FakeSession | undefined {
    return this.rig.sessions.get(this.request.ticket.session);
  }

  find<E extends PrefillEvent['event']>(name: E): Extract<PrefillEvent, { event: E }> | undefined {
    return this.events.find(({ event }) => event === name) as never;
  }

  /** What decode got, or what is wrong with it. */
  get delivered(): string {
    const { session, request: { tokens, ticket } } = this;
    if (!session?.committed) return 'not committed';
    for (let layer = 0; layer < this.rig.memory.layout.layers; layer++) for (let p = 0; p < tokens.length; p++) {
      const cell = session.cells.get(`${layer}/${p}`);
      const expected = p < ticket.tokens[0] ? undefined : tokens[p];
      if (cell !== expected) return `layer ${layer} of token ${p} is ${cell}, expected ${expected}`;
    }
    const first = session.committed.firstTokens.map(({ token }) => token);
    return first.length === this.request.n && first.every((token) => token === nextToken(tokens)) ? 'right' : `first tokens ${first.join(' ')}`;
  }

  async #run(): Promise<void> {
    const job = await this.rig.worker.accept(this.request, this.gone.signal);
    await new Promise<void>((resolve) => job.attach({ write: (event) => this.events.push(event), end: resolve }));
  }
}
