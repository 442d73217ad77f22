/** In which pushes KV goes that is there as a whole. */
import type { TransferPath } from './types.js';

/** Each push is so many times smaller than the one before: a GPU verifies faster than a link carries by more than that, so that none waits. */
const RATIO = 4;
/** Of the last push, whose verification is all that is left when the last byte is in place. Below this its launch takes longer than its bytes. */
const LEAST_BYTES = 8e6;

const PATHS_OF_GPUS: readonly TransferPath[] = ['same-gpu', 'cuda-ipc', 'cuda-fd', 'pinned'];

/** Where CPUs move it, or a link between hosts, verifying one push beside the next takes from the same cores: there it goes in one. */
export const isMovedByGpu = (path: TransferPath): boolean => PATHS_OF_GPUS.includes(path);

/** Layers [begin, end) of each push by a GPU, for `bytes` in all layers: decode verifies one while the next travels. */
export function layerGroups(layers: number, bytes: number): [number, number][] {
  let count = 1;
  while (shares(count + 1) <= Math.min(layers, bytes / LEAST_BYTES)) count++;
  const beginOf = (group: number) => layers - Math.round(layers * shares(count - group) / shares(count));
  return Array.from({ length: count }, (_, group) => [beginOf(group), beginOf(group + 1)]);
}

/** 1 + RATIO + RATIO² …, `count` terms: the whole in units of its last group. */
const shares = (count: number): number => (RATIO ** count - 1) / (RATIO - 1);
