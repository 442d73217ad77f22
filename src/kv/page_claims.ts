/**
 * Deadlock avoidance where nothing can be swapped out (Dijkstra's banker's algorithm): a page is granted only if afterwards some order
 * remains in which every sequence gets all it may ever need from what is free and from what those before it hand back.
 */

/** One sequence; numbers per lane. */
export interface PageClaim {
  /** Pages that come back when it ends. */
  held: number[];
  /** Pages it may still ask for. */
  need: number[];
}

export function isSafe(available: readonly number[], claims: readonly PageClaim[]): boolean {
  const free = [...available];
  let pending = [...claims];
  while (pending.length > 0) {
    const stuck: PageClaim[] = [];
    for (const claim of pending) {
      if (claim.need.every((need, lane) => need <= free[lane]!)) claim.held.forEach((held, lane) => { free[lane]! += held; });
      else stuck.push(claim);
    }
    if (stuck.length === pending.length) return false;
    pending = stuck;
  }
  return true;
}
