/** What a failed attempt to serve a request means for the next one. */
import type { ErrorCode } from '../errors.js';

/**
 * - refused: this worker does not take it now, nothing is broken; try the others, which costs no retry
 * - failed: something broke on the way; worth another attempt
 * - final: it would fail anywhere
 */
export type FailureKind = 'refused' | 'failed' | 'final';

const KINDS: Partial<Record<ErrorCode, FailureKind>> = {
  OVERLOADED: 'refused',
  DRAINING: 'refused',
  NO_PAGES: 'refused',
  OUT_OF_MEMORY: 'refused',
  WORKER_FAILED: 'failed',
  HANDSHAKE_REFUSED: 'failed',
  HANDOFF_FAILED: 'failed',
  CHECKSUM_MISMATCH: 'failed',
  LEASE_EXPIRED: 'failed',
  PROTOCOL: 'failed',
};

/** Kind of a failure by its code; `retryable` is the worker's own word, where it gave one. */
export function failureKind(code: ErrorCode, retryable?: boolean): FailureKind {
  if (retryable === false) return 'final';
  return KINDS[code] ?? (retryable ? 'failed' : 'final');
}

/** Seconds to tell a client to wait when every worker is full: the mean time one request ahead of it takes, at least 1, at most 30. */
export function retryAfterSeconds(meanRequestMs: number): number {
  return Math.min(30, Math.max(1, Math.ceil(meanRequestMs / 1000)));
}
