import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { ERRORS, TplaError, toTplaError } from '../src/errors.js';

test('codes, HTTP statuses and exit statuses are what scripts rely on', () => {
  const table = Object.fromEntries(Object.entries(ERRORS).map(([code, { http, exit }]) => [code, [http, exit]]));
  assert.equal(table, {
    USAGE: [400, 2],
    CONFIG_INVALID: [500, 78],
    REQUEST_INVALID: [400, 2],
    REQUEST_TOO_LARGE: [413, 2],
    CONTEXT_LENGTH_EXCEEDED: [400, 2],
    MODEL_NOT_FOUND: [404, 2],
    NOT_FOUND: [404, 2],
    MODEL_UNSUPPORTED: [500, 65],
    CHECKPOINT_INVALID: [500, 65],
    ADDON_LOAD_FAILED: [500, 69],
    GPU_UNAVAILABLE: [503, 69],
    ADDRESS_IN_USE: [500, 73],
    OUT_OF_MEMORY: [503, 71],
    IO_FAILED: [500, 74],
    GPU_FAILED: [500, 70],
    CHECK_FAILED: [500, 1],
    NO_WORKER: [503, 69],
    OVERLOADED: [429, 75],
    REQUEST_TIMEOUT: [504, 75],
    WORKER_FAILED: [502, 69],
    HANDSHAKE_REFUSED: [409, 76],
    HANDOFF_FAILED: [502, 69],
    CHECKSUM_MISMATCH: [502, 65],
    LEASE_EXPIRED: [504, 69],
    NO_PAGES: [503, 75],
    DRAINING: [503, 75],
    CANCELLED: [499, 130],
    PROTOCOL: [502, 76],
    INTERNAL: [500, 70],
  });
});

test('an error of the addon keeps its code, an unknown one becomes the fallback', () => {
  const native = Object.assign(new Error('no room'), { code: 'OUT_OF_MEMORY' });
  assert.is(toTplaError(native).code, 'OUT_OF_MEMORY');
  assert.is(toTplaError(native).message, 'no room');
  assert.is(toTplaError(Object.assign(new Error('x'), { code: 'ENOENT' })).code, 'INTERNAL');
  assert.is(toTplaError(Object.assign(new Error('x'), { code: 'ENOENT' }), 'IO_FAILED').code, 'IO_FAILED');
  const own = new TplaError('NO_PAGES', 'full', { param: 'n' });
  assert.is(toTplaError(own), own);
  assert.is(own.param, 'n');
});

test.run();
