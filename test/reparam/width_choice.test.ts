/** Which widths a budget buys: against every possibility, on small cases. */
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { candidateWidths, checkCandidates, chooseWidths, uniformWidth, widthBytes, type WidthShape } from '../../src/reparam/width_choice.js';
import { xorshift } from '../native/kv_reference.js';

const test = suite('reparam/width_choice');
const DEMO: WidthShape = { layers: 7, groups: 2, kvLoraRank: 128, qkRopeHeadDim: 32 };
const V3: WidthShape = { layers: 61, groups: 2, kvLoraRank: 512, qkRopeHeadDim: 64 };

test('candidates: rows that have kernels, else multiples of 16; always the whole latent', () => {
  assert.equal(candidateWidths(V3), [0, 64, 128, 512]);
  assert.equal(candidateWidths({ ...V3, groups: 4 }), [0, 256, 512]);
  assert.equal(candidateWidths(DEMO), [0, 16, 32, 48, 64, 128]);
  assert.equal(candidateWidths({ ...DEMO, groups: 3, kvLoraRank: 96 }), [0, 48, 96]);
  assert.throws(() => checkCandidates([0, 63], DEMO), /a shared width of 63 is not possible/);
  assert.throws(() => checkCandidates([256], DEMO), /a shared width of 256 is not possible/);
});

test('the widest width that all layers can have', () => {
  const candidates = candidateWidths(DEMO);
  assert.is(uniformWidth({ bytesPerToken: 1344, candidates }, DEMO), 0);
  assert.is(uniformWidth({ bytesPerToken: 1567, candidates }, DEMO), 16);
  assert.is(uniformWidth({ bytesPerToken: 1568, candidates }, DEMO), 32);
  assert.throws(() => uniformWidth({ bytesPerToken: 1343, candidates }, DEMO), /without a shared subspace it is 1344/);
  assert.throws(() => uniformWidth({ bytesPerToken: 1500, candidates: [32, 64] }, DEMO), /with the narrowest, 32, it is 1568/);
});

/** Least loss over all combinations. */
function best(losses: number[][], budget: number, candidates: number[], shape: WidthShape): number {
  const search = (layer: number, spent: number): number => {
    if (spent > budget) return Infinity;
    if (layer === losses.length) return 0;
    return Math.min(...candidates.map((shared, i) => losses[layer]![i]! + search(layer + 1, spent + widthBytes([shared], shape))));
  };
  return search(0, 0);
}

test('the chosen widths lose the least of all that fit', () => {
  const random = xorshift(5);
  for (let round = 0; round < 200; round++) {
    const shape = { layers: 4, groups: 2, kvLoraRank: 64, qkRopeHeadDim: 8 };
    const candidates = [0, 8, 24, 64];
    const losses = Array.from({ length: 4 }, () => candidates.map((shared) => (shared === 64 ? 0 : (random() % 1000) / (1 + shared))));
    const least = widthBytes([0, 0, 0, 0], shape);
    const budget = least + (random() % 260);
    const widths = chooseWidths(losses, { bytesPerToken: budget, candidates }, shape);
    assert.ok(widthBytes(widths, shape) <= budget);
    const loss = widths.reduce((sum, shared, layer) => sum + losses[layer]![candidates.indexOf(shared)]!, 0);
    assert.ok(Math.abs(loss - best(losses, budget, candidates, shape)) < 1e-9, `round ${round}`);
  }
});

test('61 layers, and a budget for all of the latent or for nothing', () => {
  const candidates = candidateWidths(V3);
  const losses = Array.from({ length: 61 }, (_, layer) => candidates.map((shared) => (layer + 1) * (512 - shared)));
  const budget = 61 * 704;
  const widths = chooseWidths(losses, { bytesPerToken: budget, candidates }, V3);
  assert.ok(widthBytes(widths, V3) <= budget && widths[60]! > widths[0]!);
  assert.equal(new Set(chooseWidths(losses, { bytesPerToken: 61 * 1152, candidates }, V3)), new Set([512]));
  assert.throws(() => chooseWidths(losses, { bytesPerToken: 61 * 640 - 1, candidates }, V3), /stays within/);
});

test.run();
