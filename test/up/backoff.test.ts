import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { Backoff } from '../../src/up/backoff.js';

test('waits double up to the longest, and begin again after a sound run', () => {
  let now = 0;
  const backoff = new Backoff({ first_ms: 100, max_ms: 1000, reset_after_ms: 5000 }, { now: () => now });
  const waits: number[] = [];
  const run = (ms: number) => {
    backoff.started();
    now += ms;
    waits.push(backoff.ended());
  };
  for (let i = 0; i < 6; i++) run(10);
  run(5000);
  run(4999);
  assert.equal(waits, [100, 200, 400, 800, 1000, 1000, 100, 200]);
});

test.run();
