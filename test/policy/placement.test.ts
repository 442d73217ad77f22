import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { Placement, type Candidate } from '../../src/policy/placement.js';

const clock = { time: 0, now() { return this.time++; } };
const worker = (id: string, load: Partial<Candidate> = {}): Candidate => ({ id, requests: 0, pendingTokens: 0, cachedTokens: 0, freeTokens: 100_000, ...load });
const pick = (candidates: Candidate[], promptTokens = 1000) => new Placement(clock).pick(candidates, { promptTokens, kvTokens: promptTokens })?.id;

test('nobody', () => {
  assert.is(pick([]), undefined);
});

test('the least loaded', () => {
  assert.is(pick([worker('a', { pendingTokens: 500 }), worker('b', { pendingTokens: 100 })]), 'b');
  assert.is(pick([worker('a', { requests: 3 }), worker('b', { requests: 2 })]), 'b');
});

test('a cached prefix wins while it saves more than the worker is busier', () => {
  assert.is(pick([worker('a', { cachedTokens: 640, pendingTokens: 600 }), worker('b')]), 'a');
  assert.is(pick([worker('a', { cachedTokens: 640, pendingTokens: 700 }), worker('b')]), 'b');
});

test('the longer of two cached prefixes', () => {
  assert.is(pick([worker('a', { cachedTokens: 64 }), worker('b', { cachedTokens: 128 })]), 'b');
});

test('a worker without room comes last, however idle; what it caches needs no room', () => {
  assert.is(pick([worker('a', { freeTokens: 500 }), worker('b', { requests: 9 })]), 'b');
  assert.is(pick([worker('a', { freeTokens: 500, cachedTokens: 640 }), worker('b', { requests: 9 })]), 'a');
  assert.is(pick([worker('a', { freeTokens: 0 })]), 'a');
});

test('equals take turns', () => {
  const placement = new Placement(clock);
  const equal = ['a', 'b', 'c'].map((id) => worker(id));
  const turns = Array.from({ length: 6 }, () => placement.pick(equal, { promptTokens: 10, kvTokens: 10 })!.id);
  assert.equal(turns, ['a', 'b', 'c', 'a', 'b', 'c']);
});

test.run();
