/** Which prompts a step computes, and how much of each. */

export interface ChunkCandidate {
  /** Tokens still to compute, at least one. */
  remaining: number;
  /** Number of the step it last had a part in; -1 before the first. */
  lastStep: number;
  /** Order of arrival. */
  serial: number;
}

export interface Chunk<C> {
  candidate: C;
  count: number;
}

export interface ChunkLimits {
  /** Tokens of one prompt in one step. */
  chunkTokens: number;
  /** Tokens of all prompts in one step. */
  maxBatchTokens: number;
}

/**
 * Everybody gets a chunk in turn, who has waited longest first; so a short prompt that comes behind a long one waits for a step or two, not for
 * all of it.
 */
export function planChunks<C extends ChunkCandidate>(candidates: readonly C[], { chunkTokens, maxBatchTokens }: ChunkLimits): Chunk<C>[] {
  const turn = [...candidates].sort((a, b) => a.lastStep - b.lastStep || a.serial - b.serial);
  const chunks: Chunk<C>[] = [];
  let room = maxBatchTokens;
  for (const candidate of turn) {
    if (room === 0) break;
    const count = Math.min(candidate.remaining, chunkTokens, room);
    chunks.push({ candidate, count });
    room -= count;
  }
  return chunks;
}
