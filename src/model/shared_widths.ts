/**
 * Width of the subspace of the latent that every rank holds: one number for all layers, or one for each. Never an array of equal numbers, so
 * that equal widths are written alike everywhere: in checkpoints, on the hand-off channel, in fingerprints.
 */
export type SharedWidths = number | readonly number[];

/** One width a layer, as they are written. */
export function sharedWidths(byLayer: readonly number[]): SharedWidths {
  return byLayer.every((width) => width === byLayer[0]) ? byLayer[0] ?? 0 : [...byLayer];
}

export function sharedIn(shared: SharedWidths, layer: number): number {
  return typeof shared === 'number' ? shared : shared[layer]!;
}

/** Latent columns that one of `groups` ranks holds where `shared` of them lie on all. */
export function rankColumns(latent: number, shared: number, groups: number): number {
  return shared + (latent - shared) / groups;
}

/** What is wrong with widths for a latent cut into `groups` slices; null where nothing is. */
export function sharedProblem(shared: SharedWidths, { layers, latent, groups }: { layers: number; latent: number; groups: number }): string | null {
  const widths = typeof shared === 'number' ? [shared] : shared;
  if (typeof shared !== 'number' && shared.length !== layers) return `${shared.length} shared widths for ${layers} layers`;
  const bad = widths.find((width) => width > latent || (latent - width) % groups !== 0);
  return bad === undefined ? null : `a latent of ${latent} less the shared ${bad} is not divisible by ${groups} groups`;
}

/** `64`, or `0–128` where layers differ. */
export function describeShared(shared: SharedWidths): string {
  return typeof shared === 'number' ? String(shared) : `${Math.min(...shared)}–${Math.max(...shared)}`;
}
