/** Evaluation of the demo model and of a conversion of it, through both paths. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import { evaluateText, type TextEvaluationOptions } from '../../src/eval/command.js';
import { evaluateRecall } from '../../src/eval/evaluate.js';
import { plantFacts, readRecallFile } from '../../src/eval/recall.js';
import { textWindows } from '../../src/eval/windows.js';
import { loadCheckpoint } from '../../src/model/checkpoint.js';
import { Tokenizer } from '../../src/model/tokenizer.js';
import { convert } from '../../src/reparam/convert.js';
import { METHODS } from '../../src/reparam/method.js';
import { SILENT } from '../../src/report/progress.js';

const test = suite('eval/evaluate');
const demo = fileURLToPath(new URL('../../models/demo', import.meta.url));
const dir = mkdtempSync(join(tmpdir(), 'tpla-eval-'));
const tpla = join(dir, 'tpla');
test.after(() => rmSync(dir, { recursive: true }));

const BASE: TextEvaluationOptions = { model: demo, text: join(demo, 'heldout.txt'), phase: 'decode', context: 256, prefix: 128, tokens: 256, seed: 3, dtype: 'f32', threads: 2, quiet: true };

test.before(() => convert({
  model: demo, out: tpla, methodName: 'default', method: { ...METHODS.default!, shared: 32, refine: 0 }, widths: null, groups: 2, output: 'auto', seed: 1, device: 'cpu', threads: 2,
  calibration: { file: join(demo, 'calibration.txt'), context: 256, tokens: 8192, queries: 64, seed: 1 },
}, SILENT).then(() => undefined));

test('exact forms agree with prefill to rounding, and tell the same bits per byte', async () => {
  const prefill = await evaluateText({ ...BASE, phase: 'prefill' });
  assert.is(prefill.kl_vs_mla, 0);
  assert.is(prefill.tokens, 2 * 127);
  assert.ok(prefill.bits_per_byte > 0.8 && prefill.bits_per_byte < 1.6, String(prefill.bits_per_byte));
  for (const attention of ['mla', 'dcp', 'dp'] as const) {
    const decode = await evaluateText({ ...BASE, attention, ranks: 2 });
    assert.ok(decode.kl_vs_mla < 1e-6, `${attention} ${decode.kl_vs_mla}`);
    assert.ok(Math.abs(decode.bits_per_byte - prefill.bits_per_byte) < 1e-4, attention);
    assert.is(decode.tokens, prefill.tokens);
  }
});

test('a reparameterised checkpoint: prefill exact, decode near, fewer bytes', async () => {
  const prefill = await evaluateText({ ...BASE, model: tpla, phase: 'prefill', reference: demo });
  assert.ok(prefill.kl_vs_mla < 5e-4, String(prefill.kl_vs_mla));
  const decode = await evaluateText({ ...BASE, model: tpla, reference: demo, dtype: 'bf16' });
  assert.is(decode.attention, 'tpla');
  assert.is(decode.ranks, 2);
  assert.is(decode.kv_bytes_per_token_per_rank, 7 * (32 + 48 + 32) * 2);
  assert.ok(decode.kl_vs_mla > 1e-4 && decode.kl_vs_mla < 0.15, String(decode.kl_vs_mla));
  assert.ok(decode.top1_agreement > 0.8, String(decode.top1_agreement));
});

test('planted facts: deterministic, at their depth, and the demo model finds them', async () => {
  const tokenizer = Tokenizer.load(demo);
  const text = readFileSync(join(demo, 'heldout.txt'), 'utf8');
  const plan = { contexts: [384], depths: [0.1, 0.9], perCell: 4, seed: 5 };
  const prompts = await plantFacts(tokenizer, text, plan);
  assert.equal(await plantFacts(tokenizer, text, plan), prompts);
  for (const { tokens, prefix, answer, depth } of prompts) {
    const value = tokenizer.decode(tokens.subarray(answer)).trim();
    const question = tokenizer.decode(tokens.subarray(prefix, answer)).trim();
    const fact = `${question.slice(question.indexOf('?') + 2)} ${value}.`;
    const body = tokenizer.decode(tokens.subarray(0, prefix));
    const found = body.indexOf(fact) / body.length;
    assert.ok(found >= 0 && Math.abs(found - depth) < 0.35, `${fact} at ${found}, wanted ${depth}`);
  }
  const result = await evaluateRecall(loadCheckpoint(demo), prompts, { form: 'dcp', ranks: 2, dtype: 'bf16', threads: 2 });
  assert.ok(result.accuracy >= 0.75, JSON.stringify(result));
  assert.is(result.cells.length, 2);
});

test('the shipped recall prompts are read: question last, value after it', async () => {
  const prompts = await readRecallFile(Tokenizer.load(demo), join(demo, 'recall.jsonl'));
  assert.is(prompts.length, 70);
  assert.ok(prompts.every(({ prefix, answer, tokens }) => prefix > 100 && answer > prefix && tokens.length > answer));
  const bad = join(dir, 'bad.jsonl');
  writeFileSync(bad, '{"prompt": 1}\n');
  await readRecallFile(Tokenizer.load(demo), bad).then(() => assert.unreachable(), (error: TplaError) => assert.match(error.message, 'line 1 has no prompt and answer'));
});

test('windows do not overlap and follow the seed', async () => {
  const tokenizer = Tokenizer.load(demo);
  const text = readFileSync(join(demo, 'heldout.txt'), 'utf8').slice(0, 20000);
  const cut = (seed: number) => textWindows(tokenizer, text, { context: 128, prefix: 64, scored: 640, seed });
  const [first, again, other] = [await cut(1), await cut(1), await cut(2)];
  assert.equal(first, again);
  assert.is(first.length, 10);
  assert.is.not(first[0]!.tokens.join(), other[0]!.tokens.join());
  assert.is(new Set(first.map(({ tokens }) => tokens.join())).size, 10);
});

async function refusal(change: Partial<TextEvaluationOptions>): Promise<string> {
  try {
    await evaluateText({ ...BASE, ...change });
  } catch (error) {
    assert.instance(error, TplaError, String(error));
    return (error as Error).message;
  }
  throw new Error('the evaluation ran');
}

test('what does not fit together is said before anything runs', async () => {
  assert.match(await refusal({ attention: 'tpla' }), 'is not reparameterised');
  assert.match(await refusal({ model: tpla, ranks: 4 }), 'reparameterised for 2 ranks, not 4');
  assert.match(await refusal({ context: 8192 }), '--context 8192 is longer than the 4096 tokens');
  assert.match(await refusal({ prefix: 256 }), 'leaves nothing to score');
  const short = join(dir, 'short.txt');
  writeFileSync(short, 'Hi.');
  assert.match(await refusal({ text: short }), /the text has \d tokens; at least 129/);
});

test.run();
