// time limit: 600 s
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { native } from '../../src/native/loader.js';
import { randomVariants } from '../support/logit_variants.js';
import { Draw } from '../support/random.js';
import { tpla } from '../support/cli.js';
import { GPU, mustBeRight, randomGqa } from './problems.js';

const test = suite('decode with ordinary keys and values on the GPU');

test('eighty random shapes against float64, half of them with variants, ten launches with the same bits', async () => {
  for (let seed = 1; seed <= 80; seed++) {
    const draw = new Draw(seed);
    const problem = randomGqa(draw);
    await mustBeRight(seed % 2 ? problem : { ...problem, variants: randomVariants(draw, problem.kvLens) }, { seed });
  }
});

test('one long sequence is split over the whole GPU', async () => {
  for (const [heads, kvHeads] of [[32, 8], [16, 1], [4, 4]] as const) {
    const problem = { ...randomGqa(new Draw(heads)), heads, kvHeads, kvLens: Int32Array.of(3, 70000, 0), qLens: Int32Array.of(1, 1, 1) };
    await mustBeRight(problem, { seed: heads, repeats: 4 });
  }
});

test('the reference that the CPU computes agrees, too', async () => {
  for (let seed = 1; seed <= 6; seed++) {
    const draw = new Draw(seed);
    const drawn = randomGqa(draw);
    const kvLens = drawn.kvLens.map((len) => len % 200).slice(0, 3);
    const problem = { ...drawn, kvLens, qLens: drawn.qLens.slice(0, 3), variants: randomVariants(draw, kvLens) };
    for (const reference of ['cpu', 'auto'] as const) await mustBeRight(problem, { seed, repeats: 1, reference });
  }
});

test('what the kernel does not take is refused with what it takes', async () => {
  for (const [change, expected] of [
    [{ headDim: 96 }, /head_dim must be 64 or 128; got 96/],
    [{ heads: 12, kvHeads: 8 }, /heads: expected a multiple of kvHeads, got 12 and 8/],
    [{ pageTokens: 24 }, /page_size must be a multiple of 16; got 24/],
    [{ path: 'sm90' }, /one kernel, sm80/],
    [{ variants: { softcap: 0, window: 0, alibi: false, maskBlock: 8, maskCounts: Int32Array.of(0), maskBlocks: new Int32Array() } }, /mask_block must be a multiple of 16 tokens; got 8/],
  ] as const) {
    const problem = { ...randomGqa(new Draw(1)), kvLens: Int32Array.of(5), qLens: Int32Array.of(1) };
    await Promise.resolve().then(() => native().attention.plan(GPU, { ...problem, ...change })).then(
      () => assert.unreachable(JSON.stringify(change)),
      (error: Error & { code: string }) => {
        assert.is(error.code, 'REQUEST_INVALID');
        assert.match(error.message, expected);
      },
    );
  }
});

test('the command times GQA and variants', async () => {
  const { status, stdout, stderr } = await tpla(['bench-attention', '--kv-heads', '8', '--heads', '32', '--batch', '32', '--kv-len', '4096', '--window', '0,512', '--runs', '3', '--json']);
  assert.is(status, 0, stderr);
  const { rows } = JSON.parse(stdout) as { rows: { verdict: string; timing: { ms: number } }[] };
  assert.equal(rows.map(({ verdict }) => verdict), ['ok', 'ok']);
  assert.ok(rows[1]!.timing.ms < rows[0]!.timing.ms, 'a window of an eighth takes less time');
});

test.run();
