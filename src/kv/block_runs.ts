/** Blocks of kv-pool as the addon's transfers take them: token ranges and page tables of a whole sequence. */
import { TplaError } from '../errors.js';

export interface PlacedBlock {
  slot: number;
  /** Which block of its sequence it is. */
  index: number;
  /** Rows that are filled. */
  tokens: number;
}

/** Cuts blocks into runs that one transfer can cover: consecutive, and all full but for the last. */
export function consecutiveRuns<B extends PlacedBlock>(blocks: readonly B[], pageTokens: number): B[][] {
  const runs: B[][] = [];
  for (const block of blocks) {
    if (block.tokens < 1 || block.tokens > pageTokens) {
      throw new TplaError('REQUEST_INVALID', `a block holds 1 to ${pageTokens} tokens, not ${block.tokens}`, { param: 'tokens' });
    }
    const run = runs.at(-1);
    const last = run?.at(-1);
    if (run && last!.index + 1 === block.index && last!.tokens === pageTokens) run.push(block);
    else runs.push([block]);
  }
  return runs;
}

/** Tokens [begin, end) of the sequence that a run covers. */
export function tokenRange(run: readonly PlacedBlock[], pageTokens: number): [number, number] {
  const last = run.at(-1)!;
  return [run[0]!.index * pageTokens, last.index * pageTokens + last.tokens];
}

/** Page table of the whole sequence with the run's slots in their places; what precedes is not looked at. */
export function slotTable(run: readonly PlacedBlock[]): Int32Array {
  const table = new Int32Array(run.at(-1)!.index + 1);
  for (const { slot, index } of run) table[index] = slot;
  return table;
}
