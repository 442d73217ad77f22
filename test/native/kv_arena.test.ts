import { fstatSync } from 'node:fs';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { native as loadNative } from '../../src/native/loader.js';
import type { KvLayout } from '../../src/native/types.js';

const native = loadNative();
const layout = (fields: Partial<KvLayout>): KvLayout => ({ form: 'mla', ranks: 1, layers: 2, latent: 512, rope: 64, shared: 0, dtype: 'bf16', pageTokens: 64, ...fields });

function codeOf(run: () => unknown): string | undefined {
  try {
    run();
  } catch (error) {
    return (error as { code?: string }).code;
  }
  return undefined;
}

test('rows have the published widths', () => {
  const perLayer = (fields: Partial<KvLayout>): number => new native.KvArena(layout(fields), 1).bytesPerTokenPerRank / 2;
  assert.is(perLayer({}), 1152);
  assert.is(perLayer({ dtype: 'f32' }), 2304);
  assert.is(perLayer({ dtype: 'fp8' }), 656);
  assert.is(perLayer({ form: 'tpla', ranks: 2 }), 640);
  assert.is(perLayer({ form: 'tpla', ranks: 2, shared: 64 }), (64 + 224 + 64) * 2);
  assert.is(perLayer({ form: 'tpla', ranks: 2, dtype: 'fp8' }), 256 + 8 + 128);
  assert.is(perLayer({ form: 'dcp', ranks: 4 }), 1152 / 4);
  assert.is(perLayer({ form: 'dp', ranks: 2 }), 1152 / 2);
});

test('one memfd per memory: mla ranks share theirs', () => {
  for (const [fields, memories] of [[{ ranks: 2 }, 1], [{ form: 'tpla', ranks: 2 }, 2], [{ form: 'dp', ranks: 3 }, 3]] as [Partial<KvLayout>, number][]) {
    const arena = new native.KvArena(layout(fields), 5);
    const fds = arena.fds();
    assert.is(fds.length, memories);
    const rowBytes = fields.form === 'tpla' ? 640 : 1152;
    const rankBytes = rowBytes * 2 * 64 * 5;
    for (const fd of fds) assert.is(fstatSync(fd).size, rankBytes);
    assert.is(arena.bytes, rankBytes * memories);
    assert.equal(arena.layout, layout(fields));
    arena.close();
    fds.forEach((fd) => assert.throws(() => fstatSync(fd)));
  }
});

test('page() is a view onto the memory and outlives close()', () => {
  const arena = new native.KvArena(layout({ form: 'tpla', ranks: 2 }), 3);
  const first = arena.page(1, 1, 2);
  first.fill(7);
  assert.equal(arena.page(1, 1, 2), new Uint8Array(640 * 64).fill(7));
  assert.ok(arena.page(0, 1, 2).every((byte) => byte === 0));
  arena.close();
  assert.is(first[0], 7);
});

test('bad layouts and indices are refused', () => {
  for (const fields of [{ ranks: 0 }, { ranks: 65 }, { form: 'tpla', ranks: 3 }, { shared: 8 }, { pageTokens: 20 }, { dtype: 'f64' }, { form: 'x' }, { latent: 1.5 }]) {
    assert.is(codeOf(() => new native.KvArena(layout(fields as Partial<KvLayout>), 1)), 'REQUEST_INVALID', JSON.stringify(fields));
  }
  assert.is(codeOf(() => new native.KvArena(layout({}), 0)), 'REQUEST_INVALID');
  const arena = new native.KvArena(layout({}), 4);
  for (const [rank, layer, page] of [[1, 0, 0], [0, 2, 0], [0, 0, 4], [-1, 0, 0], [0, 0, NaN]] as [number, number, number][]) {
    assert.is(codeOf(() => arena.page(rank, layer, page)), 'REQUEST_INVALID');
  }
  arena.close();
  assert.is(codeOf(() => arena.fds()), 'REQUEST_INVALID');
});

test('an arena larger than the address space is OUT_OF_MEMORY', () => {
  assert.is(codeOf(() => new native.KvArena(layout({ layers: 4096, pageTokens: 16384 }), 2 ** 28)), 'OUT_OF_MEMORY');
});

test.run();
