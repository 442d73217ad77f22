// time limit: 600 s
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { AttentionPath } from '../../src/native/attention.js';
import { native } from '../../src/native/loader.js';
import { tpla } from '../support/cli.js';
import { Draw } from '../support/random.js';
import { GPU, mustBeRight, randomChunk } from './problems.js';

const test = suite('a chunk behind cached latents on the GPU');

for (const path of ['auto', 'sm80'] satisfies AttentionPath[]) {
  test(`path ${path}: thirty random chunks in both forms, which take turns at one workspace, against float64; ten launches with the same bits`, async () => {
    for (let seed = 1; seed <= 30; seed++) await mustBeRight(randomChunk(new Draw(seed * 53), path), { seed });
  });
}

test('a chunk behind a long prefix beside sequences without a query or a token', async () => {
  for (const kvDType of ['bf16', 'fp8'] as const) {
    const problem = { ...randomChunk(new Draw(2)), qLens: Int32Array.of(300, 0, 40, 0, 7), kvLens: Int32Array.of(20000, 900, 40, 0, 0), heads: 40, kvDType, causal: true };
    await mustBeRight(problem, { seed: 2, repeats: 4 });
  }
});

test('one of the two forms, where it is asked for', async () => {
  for (const [form, name] of [['absorbed', 'absorbed, '], ['unabsorbed', 'un-absorbed, ']] as const) {
    const problem = { ...randomChunk(new Draw(4)), form };
    assert.ok((await native().attention.plan(GPU, problem)).startsWith(name));
    await mustBeRight(problem, { seed: 4, repeats: 4 });
  }
});

test('the reference that the CPU computes agrees, too', async () => {
  for (let seed = 1; seed <= 6; seed++) {
    const drawn = randomChunk(new Draw(seed));
    const problem = { ...drawn, heads: Math.min(drawn.heads, 5), kvLens: drawn.kvLens.map((len) => len % 100), qLens: drawn.qLens.map((len) => len % 60) };
    for (const reference of ['cpu', 'auto'] as const) await mustBeRight(problem, { seed, repeats: 1, reference });
  }
});

test('what no kernel takes is refused in either form with what it takes', async () => {
  for (const form of ['absorbed', 'unabsorbed'] as const) {
    for (const [change, expected] of [
      [{ kvDType: 'f32' }, /bf16 or fp8 KV; f32 is for the CPU/],
      [{ pageTokens: 24 }, /page_size must be a multiple of 16 .* got 24/],
      [{ form: 'both' }, /form: expected one of auto, absorbed, unabsorbed, got "both"/],
    ] as const) {
      await Promise.resolve().then(() => native().attention.plan(GPU, { ...randomChunk(new Draw(1)), form, ...change } as never)).then(
        () => assert.unreachable(JSON.stringify(change)),
        (error: Error & { code: string }) => {
          assert.is(error.code, 'REQUEST_INVALID');
          assert.match(error.message, expected);
        },
      );
    }
  }
});

test('the command times both forms and says which it chose', async () => {
  const { status, stdout, stderr } = await tpla(['bench-attention', '--kind', 'chunk', '--heads', '16', '--kv-len', '8192', '--q-tokens', '64,1024', '--runs', '3', '--json']);
  assert.is(status, 0, stderr);
  const { rows } = JSON.parse(stdout) as { rows: { kernel: string; verdict: string; timing: { ms: number; absorbed_ms: number; unabsorbed_ms: number; choice_ratio: number } }[] };
  for (const { kernel, verdict, timing } of rows) {
    assert.is(verdict, 'ok');
    assert.is(timing.ms, kernel.startsWith('absorbed') ? timing.absorbed_ms : timing.unabsorbed_ms);
    assert.ok(timing.choice_ratio > 0 && timing.choice_ratio <= 1);
  }
});

test.run();
