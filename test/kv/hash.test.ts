import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { BlockChain, blockIds, type BlockHashOptions } from '../../src/kv/hash.js';
import type { ModelIdentity } from '../../src/model/spec.js';

const identity: ModelIdentity = { name: 'demo', fingerprint: 'f00d', reparam: 'none' };
const options: BlockHashOptions = { dtype: 'bf16', pageTokens: 64, salt: '' };
const sequence = (length: number, seed = 0) => Array.from({ length }, (_, i) => (i * 2654435761 + seed) % 129280);

/** The definition, written a second time from its text. */
function expectedIds(tokens: number[], fields: string[], pageTokens: number): string[] {
  const parts: Buffer[] = [Buffer.from('tpla/kv-root/1\0')];
  for (const field of fields) parts.push(Buffer.from(Uint32Array.of(Buffer.byteLength(field)).buffer), Buffer.from(field));
  let parent = createHash('sha256').update(Buffer.concat(parts)).digest().subarray(0, 16);
  const ids = [];
  for (let begin = 0; begin + pageTokens <= tokens.length; begin += pageTokens) {
    const block = Buffer.from(Uint32Array.from(tokens.slice(begin, begin + pageTokens)).buffer);
    parent = createHash('sha256').update(Buffer.concat([Buffer.from('tpla/kv-block/1\0'), parent, block])).digest().subarray(0, 16);
    ids.push(parent.toString('hex'));
  }
  return ids;
}

test('ids are the chained hash as defined', () => {
  const tokens = sequence(300);
  assert.equal(blockIds(tokens, identity, options), expectedIds(tokens, ['f00d', 'none', 'bf16', '64', ''], 64));
  assert.equal(blockIds(tokens, identity, { ...options, pageTokens: 16, salt: 'té' }), expectedIds(tokens, ['f00d', 'none', 'bf16', '16', 'té'], 16));
});

test('ids are pinned: caches outlive a release', () => {
  assert.equal(blockIds(sequence(64), identity, options), ['6196dfe8402c796a946ba7dfece1293b']);
});

test('only full blocks have ids', () => {
  for (const [length, count] of [[0, 0], [1, 0], [63, 0], [64, 1], [127, 1], [128, 2]] as const) {
    assert.is(blockIds(sequence(length), identity, options).length, count);
  }
});

test('growing token by token, in pieces and at once agree', () => {
  const tokens = sequence(1000, 7);
  const chain = new BlockChain(identity, options);
  const pieces: string[] = [];
  for (let begin = 0, size = 1; begin < tokens.length; begin += size, size = (size * 3) % 101) pieces.push(...chain.append(tokens.slice(begin, begin + size)));
  assert.equal(pieces, blockIds(Int32Array.from(tokens), identity, options));
  assert.equal([...chain.ids], pieces);
  assert.is(chain.length, 1000);
  const single = new BlockChain(identity, options);
  assert.equal(tokens.map((token) => single.push(token)).filter((id) => id !== undefined), pieces);
});

test('a changed token changes its block and all later ones, none before', () => {
  const tokens = sequence(64 * 6);
  const changed = tokens.with(64 * 3, tokens[64 * 3]! ^ 1);
  const [a, b] = [blockIds(tokens, identity, options), blockIds(changed, identity, options)];
  assert.equal(a.map((id, i) => id === b[i]), [true, true, true, false, false, false]);
});

test('everything that decides the bytes separates ids; the served name does not', () => {
  const tokens = sequence(64);
  const id = (i: Partial<ModelIdentity> = {}, o: Partial<BlockHashOptions> = {}) => blockIds(tokens, { ...identity, ...i }, { ...options, ...o })[0];
  const variants = [id(), id({ fingerprint: 'f00' }), id({ reparam: 'x' }), id({}, { dtype: 'f32' }), id({}, { pageTokens: 32 }), id({}, { salt: 'a' }),
    id({ fingerprint: 'f00dn', reparam: 'one' })];
  assert.is(new Set(variants).size, variants.length);
  assert.is(id({ name: 'other' }), id());
});

test('another process computes the same ids', () => {
  const script = `import { blockIds } from ${JSON.stringify(new URL('../../src/kv/hash.ts', import.meta.url).href)};
    console.log(JSON.stringify(blockIds(${JSON.stringify(sequence(200))}, ${JSON.stringify(identity)}, ${JSON.stringify(options)})));`;
  const output = execFileSync(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script], { encoding: 'utf8' });
  assert.equal(JSON.parse(output), blockIds(sequence(200), identity, options));
});

test('what is not a token id is refused, with its place', () => {
  for (const bad of [-1, 1.5, NaN, 2 ** 32]) assert.throws(() => blockIds([1, 2, bad], identity, options), /position 2/);
  assert.throws(() => new BlockChain(identity, { ...options, pageTokens: 0 }), /at least 1/);
});

test.run();
