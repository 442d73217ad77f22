// time limit: 600 s
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { native } from '../../src/native/loader.js';
import { tpla } from '../support/cli.js';
import { Draw } from '../support/random.js';
import { GPU, randomDecode } from './problems.js';

const test = suite('bench-attention on the GPU');

interface Row {
  kernel: string;
  verdict: string;
  timing: { ms: number; min_ms: number; max_ms: number; buffers: number; copy_fraction: number; mfu: number } | null;
}

test('times a large decode shape at a believable part of the bandwidth and matrix rate measured beside it', async () => {
  const { status, stdout, stderr } = await tpla(['bench-attention', '--heads', '16,128', '--batch', '64', '--kv-len', '8192', '--json']);
  assert.is(status, 0, stderr);
  const { rates, rows } = JSON.parse(stdout) as { rates: { copy_gb_per_s: number; matrix_tflops: number }; rows: Row[] };
  assert.ok(rates.copy_gb_per_s > 50 && rates.matrix_tflops > 5);
  for (const { verdict, timing } of rows) {
    assert.is(verdict, 'ok');
    assert.ok(timing !== null && timing.min_ms <= timing.ms && timing.ms <= timing.max_ms && timing.buffers >= 2);
    assert.ok(Math.max(timing.copy_fraction, timing.mfu) > 0.02 && Math.max(timing.copy_fraction, timing.mfu) < 1.2, JSON.stringify(timing));
  }
});

test('the sm80 path runs where it is asked for, and is named', async () => {
  const { status, stdout, stderr } = await tpla(['bench-attention', '--heads', '16', '--kv-len', '2048', '--path', 'sm80', '--check-only', '--json']);
  assert.is(status, 0, stderr);
  assert.equal((JSON.parse(stdout) as { rows: Row[] }).rows.map(({ kernel, verdict }) => [kernel, verdict]), [['sm80', 'ok']]);
});

test('what no kernel takes is refused before anything runs, and the GPU still works', async () => {
  for (const [args, expected] of [
    [['--latent', '512,384'], /REQUEST_INVALID: .*384.*latent 384\+64/],
    [['--page', '24'], /REQUEST_INVALID: .*page_size.*24/],
    [['--rope', '32'], /REQUEST_INVALID: .*rope.*32/],
    [['--kv-dtype', 'f32'], /REQUEST_INVALID: .*f32/],
    [['--kind', 'prefill', '--key-dim', '128'], /REQUEST_INVALID: .*(192|capability)/],
  ] as [string[], RegExp][]) {
    const { status, stdout, stderr } = await tpla(['bench-attention', '--kv-len', '256', ...args]);
    assert.is(status, 2, args.join(' '));
    assert.is(stdout, '');
    assert.match(stderr, expected);
  }
  const { check } = await native().attention.run(GPU, randomDecode(new Draw(3), 'auto', 512), { seed: 3, repeats: 1, runs: 0, reference: 'auto' });
  assert.ok(check && check.worstRow < 8e-3);
});

test('a GPU that is not there is named', async () => {
  const { status, stderr } = await tpla(['bench-attention', '--device', 'gpu:63', '--kv-len', '64']);
  assert.is(status, 69);
  assert.match(stderr, /GPU_UNAVAILABLE: there is no GPU 63: this machine has \d+/);
});

test('calls made at once take turns and all come right', async () => {
  const outcomes = await Promise.all([1, 2, 3, 4].map((seed) => native().attention.run(GPU, randomDecode(new Draw(seed), 'auto', 256), { seed, repeats: 3, runs: 0, reference: 'auto' })));
  for (const { check } of outcomes) assert.ok(check && check.sameBits && check.worstRow < 8e-3);
});

test.run();
