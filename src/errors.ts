/**
 * The one table of coded errors. A code is stable: scripts match on it, tests pin it.
 * `http` is the status a role answers with, `exit` the exit status of a command that ends with it.
 */
export const ERRORS = {
  // what a user typed
  USAGE: { http: 400, exit: 2, type: 'invalid_request_error' },
  CONFIG_INVALID: { http: 500, exit: 78, type: 'server_error' },
  REQUEST_INVALID: { http: 400, exit: 2, type: 'invalid_request_error' },
  REQUEST_TOO_LARGE: { http: 413, exit: 2, type: 'invalid_request_error' },
  CONTEXT_LENGTH_EXCEEDED: { http: 400, exit: 2, type: 'invalid_request_error' },
  MODEL_NOT_FOUND: { http: 404, exit: 2, type: 'invalid_request_error' },
  NOT_FOUND: { http: 404, exit: 2, type: 'invalid_request_error' },
  // model files
  MODEL_UNSUPPORTED: { http: 500, exit: 65, type: 'server_error' },
  CHECKPOINT_INVALID: { http: 500, exit: 65, type: 'server_error' },
  // this machine
  ADDON_LOAD_FAILED: { http: 500, exit: 69, type: 'server_error' },
  GPU_UNAVAILABLE: { http: 503, exit: 69, type: 'server_error' },
  ADDRESS_IN_USE: { http: 500, exit: 73, type: 'server_error' },
  OUT_OF_MEMORY: { http: 503, exit: 71, type: 'server_error' },
  IO_FAILED: { http: 500, exit: 74, type: 'server_error' },
  GPU_FAILED: { http: 500, exit: 70, type: 'server_error' },
  CHECK_FAILED: { http: 500, exit: 1, type: 'server_error' },
  // the fleet
  NO_WORKER: { http: 503, exit: 69, type: 'server_error' },
  OVERLOADED: { http: 429, exit: 75, type: 'rate_limit_error' },
  REQUEST_TIMEOUT: { http: 504, exit: 75, type: 'server_error' },
  WORKER_FAILED: { http: 502, exit: 69, type: 'server_error' },
  HANDSHAKE_REFUSED: { http: 409, exit: 76, type: 'server_error' },
  HANDOFF_FAILED: { http: 502, exit: 69, type: 'server_error' },
  CHECKSUM_MISMATCH: { http: 502, exit: 65, type: 'server_error' },
  LEASE_EXPIRED: { http: 504, exit: 69, type: 'server_error' },
  NO_PAGES: { http: 503, exit: 75, type: 'server_error' },
  DRAINING: { http: 503, exit: 75, type: 'server_error' },
  CANCELLED: { http: 499, exit: 130, type: 'server_error' },
  PROTOCOL: { http: 502, exit: 76, type: 'server_error' },
  INTERNAL: { http: 500, exit: 70, type: 'server_error' },
} as const satisfies Record<string, { http: number; exit: number; type: string }>;

export type ErrorCode = keyof typeof ERRORS;

/** An error that reaches a person: the message says what was expected, what came and what to do. */
export class TplaError extends Error {
  readonly code: ErrorCode;
  /** Which field of the request or configuration is at fault, if one is. */
  readonly param: string | null;
  /** Seconds after which trying again makes sense, where that is known. */
  readonly retryAfterSeconds: number | null;

  constructor(code: ErrorCode, message: string, options: { cause?: unknown; param?: string; retryAfterSeconds?: number } = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.name = 'TplaError';
    this.code = code;
    this.param = options.param ?? null;
    this.retryAfterSeconds = options.retryAfterSeconds ?? null;
  }

  get httpStatus(): number {
    return ERRORS[this.code].http;
  }

  get exitStatus(): number {
    return ERRORS[this.code].exit;
  }
}

/** Wraps whatever was thrown; a TplaError passes through unchanged. */
export function toTplaError(thrown: unknown, fallback: ErrorCode = 'INTERNAL'): TplaError {
  if (thrown instanceof TplaError) return thrown;
  const error = thrown instanceof Error ? thrown : new Error(String(thrown));
  const code = (error as { code?: unknown }).code;
  if (typeof code === 'string' && Object.hasOwn(ERRORS, code)) {
    return new TplaError(code as ErrorCode, error.message, { cause: error });
  }
  return new TplaError(fallback, error.message, { cause: error });
}
