/** What a benchmark moves, and whether it arrived. */
import { native } from '../../native/loader.js';
import type { KvArena, KvDType, KvLayout } from '../../native/types.js';
import { rowBytes } from '../../kv/layout.js';
import { sharedIn } from '../../model/shared_widths.js';
import { canonical, pagesFor, scatteredPages } from './cases.js';
import { newArena, type Memory } from './memory.js';

/** Canonical KV that `seed` decides, made in host memory and copied where it is to lie. */
export async function patternArena(memory: Memory, layout: KvLayout, tokens: number, seed: number): Promise<{ arena: KvArena; pages: Int32Array }> {
  const addon = native();
  const pages = scatteredPages(layout, tokens, seed + 1);
  const host = new addon.KvArena(layout, pagesFor(layout, tokens));
  await addon.kvFillPattern(host, pages, [0, tokens], 0, seed);
  if (memory.kind === 'host') return { arena: host, pages: pages[0]! };
  const arena = newArena(memory, layout, host.pages);
  const pinned = addon.pinKvRegion(host, 0);
  await addon.kvPut({ src: pinned, dst: arena, layers: [0, layout.layers], tokens: [0, tokens], srcPages: pages, dstPages: pages });
  pinned.close();
  host.close();
  return { arena, pages: pages[0]! };
}

/**
 * Where the arena, in the pages of a request that the seed scatters, differs from what patternArena's values, converted here, must look like; null for nowhere. Layer by
 * layer, through memory of our own.
 */
export async function differenceFromPattern(
  arena: KvArena, { request = 0, tokens, seed, sourceDType }: { request?: number; tokens: number; seed: number; sourceDType: KvDType },
): Promise<string | null> {
  const addon = native();
  const made = canonical({ ...arena.layout, layers: 1 }, sourceDType, arena.layout.pageTokens);
  const source = new addon.KvArena(made, pagesFor(made, tokens));
  const sourcePages = scatteredPages(made, tokens, seed + 1);
  const pages = scatteredPages(arena.layout, tokens, seed, request);
  const unshifted = scatteredPages(arena.layout, tokens, seed);
  let expected: KvArena | undefined;
  try {
    for (let layer = 0; layer < arena.layout.layers; layer++) {
      const target: KvLayout = { ...arena.layout, layers: 1, shared: sharedIn(arena.layout.shared, layer) };
      if (expected?.layout.shared !== target.shared) {
        expected?.close();
        expected = new addon.KvArena(target, pagesFor(target, tokens));
      }
      await addon.kvFillPattern(source, sourcePages, [0, tokens], layer, seed);
      await addon.kvPut({ src: source, dst: expected, layers: [0, 1], tokens: [0, tokens], srcPages: sourcePages, dstPages: unshifted });
      const difference = compareLayer({ arena, pages, layer }, { arena: expected, pages: unshifted, layer: 0 }, tokens);
      if (difference !== null) return difference;
    }
    return null;
  } finally {
    source.close();
    expected?.close();
  }
}

interface LayerOfSequence {
  arena: KvArena;
  pages: Int32Array[];
  layer: number;
}

/** Where one differs from the other, in the same layout; null for nowhere. */
function compareLayer(found: LayerOfSequence, wanted: LayerOfSequence, tokens: number): string | null {
  const { form, ranks, pageTokens } = found.arena.layout;
  const bytes = rowBytes(found.arena.layout, found.layer);
  for (let page = 0; page * pageTokens < tokens; page++) {
    const holders = form === 'tpla' ? Array.from({ length: ranks }, (_, rank) => rank) : [form === 'dcp' ? page % ranks : 0];
    const idIn = ({ pages }: LayerOfSequence) => (form === 'dcp' ? pages[page % ranks]![Math.floor(page / ranks)]! : pages[0]![page]!);
    const used = Math.min(pageTokens, tokens - page * pageTokens) * bytes;
    for (const rank of holders) {
      const [one, other] = [found, wanted].map((side) => side.arena.page(rank, side.layer, idIn(side)).subarray(0, used));
      if (Buffer.compare(one!, other!) !== 0) return `layer ${found.layer}, rank ${rank}, page ${page} of the sequence`;
    }
  }
  return null;
}
