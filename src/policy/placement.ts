/**
 * Which worker takes a request: the one where it costs least, counted in tokens. A token of prompt that must be computed counts one, a token that waits
 * or runs there already counts one, and every request there counts a little more, since a batch is slower for each of its sequences.
 * A prefix that a worker caches therefore wins until that worker has as much more to do as the prefix saves.
 */
import type { Clock } from '../clock.js';

/** One worker as placement sees it. */
export interface Candidate {
  id: string;
  /** Requests running and waiting. */
  requests: number;
  /** Prefill: tokens still to compute. Decode: tokens in flight. */
  pendingTokens: number;
  /** Tokens of the request's prompt that need not be computed (or moved) there. */
  cachedTokens: number;
  /** Tokens that its free and evictable pages hold. */
  freeTokens: number;
}

export interface PlacementRequest {
  promptTokens: number;
  /** Tokens of KV it needs at once. */
  kvTokens: number;
}

/** What one more sequence costs the others of a batch, in tokens. */
const TOKENS_PER_REQUEST = 256;

export class Placement {
  readonly #clock: Clock;
  readonly #picked = new Map<string, number>();

  constructor(clock: Clock) {
    this.#clock = clock;
  }

  /** The best candidate, or null if there is none. Workers that have room go before workers where the request would wait for pages; equals take turns. */
  pick<T extends Candidate>(candidates: readonly T[], request: PlacementRequest): T | null {
    const ranked = candidates.map((candidate) => ({
      candidate,
      full: candidate.freeTokens < request.kvTokens - candidate.cachedTokens ? 1 : 0,
      cost: placementCost(candidate, request),
      last: this.#picked.get(candidate.id) ?? -Infinity,
    })).sort((a, b) => a.full - b.full || a.cost - b.cost || a.last - b.last);
    const best = ranked[0]?.candidate ?? null;
    if (best) this.#picked.set(best.id, this.#clock.now());
    return best;
  }

  forget(id: string): void {
    this.#picked.delete(id);
  }
}

export function placementCost({ requests, pendingTokens, cachedTokens }: Candidate, { promptTokens }: PlacementRequest): number {
  return pendingTokens + requests * TOKENS_PER_REQUEST + Math.max(0, promptTokens - cachedTokens);
}
