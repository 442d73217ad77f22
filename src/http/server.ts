import { lstatSync, unlinkSync, chmodSync } from 'node:fs';
import { connect } from 'node:net';
import fastify, { LogController, type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify';
import type { Logger } from 'pino';
import { TplaError, toTplaError } from '../errors.js';
import { formatAddress, parseAddress, type Address } from './address.js';
import { errorBody } from './error_body.js';

/** A request that has not been received whole by then is cut off. */
const RECEIVE_TIMEOUT_MS = 120_000;

export interface HttpServerOptions {
  log: Logger;
  maxBodyBytes: number;
  /** Sees every error before it is answered. */
  onError?(error: TplaError, request: FastifyRequest): void;
}

/** A fastify instance whose every error, also its own, is an OpenAI error object with a code of our table. */
export function createHttpServer({ log, maxBodyBytes, onError }: HttpServerOptions): FastifyInstance {
  const app = fastify({
    loggerInstance: log,
    logController: new LogController({ disableRequestLogging: true }),
    bodyLimit: maxBodyBytes,
    forceCloseConnections: true,
    requestTimeout: RECEIVE_TIMEOUT_MS,
    // A body is what it is: no text taken for a number, no unknown field dropped in silence.
    ajv: { customOptions: { coerceTypes: false, removeAdditional: false } },
  });
  const answer = (error: TplaError, request: unknown, reply: FastifyReply) => {
    onError?.(error, request as FastifyRequest);
    return sendError(reply, error);
  };
  app.setNotFoundHandler((request, reply) => answer(new TplaError('NOT_FOUND', `no such endpoint: ${request.method} ${request.url}`), request, reply));
  app.setErrorHandler((error, request, reply) => answer(fromFastify(error, maxBodyBytes), request, reply));
  return app as unknown as FastifyInstance;
}

export { errorBody };

export function sendError(reply: FastifyReply, error: TplaError): FastifyReply {
  reply.log[error.httpStatus >= 500 ? 'warn' : 'debug']({ code: error.code, request: reply.getHeader('x-request-id') }, error.message);
  // The refusal goes out at once, but closing now would break the pipe of a client that still sends, and it would never read the answer:
  // the connection stays, and what is under way is read and dropped, within RECEIVE_TIMEOUT_MS.
  if (error.code === 'REQUEST_TOO_LARGE') void reply.removeHeader('connection');
  if (error.retryAfterSeconds !== null) void reply.header('retry-after', error.retryAfterSeconds);
  return reply.code(error.httpStatus).send(errorBody(error));
}

function fromFastify(thrown: unknown, maxBodyBytes: number): TplaError {
  const { code, statusCode, message } = thrown as { code?: string; statusCode?: number; message?: string };
  if (code === 'FST_ERR_CTP_BODY_TOO_LARGE') {
    return new TplaError('REQUEST_TOO_LARGE', `request body is larger than ${maxBodyBytes} bytes; send a shorter prompt`);
  }
  if (statusCode !== undefined && statusCode >= 400 && statusCode < 500) {
    return new TplaError('REQUEST_INVALID', `cannot read the request: ${message}`);
  }
  return toTplaError(thrown);
}

/**
 * Binds the server. A socket file that nobody answers on is a leftover and is replaced; one that answers, or a taken port, is ADDRESS_IN_USE.
 * Returns the address as bound.
 */
export async function listen(app: FastifyInstance, address: string): Promise<string> {
  const target = parseAddress(address);
  if (target.kind === 'unix') await removeStaleSocket(target.path);
  try {
    await app.listen(target.kind === 'unix' ? { path: target.path } : { host: target.host, port: target.port });
  } catch (thrown) {
    throw bindError(thrown, target);
  }
  if (target.kind === 'unix') {
    chmodSync(target.path, 0o660);
    return address;
  }
  const bound = app.server.address();
  const port = typeof bound === 'object' && bound !== null ? bound.port : target.port;
  return formatAddress({ ...target, port });
}

function bindError(thrown: unknown, target: Address): TplaError {
  const code = (thrown as NodeJS.ErrnoException).code;
  const where = formatAddress(target);
  if (code === 'EADDRINUSE') {
    return new TplaError('ADDRESS_IN_USE', `${where} is in use by another process; stop it or choose another address`, { cause: thrown });
  }
  return new TplaError('IO_FAILED', `cannot listen on ${where}: ${(thrown as Error).message}`, { cause: thrown });
}

/** Removes a socket file left by a process that was killed; throws ADDRESS_IN_USE where somebody answers or the file is no socket. */
export async function removeStaleSocket(path: string): Promise<void> {
  const stat = lstatSync(path, { throwIfNoEntry: false });
  if (!stat) return;
  if (!stat.isSocket()) throw new TplaError('ADDRESS_IN_USE', `${path} exists and is not a socket; choose another path`);
  if (await answers(path)) throw new TplaError('ADDRESS_IN_USE', `unix:${path} is in use by another process; stop it or choose another address`);
  unlinkSync(path);
}

function answers(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(path);
    socket.once('connect', () => { socket.destroy(); resolve(true); });
    socket.once('error', () => resolve(false));
  });
}

/** Starts an NDJSON response. `write` resolves when the line is buffered; `closed` aborts when the client goes away before end(). */
export function ndjsonStream(reply: FastifyReply): { write(line: unknown): void; end(): void; closed: AbortSignal } {
  reply.hijack();
  const { raw } = reply;
  const gone = new AbortController();
  let ended = false;
  raw.on('close', () => { if (!ended) gone.abort(); });
  raw.writeHead(200, { 'content-type': 'application/x-ndjson', 'cache-control': 'no-store' });
  raw.flushHeaders();
  return {
    write(line) { if (!raw.destroyed) raw.write(`${JSON.stringify(line)}\n`); },
    end() { ended = true; raw.end(); },
    closed: gone.signal,
  };
}
