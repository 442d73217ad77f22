import { Pool, type Dispatcher } from 'undici';
import { TplaError, ERRORS, type ErrorCode } from '../errors.js';
import type { ErrorBody } from '../fleet/protocol.js';
import { parseAddress } from './address.js';

/** Longest NDJSON line; a worker that sends more is broken. */
const MAX_LINE = 16 * 2 ** 20;

/** HTTP client of one worker (or of route), over a Unix socket or TCP. Connections are kept alive and reused. */
export class WorkerClient {
  readonly address: string;
  readonly #pool: Pool;

  constructor(address: string) {
    this.address = address;
    const target = parseAddress(address);
    const origin = target.kind === 'unix' ? 'http://localhost' : `http://${target.host.includes(':') ? `[${target.host}]` : target.host}:${target.port}`;
    this.#pool = new Pool(origin, {
      bodyTimeout: 0,
      headersTimeout: 0,
      ...(target.kind === 'unix' ? { socketPath: target.path } : {}),
    });
  }

  /** One JSON exchange. Throws the worker's own coded error, or WORKER_FAILED where there is no answer. */
  async json<T>(method: 'GET' | 'POST', path: string, body?: unknown, options: { timeoutMs?: number; signal?: AbortSignal } = {}): Promise<T> {
    const response = await this.#send(method, path, body, withTimeout(options));
    const text = await this.#reading(response.body.text());
    if (response.statusCode >= 400) throw remoteError(text, response.statusCode, this.address);
    return parseLine<T>(text, this.address);
  }

  /** Text of a GET, for /metrics. */
  async text(path: string, options: { timeoutMs?: number } = {}): Promise<string> {
    const response = await this.#send('GET', path, undefined, withTimeout(options));
    return this.#reading(response.body.text());
  }

  /**
   * NDJSON exchange: yields each line; aborting the signal (or leaving the loop) closes the connection, which cancels at the worker.
   * A signal aborted with a TplaError throws that error.
   */
  async *stream<T>(path: string, body: unknown, signal?: AbortSignal): AsyncGenerator<T> {
    for await (const line of this.#lines(path, body, signal)) yield parseLine<T>(line, this.address);
  }

  /** The same with server-sent events, up to [DONE]. An error object among them, or an end without [DONE], throws. */
  async *events<T>(path: string, body: unknown, signal?: AbortSignal): AsyncGenerator<T> {
    for await (const line of this.#lines(path, body, signal)) {
      if (line === 'data: [DONE]') return;
      if (line.startsWith('data: {"error":')) throw remoteError(line.slice('data: '.length), 200, this.address);
      if (line.startsWith('data: ')) yield parseLine<T>(line.slice('data: '.length), this.address);
    }
    throw new TplaError('WORKER_FAILED', `the stream of ${this.address} broke off`);
  }

  async *#lines(path: string, body: unknown, signal: AbortSignal | undefined): AsyncGenerator<string> {
    const response = await this.#send('POST', path, body, signal);
    if (response.statusCode >= 400) throw remoteError(await this.#reading(response.body.text()), response.statusCode, this.address);
    try {
      yield* splitLines(response.body, this.address);
    } catch (thrown) {
      throw this.#failed(thrown);
    } finally {
      response.body.destroy();
    }
  }

  async close(): Promise<void> {
    await this.#pool.destroy();
  }

  async #send(method: Dispatcher.HttpMethod, path: string, body: unknown, signal: AbortSignal | undefined): Promise<Dispatcher.ResponseData> {
    return this.#reading(this.#pool.request({
      method, path, signal: signal ?? null,
      ...(body === undefined ? {} : { body: JSON.stringify(body), headers: { 'content-type': 'application/json' } }),
    }));
  }

  async #reading<T>(pending: Promise<T>): Promise<T> {
    try {
      return await pending;
    } catch (thrown) {
      throw this.#failed(thrown);
    }
  }

  #failed(thrown: unknown): TplaError {
    if (thrown instanceof TplaError) return thrown;
    const error = thrown as Error & { code?: string };
    if (error.name === 'AbortError') return new TplaError('CANCELLED', 'the request was cancelled', { cause: thrown });
    return new TplaError('WORKER_FAILED', `worker ${this.address} did not answer: ${error.message || error.code}`, { cause: thrown });
  }
}

/** Whether a client's error says that nobody answers (any more), as opposed to an answer that is an error. */
export function isConnectionFailure(error: TplaError): boolean {
  return error.code === 'WORKER_FAILED' && error.cause !== undefined && !isTimeout(error);
}

/** Whether a client's error says that the answer took longer than the caller's limit. */
export function isTimeout(error: TplaError): boolean {
  return (error.cause as Error | undefined)?.name === 'TimeoutError';
}

function withTimeout({ timeoutMs, signal }: { timeoutMs?: number; signal?: AbortSignal }): AbortSignal | undefined {
  const signals = [...(signal ? [signal] : []), ...(timeoutMs === undefined ? [] : [AbortSignal.timeout(timeoutMs)])];
  return signals.length > 1 ? AbortSignal.any(signals) : signals[0];
}

/** Lines of a byte stream as they come. Nothing is read ahead of the consumer, so a slow one slows the sender down. */
async function* splitLines(body: AsyncIterable<Buffer>, address: string): AsyncGenerator<string> {
  const decoder = new TextDecoder('utf-8');
  let partial = '';
  for await (const chunk of body) {
    const lines = (partial + decoder.decode(chunk, { stream: true })).split('\n');
    partial = lines.pop()!;
    if (partial.length > MAX_LINE) throw new TplaError('PROTOCOL', `worker ${address} sent a line longer than ${MAX_LINE} characters`);
    for (const line of lines) if (line !== '') yield line;
  }
  if (partial !== '') yield partial;
}

function parseLine<T>(text: string, address: string): T {
  try {
    return JSON.parse(text) as T;
  } catch (cause) {
    throw new TplaError('PROTOCOL', `worker ${address} sent something that is not JSON: ${text.slice(0, 80)}`, { cause });
  }
}

function remoteError(text: string, status: number, address: string): TplaError {
  try {
    const { error } = JSON.parse(text) as ErrorBody;
    if (Object.hasOwn(ERRORS, error.code)) return new TplaError(error.code as ErrorCode, error.message, error.param === null ? {} : { param: error.param });
  } catch { /* not one of ours: reported below */ }
  return new TplaError('WORKER_FAILED', `worker ${address} answered ${status}: ${text.slice(0, 200)}`);
}
