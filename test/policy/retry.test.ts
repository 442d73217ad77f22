import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { ERRORS, type ErrorCode } from '../../src/errors.js';
import { failureKind, retryAfterSeconds } from '../../src/policy/retry.js';

test('what each code means for the next attempt', () => {
  const kinds: Record<string, string[]> = {};
  for (const code of Object.keys(ERRORS) as ErrorCode[]) (kinds[failureKind(code)] ??= []).push(code);
  assert.equal(kinds['refused']!.sort(), ['DRAINING', 'NO_PAGES', 'OUT_OF_MEMORY', 'OVERLOADED']);
  assert.equal(kinds['failed']!.sort(), ['CHECKSUM_MISMATCH', 'HANDOFF_FAILED', 'HANDSHAKE_REFUSED', 'LEASE_EXPIRED', 'PROTOCOL', 'WORKER_FAILED']);
});

test('the worker\'s own word decides', () => {
  assert.is(failureKind('WORKER_FAILED', false), 'final');
  assert.is(failureKind('INTERNAL', true), 'failed');
  assert.is(failureKind('OVERLOADED', true), 'refused');
});

test('a client waits about as long as a request takes', () => {
  assert.equal([10, 1000, 1001, 12_000, 600_000].map(retryAfterSeconds), [1, 1, 2, 12, 30]);
});

test.run();
