/** In which pushes KV goes that is there as a whole: decode verifies one while the next travels, and the last of them when the last byte is in place. */
import type { TransferPath } from './types.js';

/** Each push is so many times smaller than the one before: a GPU verifies faster than a link between GPUs carries by more than that, so that none waits. */
const RATIO = 4;
/** Of the last push. Below this its launch takes longer than its bytes. */
const LEAST_BYTES = 8e6;
/** Where either side is host memory: a CPU verifies about as fast as PCIe carries. */
const EVEN_GROUPS = 4;

/** Layers [begin, end) of each push, for `bytes` in all layers. */
export function layerGroups(path: TransferPath, layers: number, bytes: number): [number, number][] {
  switch (path) {
    case 'same-gpu':
    case 'cuda-ipc':
    case 'cuda-fd': return shrinkingGroups(layers, bytes);
    case 'pinned': return cut(layers, Math.min(EVEN_GROUPS, layers), (part, count) => part / count);
    // CPUs move it and verify it: side by side these would take each other's cores.
    default: return [[0, layers]];
  }
}

function shrinkingGroups(layers: number, bytes: number): [number, number][] {
  let count = 1;
  while (shares(count + 1) <= Math.min(layers, bytes / LEAST_BYTES)) count++;
  return cut(layers, count, (group) => 1 - shares(count - group) / shares(count));
}

/** The whole in units of the last of `count` groups: 1 + RATIO + RATIO² … */
const shares = (count: number): number => (RATIO ** count - 1) / (RATIO - 1);

/** `beginOf`: where a group begins, as a part of the whole. */
function cut(layers: number, count: number, beginOf: (group: number, count: number) => number): [number, number][] {
  const begins = Array.from({ length: count + 1 }, (_, group) => Math.round(layers * beginOf(group, count)));
  return begins.slice(1).map((end, group) => [begins[group]!, end]);
}
