import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { UpConfig } from '../../src/config/types.js';
import { TplaError } from '../../src/errors.js';
import { loadCheckpoint } from '../../src/model/checkpoint.js';
import { prepareCheckpoint } from '../../src/up/checkpoint.js';
import { loadStack } from '../../src/up/stack_config.js';

const test = suite('up/checkpoint');
const dir = mkdtempSync(join(tmpdir(), 'tpla-prepare-'));
test.after(() => rmSync(dir, { recursive: true }));

const shipped = (): UpConfig => loadStack(fileURLToPath(new URL('../../configs/up.yaml', import.meta.url)));
const prepare = (stack: UpConfig) => prepareCheckpoint(stack, 'stack.yaml', dir, new AbortController().signal, () => undefined);

test('a stack that does not split the latent, or does not ask for it, keeps its checkpoint', async () => {
  const exact = shipped();
  exact.services['decode-0']!.attention = { form: 'dcp', ranks: 2 };
  assert.equal(await prepare(exact), { stack: exact, reparam: null });
  const plain: UpConfig = { ...shipped(), reparam: 'none' };
  assert.equal(await prepare(plain), { stack: plain, reparam: null });
});

test('decode services of different ranks cannot share one checkpoint', async () => {
  const stack = shipped();
  stack.services['decode-1'] = { role: 'decode', attention: { form: 'tpla', ranks: 4 } };
  const error = await prepare(stack).then(() => null, (thrown: unknown) => thrown);
  assert.instance(error, TplaError);
  assert.match((error as TplaError).message, 'stack.yaml: reparam: decode services split the latent over 2 and 4 ranks');
});

test('the shipped stack serves the shipped model under its name, from a checkpoint made for its ranks; that one is used as it is', async () => {
  const { stack, reparam } = await prepare(shipped());
  assert.is(stack.model, join(dir, 'model'));
  assert.is(stack.model_name, 'demo');
  assert.match(reparam ?? '', '2 groups');
  assert.is(loadCheckpoint(stack.model!).spec.tpla?.groups, 2);
  assert.equal(await prepare(stack), { stack, reparam: '2 groups' });
});

test.run();
