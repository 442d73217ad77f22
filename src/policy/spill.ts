/** Which blocks go from memory to disk, and when. Pure. */

/** Share of the memory's blocks that can make room at once without anything being lost. */
const ROOM = 1 / 8;

export interface SpillState {
  /** Blocks the memory has room for, and how many of those places are empty. */
  slots: number;
  free: number;
  /** Blocks on their way to disk, and how many may be. */
  underWay: number;
  maxUnderWay: number;
}

/**
 * Ids to write to disk now. `idle` are blocks that can be evicted, the next to go first: those that will go next are written before they
 * must, so that eviction never waits for a disk. Room is what is empty, or on disk already.
 */
export function chooseSpills(state: SpillState, idle: Iterable<string>, isOnDisk: (id: string) => boolean): string[] {
  const wanted = Math.max(1, Math.ceil(state.slots * ROOM));
  let room = state.free + state.underWay;
  let allowed = state.maxUnderWay - state.underWay;
  const chosen: string[] = [];
  for (const id of idle) {
    if (room >= wanted || allowed <= 0) break;
    room++;
    if (isOnDisk(id)) continue;
    chosen.push(id);
    allowed--;
  }
  return chosen;
}
