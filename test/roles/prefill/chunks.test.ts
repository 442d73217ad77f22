import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { planChunks } from '../../../src/roles/prefill/chunks.js';

const limits = { chunkTokens: 512, maxBatchTokens: 1024 };
const prompt = (serial: number, remaining: number, lastStep = -1) => ({ serial, remaining, lastStep });
const counts = (...candidates: ReturnType<typeof prompt>[]) => planChunks(candidates, limits).map(({ candidate, count }) => [candidate.serial, count]);

test('a chunk each, up to the size of a step', () => {
  assert.equal(counts(), []);
  assert.equal(counts(prompt(0, 4000)), [[0, 512]]);
  assert.equal(counts(prompt(0, 4000), prompt(1, 100)), [[0, 512], [1, 100]]);
  assert.equal(counts(prompt(0, 4000), prompt(1, 300), prompt(2, 4000), prompt(3, 1)), [[0, 512], [1, 300], [2, 212]]);
});

test('who waited longest goes first', () => {
  assert.equal(counts(prompt(0, 4000, 7), prompt(1, 4000, 6), prompt(2, 50)), [[2, 50], [1, 512], [0, 462]]);
});

test('short prompts that keep coming do not starve a long one, nor it them', () => {
  let next = 1;
  const long = prompt(0, 20_000);
  let waiting = [long];
  for (let step = 0; step < 200 && long.remaining > 0; step++) {
    for (let i = 0; i < 3; i++) waiting.push(prompt(next++, 400));
    const chunks = planChunks(waiting, limits);
    assert.ok(chunks.reduce((sum, { count }) => sum + count, 0) <= 1024);
    for (const { candidate, count } of chunks) {
      candidate.remaining -= count;
      candidate.lastStep = step;
    }
    waiting = waiting.filter(({ remaining }) => remaining > 0);
  }
  assert.is(long.remaining < 20_000, true);
  // With more work coming than fits, everybody waits, but in order: a prompt's age in the queue bounds who is before it.
  const [first] = planChunks(waiting, limits);
  assert.is(first!.candidate.lastStep, Math.min(...waiting.map(({ lastStep }) => lastStep)));
});

test.run();
