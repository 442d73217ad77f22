/** The last line of a stream that broke off. */
import type { ErrorCode, TplaError } from '../errors.js';
import type { ErrorBody } from '../fleet/protocol.js';
import { errorBody } from '../http/error_body.js';

/** Failures of a worker or of what is between workers: the same request can succeed elsewhere, or later. */
const RETRYABLE: ReadonlySet<ErrorCode> = new Set(['HANDOFF_FAILED', 'CHECKSUM_MISMATCH', 'LEASE_EXPIRED', 'DRAINING', 'NO_PAGES', 'OUT_OF_MEMORY', 'PROTOCOL', 'INTERNAL']);

export function errorEvent(error: TplaError): { event: 'error'; error: ErrorBody['error']; retryable: boolean } {
  return { event: 'error', error: errorBody(error).error, retryable: RETRYABLE.has(error.code) };
}
