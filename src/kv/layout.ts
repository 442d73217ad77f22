/** Sizes that follow from a layout; native/core/kv_layout.h has the bytes themselves. */
import { rankColumns, sharedIn } from '../model/shared_widths.js';
import type { KvLayout } from '../native/types.js';

/** Bytes of one token of one layer in the memory of a rank that holds it. */
export function rowBytes({ form, ranks, latent, rope, shared, dtype }: KvLayout, layer: number): number {
  const width = form === 'tpla' ? rankColumns(latent, sharedIn(shared, layer), ranks) : latent;
  if (dtype === 'f32') return (width + rope) * 4;
  if (dtype === 'bf16') return (width + rope) * 2;
  return Math.ceil(width / 4) * 4 + Math.ceil(width / 128) * 4 + rope * 2;
}

/** The same over layers [begin, end), all of them unless said. */
export function tokenBytes(layout: KvLayout, [begin, end]: [number, number] = [0, layout.layers]): number {
  let bytes = 0;
  for (let layer = begin; layer < end; layer++) bytes += rowBytes(layout, layer);
  return bytes;
}

/** Copies of a token that ranks keep, each a part of its own: what a hand-off writes. */
export function copiesOf({ form, ranks }: KvLayout): number {
  return form === 'tpla' ? ranks : 1;
}
