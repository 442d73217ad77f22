/**
 * Workers as route sees them: real HTTP servers that speak `src/fleet/protocol.ts`, with scripted answers instead of a model. Run as a program
 * (`node --import tsx fake_workers.ts OPTIONS_JSON`) one of them is a process of its own, which can be killed.
 */
import { once } from 'node:events';
import { rmSync } from 'node:fs';
import { createServer, request, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { fileURLToPath } from 'node:url';
import type { GenerateEvent, GenerateRequest, PrefillEvent, PrefillRequest, StopRequest, WorkerState } from '../../src/fleet/protocol.js';
import type { PrefillStats } from '../../src/transfer/types.js';
import { byteToken } from './tokenizer.js';

export const IDENTITY = { name: 'tiny', fingerprint: '0123456789abcdef', reparam: 'none' };
/** End-of-text of the test tokenizer. */
export const EOS_TOKEN = 1;

export const tokensOf = (text: string) => [...Buffer.from(text)].map(byteToken);

/** One request at a worker. */
export interface Exchange<Request, Event> {
  request: Request;
  emit(event: Event): void;
  end(): void;
  /** Breaks the connection. */
  destroy(): void;
  /** Answers with an HTTP error; only before anything was emitted. */
  refuse(status: number, code: string, message?: string): void;
  /** Resolves true when the client has gone before the end. */
  closed: Promise<void>;
  isClosed(): boolean;
  /** Resolves when the client has read what was emitted, or is gone. */
  drained(): Promise<void>;
}

export type GenerateScript = (exchange: Exchange<GenerateRequest, GenerateEvent>, worker: FakeDecode) => Promise<void> | void;
export type PrefillScript = (exchange: Exchange<PrefillRequest, PrefillEvent>, worker: FakePrefill) => Promise<void> | void;

abstract class FakeWorker {
  readonly path: string;
  readonly address: string;
  readonly state: WorkerState;
  /** Requests whose client went away before the end. */
  cancelled: string[] = [];
  #polls = 0;
  #server: Server | null = null;

  constructor(path: string, role: 'prefill' | 'decode') {
    this.path = path;
    this.address = `unix:${path}`;
    this.state = {
      role, id: `${role}-test`, model: { ...IDENTITY }, context_length: 4096, draining: false, running: 0, waiting: 0, pending_tokens: 0,
      pages: { total: 1000, used: 0, cached: 0 },
      attention: { form: role === 'decode' ? 'tpla' : 'mla', ranks: role === 'decode' ? 2 : 1, dtype: 'bf16', kv_bytes_per_token_per_rank: 640 },
    };
  }

  async start(): Promise<this> {
    rmSync(this.path, { force: true });
    this.#server = createServer((message, response) => void this.#serve(message, response));
    this.#server.listen(this.path);
    await once(this.#server, 'listening');
    return this;
  }

  /** Resolves when route has read a state that it asked for after this call. */
  async polled(): Promise<void> {
    // the answer to one poll has been read when the next one comes
    for (const wanted = this.#polls + 2; this.#polls < wanted; await pause(5));
  }

  async stop(): Promise<void> {
    this.#server?.closeAllConnections();
    this.#server?.close();
    rmSync(this.path, { force: true });
  }

  async #serve(message: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = [];
    for await (const chunk of message) chunks.push(chunk as Buffer);
    const text = Buffer.concat(chunks).toString();
    const body: unknown = text === '' ? undefined : JSON.parse(text);
    if (message.url === '/state') {
      this.#polls++;
      return void json(response, 200, this.state);
    }
    await this.answer(message.url ?? '', body, response);
  }

  protected abstract answer(url: string, body: unknown, response: ServerResponse): Promise<void>;

  protected exchange<Request extends { id: string }, Event>(body: Request, response: ServerResponse): Exchange<Request, Event> {
    let ended = false;
    const closed = new Promise<void>((resolve) => response.on('close', () => {
      if (!ended) this.cancelled.push(body.id);
      resolve();
    }));
    return {
      request: body,
      emit: (event) => { response.write(`${JSON.stringify(event)}\n`); },
      end: () => { ended = true; response.end(); },
      destroy: () => { ended = true; response.destroy(); },
      refuse: (status, code, message = code) => { ended = true; json(response, status, { error: { message, type: 'server_error', param: null, code } }); },
      closed,
      isClosed: () => response.destroyed,
      drained: async () => { if (response.writableNeedDrain) await Promise.race([once(response, 'drain'), closed]); },
    };
  }
}

export class FakeDecode extends FakeWorker {
  readonly requests: GenerateRequest[] = [];
  readonly stops: StopRequest[] = [];
  /** Text that each choice is answered with, or its tokens. */
  reply: (request: GenerateRequest, choice: number) => string | number[] = () => 'Hello world';
  script: GenerateScript = scriptedGenerate;
  cachedTokens = 0;
  /** Generates on where a choice was to be stopped. */
  deaf = false;
  /** Milliseconds between tokens. */
  pace = 0;
  readonly #landed = new Map<string, (stats: PrefillStats) => void>();

  constructor(path: string) {
    super(path, 'decode');
  }

  protected async answer(url: string, body: unknown, response: ServerResponse): Promise<void> {
    if (url === '/generate') {
      this.requests.push(body as GenerateRequest);
      return this.script(this.exchange<GenerateRequest, GenerateEvent>(body as GenerateRequest, response), this);
    }
    if (url === '/stop') this.stops.push(body as StopRequest);
    if (url === '/landed') {
      const { session, stats } = body as { session: string; stats: PrefillStats };
      this.#landed.get(session)?.(stats);
    }
    json(response, 200, {});
  }

  /** Grants a hand-off and waits for a prefill worker to deliver. */
  async reserve(exchange: Exchange<GenerateRequest, GenerateEvent>): Promise<PrefillStats> {
    const { id, tokens } = exchange.request;
    const delivered = new Promise<PrefillStats>((resolve) => this.#landed.set(id, resolve));
    exchange.emit({ event: 'reserved', cached_tokens: this.cachedTokens, ticket: { address: this.address, session: id, tokens: [this.cachedTokens, tokens.length] } });
    const stats = await delivered;
    exchange.emit({ event: 'landed', prefill: stats, transfer: { path: 'shm', bytes: 640 * stats.computedTokens, ms: 1.5 } });
    return stats;
  }
}

export class FakePrefill extends FakeWorker {
  readonly requests: PrefillRequest[] = [];
  script: PrefillScript = deliver;

  constructor(path: string) {
    super(path, 'prefill');
  }

  protected async answer(url: string, body: unknown, response: ServerResponse): Promise<void> {
    if (url !== '/prefill') return json(response, 404, {});
    this.requests.push(body as PrefillRequest);
    return this.script(this.exchange<PrefillRequest, PrefillEvent>(body as PrefillRequest, response), this);
  }
}

/** The life of a request at decode when nothing goes wrong. */
export const scriptedGenerate: GenerateScript = async (exchange, worker) => {
  const { request, emit } = exchange;
  await worker.reserve(exchange);
  const choices = Array.from({ length: request.n }, (_, choice) => {
    const reply = worker.reply(request, choice);
    return [...(typeof reply === 'string' ? tokensOf(reply) : reply), EOS_TOKEN];
  });
  const alternatives = Math.max(0, request.sampling.logprobs);
  let total = 0;
  for (let step = 0; !exchange.isClosed() && choices.some((tokens) => step < Math.min(tokens.length, request.max_tokens)); step++) {
    for (const [index, tokens] of choices.entries()) {
      const token = tokens[step];
      if (token === undefined || step >= request.max_tokens) continue;
      const stopped = !worker.deaf && worker.stops.some((stop) => stop.id === request.id && stop.index === index);
      if (stopped) continue;
      const logprob = request.sampling.logprobs < 0 ? NaN : -0.25 * (step + 1);
      const top = Array.from({ length: alternatives }, (_, i) => ({ token: i === 0 ? token : byteToken(97 + i), logprob: logprob - i }));
      emit({ event: 'token', index, token: { token, logprob, top } });
      total++;
      if (request.stop_token_ids.includes(token)) emit({ event: 'finish', index, reason: 'stop' });
      else if (step === request.max_tokens - 1) emit({ event: 'finish', index, reason: 'length' });
      else if (step === tokens.length - 1) emit({ event: 'finish', index, reason: 'stop' });
    }
    await pause(worker.pace);
  }
  for (const stop of worker.stops) if (!worker.deaf && stop.id === request.id) emit({ event: 'finish', index: stop.index, reason: 'stop' });
  emit({ event: 'done', decode: { attention: 'tpla', ranks: 2, tokens: total, tpot_ms: 2, kv_bytes_per_token_per_rank: 640, preemptions: 0 } });
  exchange.end();
};

/** The life of a request at prefill when nothing goes wrong. */
export const deliver: PrefillScript = async ({ request: { ticket, tokens }, emit, end }) => {
  emit({ event: 'started' });
  const prefill: PrefillStats = { promptTokens: tokens.length, pooledTokens: 0, skippedTokens: ticket.tokens[0], computedTokens: tokens.length - ticket.tokens[0], queueMs: 0.5, computeMs: 3 };
  await post(ticket.address.slice('unix:'.length), '/landed', { session: ticket.session, stats: prefill });
  emit({ event: 'done', prefill, transfer: { path: 'shm', bytes: 640, ms: 1.5 } });
  end();
};

export const pause = (ms: number) => new Promise<void>((resolve) => (ms > 0 ? setTimeout(resolve, ms) : setImmediate(resolve)));

function json(response: ServerResponse, status: number, body: unknown): void {
  response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body));
}

async function post(socketPath: string, path: string, body: unknown): Promise<void> {
  const message = request({ socketPath, path, method: 'POST' });
  message.end(JSON.stringify(body));
  const [response] = await once(message, 'response') as [IncomingMessage];
  response.resume();
  await once(response, 'end');
}

/** Options of a worker that is a process: it serves until it is killed, and hangs in each request after the given events. */
export interface WorkerProcessOptions {
  role: 'prefill' | 'decode';
  path: string;
  /** decode: tokens to send before it hangs. */
  tokens?: number;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { role, path, tokens = 0 } = JSON.parse(process.argv[2]!) as WorkerProcessOptions;
  if (role === 'prefill') {
    const worker = new FakePrefill(path);
    worker.script = ({ emit }) => emit({ event: 'started' });
    await worker.start();
  } else {
    const worker = new FakeDecode(path);
    worker.script = async (exchange) => {
      exchange.emit({ event: 'reserved', ticket: null, cached_tokens: 0 });
      for (let i = 0; i < tokens; i++) exchange.emit({ event: 'token', index: 0, token: { token: byteToken(97 + i), logprob: NaN, top: [] } });
    };
    await worker.start();
  }
  process.stdout.write('ready\n');
}
