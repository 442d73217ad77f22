import type { LogitVariantsProblem } from '../../src/native/attention.js';
import type { Draw } from './random.js';

/** Any combination of at least one; lists of blocks may be empty, miss the last block and name blocks behind the end. */
export function randomVariants(draw: Draw, kvLens: Int32Array): LogitVariantsProblem {
  const variants = { softcap: draw.chance(1 / 2) ? draw.of([1.5, 30]) : 0, window: draw.chance(1 / 2) ? draw.of([1, 5, 64, 100, 300, 1000]) : 0, alibi: draw.chance(1 / 2) };
  const maskBlock = draw.chance(1 / 2) || !(variants.softcap > 0 || variants.window > 0 || variants.alibi) ? draw.of([16, 32, 48, 64, 128, 192]) : 0;
  const lists = maskBlock === 0 ? [] : [...kvLens].map((kvLen) => {
    const share = draw.chance(1 / 4) ? 1 : draw.chance(1 / 8) ? 0 : draw.unit();
    return Array.from({ length: Math.floor(kvLen / maskBlock) + 3 }, (_, block) => block).filter(() => draw.chance(share));
  });
  return { ...variants, maskBlock, maskCounts: Int32Array.from(lists, (list) => list.length), maskBlocks: Int32Array.from(lists.flat()) };
}
