import type { FastifyReply } from 'fastify';
import type { TplaError } from '../errors.js';
import { errorBody } from './error_body.js';

/** A server-sent-event response in the form OpenAI clients read: `data: JSON` events, `data: [DONE]` last. */
export interface EventStream {
  /** Resolves once the kernel took the event, or nobody will: awaiting it makes a slow reader slow down its producer. */
  write(data: unknown): Promise<void>;
  /** Ends a complete stream. */
  done(): void;
  /** Ends a stream that broke off: an error object as the last event and no [DONE]. */
  fail(error: TplaError): void;
}

/** What a client that does not read gets as time to take the end of its stream. */
const LINGER_MS = 5_000;

/** `signal` ends the wait for a slow reader. */
export function eventStream(reply: FastifyReply, signal: AbortSignal, headers: Record<string, string> = {}): EventStream {
  reply.hijack();
  const { raw } = reply;
  raw.writeHead(200, { 'content-type': 'text/event-stream; charset=utf-8', 'cache-control': 'no-store', 'x-accel-buffering': 'no', ...headers });
  raw.flushHeaders();
  const event = (data: string) => `data: ${data}\n\n`;
  const end = (data: string) => {
    if (raw.destroyed) return;
    const timer = setTimeout(() => raw.destroy(), LINGER_MS);
    raw.once('close', () => clearTimeout(timer));
    raw.end(event(data));
  };
  return {
    async write(data) {
      if (raw.destroyed || raw.write(event(JSON.stringify(data)))) return;
      await drained(raw, signal);
    },
    done: () => end('[DONE]'),
    fail: (error) => end(JSON.stringify(errorBody(error))),
  };
}

/** Resolves when buffered bytes have gone out, or there is no point in waiting. */
function drained(raw: FastifyReply['raw'], signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const settle = () => {
      raw.off('drain', settle);
      raw.off('close', settle);
      signal.removeEventListener('abort', settle);
      resolve();
    };
    raw.on('drain', settle);
    raw.on('close', settle);
    signal.addEventListener('abort', settle);
    if (signal.aborted) settle();
  });
}
