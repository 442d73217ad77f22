// time limit: 600 s
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { loadCheckpoint } from '../../src/model/checkpoint.js';
import { native as loadNative } from '../../src/native/loader.js';
import type { Engine, KvLayout } from '../../src/native/types.js';

/** Logits of PyTorch transformers; format and tolerance in test/goldens/README.md. */
const native = loadNative();
const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const TOLERANCE = 1e-3;
const PAGE = 64;

interface ArrayRef {
  offset: number;
  count: number;
}

interface GoldenPosition {
  position: number;
  argmax: number;
  margin: number;
  logits?: ArrayRef;
  top_ids?: ArrayRef;
  top_logits?: ArrayRef;
  sample_ids?: ArrayRef;
  sample_logits?: ArrayRef;
}

interface GoldenPrompt {
  tokens: Int32Array;
  /** Expected logits by token id. */
  positions: { position: number; argmax: number; expected: Map<number, number> | Float32Array }[];
}

function goldens(name: string): GoldenPrompt[] {
  const dir = join(ROOT, 'test/goldens', name);
  const index = JSON.parse(readFileSync(join(dir, 'goldens.json'), 'utf8')) as { prompts: { tokens: ArrayRef; positions: GoldenPosition[] }[] };
  const bytes = readFileSync(join(dir, 'goldens.bin'));
  const slice = (ref: ArrayRef): ArrayBuffer => bytes.buffer.slice(bytes.byteOffset + ref.offset, bytes.byteOffset + ref.offset + ref.count * 4) as ArrayBuffer;
  const pairs = (ids: ArrayRef, logits: ArrayRef): [number, number][] => {
    const values = new Float32Array(slice(logits));
    return [...new Int32Array(slice(ids))].map((id, i) => [id, values[i]!]);
  };
  return index.prompts.map(({ tokens, positions }) => ({
    tokens: new Int32Array(slice(tokens)),
    positions: positions.map((p) => ({
      position: p.position,
      argmax: p.argmax,
      expected: p.logits ? new Float32Array(slice(p.logits)) : new Map([...pairs(p.top_ids!, p.top_logits!), ...pairs(p.sample_ids!, p.sample_logits!)]),
    })),
  }));
}

function check(actual: Float32Array, { position, argmax, expected }: GoldenPrompt['positions'][number], what: string): void {
  let top = 0;
  let worst = 0;
  expected.forEach((logit: number, id: number) => {
    top = Math.max(top, Math.abs(logit));
    worst = Math.max(worst, Math.abs(actual[id]! - logit));
  });
  assert.ok(worst <= TOLERANCE * top, `${what}, position ${position}: off by ${worst} of ${top}`);
  let best = 0;
  actual.forEach((logit, id) => {
    if (logit > actual[best]!) best = id;
  });
  assert.is(best, argmax, `${what}, position ${position}`);
}

function open(name: string) {
  const checkpoint = loadCheckpoint(join(ROOT, name === 'demo' ? 'models/demo' : `test/goldens/${name}`));
  const { spec } = checkpoint;
  const weights = new native.Weights(checkpoint.files, checkpoint.tensors);
  const engine = (fields: Partial<KvLayout>, pages: number, exactSoftmax = false): { engine: Engine; layout: KvLayout } => {
    const layout: KvLayout = { form: 'mla', ranks: 1, layers: spec.layers, latent: spec.kvLoraRank, rope: spec.qkRopeHeadDim, shared: 0, dtype: 'f32', pageTokens: PAGE, ...fields };
    return { layout, engine: new native.Engine({ spec, weights, arena: new native.KvArena(layout, pages), threads: 0, exactSoftmax }) };
  };
  return { spec, engine };
}

const NAMES = ['tiny-v2', 'tiny-v2-lite', 'tiny-v3', 'tiny-v3-fp8', 'tiny-k2', 'demo'];

for (const name of NAMES) {
  test(`prefill gives the logits of transformers: ${name}`, async () => {
    const prompts = goldens(name);
    const { spec, engine: make } = open(name);
    const pages = Math.ceil(Math.max(...prompts.map((prompt) => prompt.tokens.length)) / PAGE);
    const { engine } = make({}, pages);
    const table = Int32Array.from({ length: pages }, (_, i) => pages - 1 - i);
    for (const [i, prompt] of prompts.entries()) {
      // Chunks end where a logit is wanted, and every 512 tokens.
      let at = 0;
      for (const wanted of [...prompt.positions].sort((a, b) => a.position - b.position)) {
        while (at <= wanted.position) {
          const end = Math.min(wanted.position + 1, at + 512);
          const [logits] = await engine.prefill([{ tokens: prompt.tokens.slice(at, end), position: at, pages: table, logits: end > wanted.position ? 'last' : 'none' }]);
          at = end;
          if (end > wanted.position) check(logits!, wanted, `prompt ${i} of ${prompt.tokens.length}`);
        }
      }
    }
    assert.ok(prompts.length >= 16 && spec.vocabSize > 0);
    engine.close();
  });
}

const FORMS: [string, Partial<KvLayout>, boolean][] = [
  ['mla', { form: 'mla', ranks: 2 }, false],
  ['tpla of one rank', { form: 'tpla', ranks: 1 }, false],
  ['dcp', { form: 'dcp', ranks: 2 }, false],
  ['dp', { form: 'dp', ranks: 2 }, false],
  ['tpla of two ranks, softmax gathered', { form: 'tpla', ranks: 2 }, true],
];

for (const name of ['tiny-v2', 'tiny-v3', 'demo']) {
  for (const [form, fields, exactSoftmax] of FORMS) {
    test(`decode gives the logits of transformers: ${name}, ${form}`, async () => {
      // Every token goes through decode, several prompts in a batch.
      const prompts = goldens(name).filter((prompt) => prompt.tokens.length <= 150).slice(0, 8);
      assert.ok(prompts.length >= 4, `${prompts.length} short prompts`);
      const perPrompt = 3;
      const { spec, engine: make } = open(name);
      const { engine, layout } = make(fields, perPrompt * prompts.length, exactSoftmax);
      const tables = prompts.map((_, i) => Int32Array.from({ length: perPrompt }, (_unused, j) => i * perPrompt + j));
      const longest = Math.max(...prompts.map((prompt) => prompt.tokens.length));
      for (let position = 0; position < longest; position++) {
        const active = prompts.map((_, i) => i).filter((i) => position < prompts[i]!.tokens.length);
        const logits = await engine.decode(active.map((i) => ({
          token: prompts[i]!.tokens[position]!,
          position,
          pages: layout.form === 'dcp' ? Array.from({ length: layout.ranks }, () => tables[i]!) : [tables[i]!],
          rank: layout.form === 'dp' ? i % layout.ranks : undefined,
        })));
        active.forEach((i, row) => {
          const wanted = prompts[i]!.positions.find((p) => p.position === position);
          if (wanted) check(logits.slice(row * spec.vocabSize, (row + 1) * spec.vocabSize), wanted, `prompt ${i}`);
        });
      }
      engine.close();
    });
  }
}

test.run();
