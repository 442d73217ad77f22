import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { WorkerHealth } from '../../src/fleet/health.js';

function worker(intervalMs = 1000) {
  const clock = { time: 0, now() { return this.time; } };
  return { clock, health: new WorkerHealth(clock, intervalMs) };
}

test('a worker is unknown and due at once, then asked every interval', () => {
  const { clock, health } = worker();
  assert.equal([health.status, health.nextPollInMs], ['unknown', 0]);
  health.answered('up');
  assert.equal([health.status, health.nextPollInMs], ['up', 1000]);
  clock.time = 400;
  assert.equal([health.nextPollInMs, health.sinceMs], [600, 400]);
});

test('no connection is down at once; a silent poll or two are forgiven', () => {
  const { health } = worker();
  health.answered('up');
  health.failed('timeout', true);
  health.failed('timeout', true);
  assert.equal([health.status, health.nextPollInMs], ['up', 1000]);
  health.answered('up');
  health.failed('timeout', true);
  health.failed('timeout', true);
  assert.is(health.status, 'up');
  health.failed('timeout', true);
  assert.equal([health.status, health.reason], ['down', 'timeout']);
  health.answered('up');
  health.failed('refused', false);
  assert.equal([health.status, health.reason], ['down', 'refused']);
});

test('a broken request means down, and a look soon', () => {
  const { health } = worker(100);
  health.answered('up');
  health.broke('connection reset');
  assert.equal([health.status, health.reason, health.nextPollInMs], ['down', 'connection reset', 100]);
});

test('the longer it is down, the rarer it is asked, up to five seconds; one answer brings it back', () => {
  const { clock, health } = worker();
  const waits = Array.from({ length: 6 }, () => {
    health.failed('refused', false);
    const wait = health.nextPollInMs;
    clock.time += wait;
    return wait;
  });
  assert.equal(waits, [1000, 2000, 4000, 5000, 5000, 5000]);
  assert.is(health.sinceMs, 22_000);
  health.answered('up');
  assert.equal([health.status, health.reason, health.nextPollInMs], ['up', null, 1000]);
});

test('an interval longer than the limit stays as it is', () => {
  const { health } = worker(60_000);
  health.failed('refused', false);
  health.failed('refused', false);
  assert.is(health.nextPollInMs, 60_000);
});

test.run();
