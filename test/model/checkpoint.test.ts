import { copyFileSync, cpSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import { loadCheckpoint } from '../../src/model/checkpoint.js';
import { readSafetensors } from '../../src/model/safetensors.js';
import { writeSafetensors } from '../../src/model/safetensors_writer.js';
import { TINY_V2, TINY_V3, writeCheckpoint } from '../support/checkpoint.js';

const test = suite('model/checkpoint');
const root = mkdtempSync(join(tmpdir(), 'tpla-checkpoint-'));
const whole = join(root, 'whole');
const SHARD_2 = 'model-00002-of-00003.safetensors';

test.before(() => writeCheckpoint(whole, { shards: 3 }));
test.after(() => rmSync(root, { recursive: true }));

let copies = 0;
function damaged(damage: (dir: string) => void): TplaError {
  const dir = join(root, `copy-${copies++}`);
  cpSync(whole, dir, { recursive: true });
  damage(dir);
  try {
    loadCheckpoint(dir);
  } catch (error) {
    assert.instance(error, TplaError);
    assert.is((error as TplaError).code, 'CHECKPOINT_INVALID', (error as Error).message);
    return error as TplaError;
  }
  throw new Error('the damaged checkpoint was accepted');
}

/** Rewrites the JSON header of a file without touching its length. */
function editHeader(path: string, edit: (json: string) => string): void {
  const bytes = readFileSync(path);
  const length = Number(bytes.readBigUInt64LE());
  const json = bytes.subarray(8, 8 + length).toString();
  const edited = Buffer.from(edit(json));
  if (edited.length !== length) throw new Error('the edit changes the header length');
  edited.copy(bytes, 8);
  writeFileSync(path, bytes);
}

test('a sharded checkpoint loads: shape, ranges and identity', () => {
  const checkpoint = loadCheckpoint(whole);
  assert.is(checkpoint.identity.name, 'whole');
  assert.is(checkpoint.identity.reparam, 'none');
  assert.match(checkpoint.identity.fingerprint, /^[0-9a-f]{32}$/);
  assert.is(checkpoint.files.length, 3);
  assert.is(new Set(checkpoint.tensors.map(({ name }) => name)).size, checkpoint.tensors.length);
  const kv = checkpoint.tensors.find(({ name }) => name === 'model.layers.1.self_attn.kv_b_proj.weight')!;
  assert.equal(kv.shape, [4 * 32, 32]);
  assert.is(kv.end - kv.begin, 4 * 32 * 32 * 2);
});

test('every stored number format, both families', () => {
  for (const dtype of ['F32', 'F16', 'BF16', 'F8_E4M3'] as const) {
    for (const config of [TINY_V2, TINY_V3]) {
      const dir = join(root, `dtype-${copies++}`);
      writeCheckpoint(dir, { dtype, config });
      const { tensors } = loadCheckpoint(dir);
      assert.is(tensors.find(({ name }) => name.endsWith('kv_b_proj.weight'))!.dtype, dtype);
      assert.is(tensors.some(({ name }) => name.endsWith('_scale_inv')), dtype === 'F8_E4M3');
    }
  }
});

test('extra tensors, such as multi-token prediction layers, are left out', () => {
  const dir = join(root, 'mtp');
  writeCheckpoint(dir, { extra: [{ name: 'model.layers.3.eh_proj.weight', dtype: 'I64', shape: [2], data: new Uint8Array(16) }] });
  assert.not(loadCheckpoint(dir).tensors.some(({ name }) => name.startsWith('model.layers.3.')));
});

test('the fingerprint follows the weights, not the place', () => {
  const original = loadCheckpoint(whole).identity;
  const moved = join(root, 'moved');
  cpSync(whole, moved, { recursive: true });
  assert.equal({ ...loadCheckpoint(moved, { name: 'whole' }).identity }, original);
  const tuned = join(root, 'tuned');
  writeCheckpoint(tuned, { shards: 3, seed: 2 });
  assert.is.not(loadCheckpoint(tuned).identity.fingerprint, original.fingerprint);
});

test('a truncated shard names file, tensor, expected and found', () => {
  const { message } = damaged((dir) => truncateSync(join(dir, SHARD_2), statSync(join(dir, SHARD_2)).size - 100));
  assert.match(message, new RegExp(`${SHARD_2} is truncated: tensor model\\.\\S+ expects bytes \\d+ to \\d+, found a file of \\d+ bytes`));
});

test('a shard truncated in its header, or to nothing', () => {
  assert.match(damaged((dir) => truncateSync(join(dir, SHARD_2), 200)).message, 'is truncated: its header needs');
  assert.match(damaged((dir) => truncateSync(join(dir, SHARD_2), 0)).message, 'is truncated: 0 bytes');
});

test('a missing shard', () => {
  assert.match(damaged((dir) => rmSync(join(dir, SHARD_2))).message, `${SHARD_2} cannot be opened`);
});

test('a missing tensor and a wrong shape, in one error', () => {
  const { message } = damaged((dir) => {
    rmSync(dir, { recursive: true });
    writeCheckpoint(dir, { config: { ...TINY_V3, num_hidden_layers: 2 } });
    writeFileSync(join(dir, 'config.json'), JSON.stringify({ ...TINY_V3, hidden_size: 32 }));
  });
  assert.match(message, 'model.safetensors: tensor model.embed_tokens.weight: expected F32 or BF16 or F16 [320, 32], found BF16 [320, 64]');
  assert.match(message, /and \d+ more/);
});

test('a tensor that no file holds', () => {
  const { message } = damaged((dir) => {
    const path = join(dir, 'model-00001-of-00003.safetensors');
    editHeader(path, (json) => json.replace('model.layers.1.self_attn.o_proj.weight', 'model.layers.1.self_attn.x_proj.weight'));
  });
  assert.match(message, 'tensor model.layers.1.self_attn.o_proj.weight: expected F32 or BF16 or F16 [64, 64], found in none of 3 files');
});

test('a dtype that cannot be computed with', () => {
  const { message } = damaged((dir) => editHeader(join(dir, SHARD_2), (json) => json.replaceAll('"BF16"', '"I16" ')));
  assert.match(message, /expected F32 or BF16 or F16 \[.*\], found I16/);
});

test('a flipped bit in the header', () => {
  assert.match(damaged((dir) => editHeader(join(dir, SHARD_2), (json) => json.replace('"shape":[', '"shape":{'))).message, 'damaged header');
  assert.match(damaged((dir) => editHeader(join(dir, SHARD_2), (json) => json.replace(/"shape":\[(\d)/, '"shape":[9'))).message, /expected \d+ bytes for BF16 .* found a range of/);
  const { message } = damaged((dir) => {
    const bytes = readFileSync(join(dir, SHARD_2));
    bytes[6] = bytes[6]! ^ 1;
    writeFileSync(join(dir, SHARD_2), bytes);
  });
  assert.match(message, 'is not a safetensors file');
});

test('overlapping, gapped and over-long files', () => {
  const path = join(root, 'ranges.safetensors');
  const two = () => writeSafetensors(path, ['a', 'b'].map((name) => ({ name, dtype: 'U8', shape: [4], data: new Uint8Array(4) })));
  const failure = (edit: (json: string) => string) => {
    two();
    editHeader(path, edit);
    try {
      readSafetensors(path);
    } catch (error) {
      return (error as Error).message;
    }
    throw new Error('accepted');
  };
  assert.match(failure((json) => json.replace('[4,8]', '[3,7]')), 'tensor b overlaps');
  assert.match(failure((json) => json.replace('[4,8]', '[5,9]')), 'is truncated: tensor b');
  assert.match(failure((json) => json.replace('[0,4]', '[4,0]')), 'tensor a: expected 4 bytes');
  two();
  writeFileSync(path, Buffer.concat([readFileSync(path), Buffer.alloc(3)]));
  assert.throws(() => readSafetensors(path), /3 bytes after its last tensor/);
});

test('an index that contradicts the files, and directories without weights', () => {
  assert.match(damaged((dir) => writeFileSync(join(dir, 'model.safetensors.index.json'), '{"weight_map": {"a": "../../etc/passwd"}}')).message, 'expected a file name');
  assert.match(damaged((dir) => writeFileSync(join(dir, 'model.safetensors.index.json'), '{')).message, 'not valid JSON');
  assert.match(damaged((dir) => {
    for (const file of ['model.safetensors.index.json', SHARD_2]) rmSync(join(dir, file));
    copyFileSync(join(dir, 'config.json'), join(dir, 'pytorch_model.bin'));
  }).message, 'PyTorch pickles are not read');
  assert.match(damaged((dir) => rmSync(join(dir, 'config.json'))).message, 'config.json cannot be read');
});

test('an fp8 matrix without its block scales', () => {
  const dir = join(root, 'fp8');
  writeCheckpoint(dir, { dtype: 'F8_E4M3' });
  editHeader(join(dir, 'model.safetensors'), (json) => json.replace('layers.0.self_attn.o_proj.weight_scale_inv', 'layers.0.self_attn.o_proj.weight_scale_xxx'));
  assert.throws(() => loadCheckpoint(dir), /o_proj\.weight_scale_inv: expected F32 \[1, 1\], found in none/);
});

test.run();
