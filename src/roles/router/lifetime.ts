import type { FastifyReply } from 'fastify';
import { TplaError } from '../../errors.js';

/** How long a request may live: until its client goes away, its time is up, or the role closes. */
export class Lifetime {
  /** Resolves when the response has gone out to its last byte, or its connection is closed. */
  readonly closed: Promise<void>;
  readonly #controller = new AbortController();
  readonly #release: () => void;

  constructor(reply: FastifyReply, timeoutMs: number) {
    const { raw } = reply;
    const timer = setTimeout(() => this.end(new TplaError('REQUEST_TIMEOUT', `the request took longer than ${timeoutMs} ms (request_timeout_ms); ask for fewer tokens`)), timeoutMs);
    const gone = () => this.end(new TplaError('CANCELLED', 'the client closed the connection'));
    raw.on('close', gone);
    this.closed = new Promise((resolve) => { raw.once('close', resolve); });
    this.#release = () => {
      clearTimeout(timer);
      raw.off('close', gone);
    };
  }

  /** Aborts with a TplaError. */
  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  end(error: TplaError): void {
    this.#controller.abort(error);
  }

  /** Stops watching, and cancels what may still run for the request. */
  dispose(): void {
    this.#release();
    this.end(new TplaError('CANCELLED', 'the request has ended'));
  }
}
