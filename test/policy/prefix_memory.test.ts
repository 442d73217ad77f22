import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { PrefixMemory, cachedPrefix } from '../../src/policy/prefix_memory.js';

function memory(blocksPerWorker = 100) {
  const clock = { time: 0, now() { return this.time; } };
  return { clock, memory: new PrefixMemory(clock, { blocksPerWorker, ttlMs: 1000 }) };
}

test('remembers per worker, for a while', () => {
  const { clock, memory: prefixes } = memory();
  prefixes.remember('a', ['x', 'y']);
  assert.equal([prefixes.has('a', 'x'), prefixes.has('a', 'z'), prefixes.has('b', 'x')], [true, false, false]);
  clock.time = 1000;
  assert.ok(prefixes.has('a', 'x'));
  clock.time = 1001;
  assert.not.ok(prefixes.has('a', 'x'));
});

test('knows what was placed since a report', () => {
  const { clock, memory: prefixes } = memory();
  prefixes.remember('a', ['old']);
  clock.time = 10;
  prefixes.remember('a', ['new']);
  assert.equal([prefixes.has('a', 'old', 5), prefixes.has('a', 'new', 5)], [false, true]);
});

test('forgets the ends of the oldest prefixes first', () => {
  const { clock, memory: prefixes } = memory(4);
  prefixes.remember('a', ['p1', 'p2', 'p3']);
  clock.time = 1;
  prefixes.remember('a', ['q1', 'q2']);
  assert.equal(['p1', 'p2', 'p3', 'q1', 'q2'].map((block) => prefixes.has('a', block)), [true, true, false, true, true]);
});

test('forgets a worker that was restarted', () => {
  const { memory: prefixes } = memory();
  prefixes.remember('a', ['x']);
  prefixes.forget('a');
  assert.not.ok(prefixes.has('a', 'x'));
});

test('a prefix ends at the first missing block', () => {
  assert.is(cachedPrefix(['a', 'b', 'c', 'd'], (block) => block !== 'c'), 2);
  assert.is(cachedPrefix(['a', 'b'], () => true), 2);
  assert.is(cachedPrefix([], () => true), 0);
});

test.run();
