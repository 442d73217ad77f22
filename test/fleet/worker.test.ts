import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import type { WorkerState } from '../../src/fleet/protocol.js';
import { Worker } from '../../src/fleet/worker.js';

const state = (running: number, pending_tokens: number): WorkerState => ({
  role: 'decode', id: 'd', model: { name: 'm', fingerprint: 'f', reparam: 'none' }, context_length: 4096, draining: false, running, waiting: 0, pending_tokens,
  pages: { total: 10, used: 0, cached: 0 }, attention: { form: 'mla', ranks: 1, dtype: 'bf16', kv_bytes_per_token_per_rank: 1152 },
});

function worker() {
  const clock = { time: 0, now() { return this.time; } };
  return { clock, worker: new Worker({ role: 'decode', address: 'unix:/nowhere' }, clock, 1000) };
}
const leg = (tokens: number, fail: (error: TplaError) => void = () => {}) => ({ tokens, fail });

test('load is what was reported, plus what began since, less what ended since', () => {
  const { clock, worker: decode } = worker();
  const early = decode.begin(leg(100));
  assert.equal(decode.load, { requests: 1, tokens: 100 });
  clock.time = 10;
  // 1 of ours and 2 of another route
  decode.update(state(3, 700), 10);
  assert.equal(decode.load, { requests: 3, tokens: 700 });
  clock.time = 20;
  const late = decode.begin(leg(50));
  assert.equal(decode.load, { requests: 4, tokens: 750 });
  early();
  early();
  assert.equal(decode.load, { requests: 3, tokens: 650 });
  late();
  assert.equal(decode.load, { requests: 2, tokens: 600 });
  decode.update(state(2, 600), 30);
  assert.equal(decode.load, { requests: 2, tokens: 600 });
});

test('when it goes down every leg hears of it once, and may end itself meanwhile', () => {
  const { worker: decode } = worker();
  const heard: string[] = [];
  const ends: (() => void)[] = [];
  for (const name of ['a', 'b']) ends.push(decode.begin(leg(1, (error) => { heard.push(`${name} ${error.code}`); for (const end of ends) end(); })));
  decode.failLegs(new TplaError('WORKER_FAILED', 'gone'));
  assert.equal(heard, ['a WORKER_FAILED', 'b WORKER_FAILED']);
  assert.is(decode.legs, 0);
});

test.run();
