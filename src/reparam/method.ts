import { TplaError } from '../errors.js';
import { rankColumns } from '../model/shared_widths.js';
import { CALIBRATED_BASES, type BasisKind } from './basis.js';

/** How a layer's decode weights are made. Every part can be chosen alone; `METHODS` are the named combinations. */
export interface Method {
  /** `best`: per layer, the calibrated basis, with queries cut or regressed, whose closed forms leave the least output error on held-out sequences. */
  basis: BasisKind | 'best';
  /** Directions replicated on every rank, like the rope key. */
  shared: number;
  /**
   * Factor on a rank's logits. `printed` is α_i = variance of slice i / total variance, the published formula; `reciprocal` its inverse;
   * `fitted` least squares, one per rank; `head` least squares, one per rank and head.
   */
  scale: 'none' | 'printed' | 'reciprocal' | 'fitted' | 'head';
  /** Regress the whole absorbed logit on a rank's columns (subsumes every scale) instead of cutting W_UK. */
  queries: 'sliced' | 'regressed';
  /** Regress the exact head value on all ranks' outputs instead of cutting W_UV. */
  values: 'sliced' | 'ridge';
  /** Steps of descent on the layer's output error after that; 0 for none. */
  refine: number;
  /** `first`: only rank 0's columns are used, with the heads split over the ranks: plain low rank at the same bytes. */
  ranks: 'all' | 'first';
  norm: 'exact' | 'sliced';
}

const PUBLISHED: Method = { basis: 'pca', shared: 0, scale: 'none', queries: 'sliced', values: 'sliced', refine: 0, ranks: 'all', norm: 'exact' };

export const METHODS: Record<string, Method> = {
  identity: { ...PUBLISHED, basis: 'identity' },
  hadamard: { ...PUBLISHED, basis: 'hadamard' },
  pca: PUBLISHED,
  'low-rank': { ...PUBLISHED, basis: 'pca', ranks: 'first' },
  default: { ...PUBLISHED, basis: 'aware', queries: 'regressed', values: 'ridge', refine: 1200 },
};

export function needsCalibration(method: Method): boolean {
  return method.basis === 'best' || CALIBRATED_BASES.includes(method.basis) || method.scale === 'fitted' || method.scale === 'head' || method.scale === 'printed' || method.scale === 'reciprocal'
    || method.queries === 'regressed' || method.values === 'ridge' || method.refine > 0 || method.norm === 'sliced';
}

/** Ranks keep weights of their own wherever they are more than the columns of kv_b_proj. With a sliced norm, α is the norm's. */
export function hasRankWeights(method: Method): boolean {
  const scaled = method.scale !== 'none' && !(method.norm === 'sliced' && isPublishedScale(method));
  return scaled || method.queries !== 'sliced' || method.values !== 'sliced' || method.refine > 0 || method.ranks === 'first';
}

/** α of the paper, or its reciprocal. */
export function isPublishedScale(method: Method): boolean {
  return method.scale === 'printed' || method.scale === 'reciprocal';
}

/** Descent moves the basis, which is then no longer orthogonal. */
export function hasTransform(method: Method): boolean {
  return method.basis === 'aware-oblique' || method.basis === 'best' || method.refine > 0;
}

export interface MethodShape {
  groups: number;
  kvLoraRank: number;
}

/** Width of the columns one rank caches. */
export function rankWidth(method: Method, { groups, kvLoraRank }: MethodShape): number {
  return rankColumns(kvLoraRank, method.shared, groups);
}

/** Throws USAGE with everything that does not fit together. */
export function validateMethod(method: Method, { groups, kvLoraRank }: MethodShape): void {
  const problems: string[] = [];
  if (groups < 2) problems.push(`${groups} group: TPLA slices over at least 2`);
  if (method.shared >= kvLoraRank) problems.push(`a shared subspace of ${method.shared} leaves nothing of the latent's ${kvLoraRank} to slice`);
  else if ((kvLoraRank - method.shared) % groups !== 0) {
    problems.push(`the latent's ${kvLoraRank} less the shared ${method.shared} is not divisible by ${groups} groups`);
  }
  if (method.norm === 'sliced' && (hasTransform(method) || method.shared > 0)) {
    problems.push('a sliced norm needs an orthogonal basis without a shared subspace (identity, hadamard, pca)');
  }
  if (method.queries === 'regressed' && method.scale !== 'none') problems.push('regressed queries already contain every scale; choose one of them');
  if (problems.length > 0) throw new TplaError('USAGE', `this reparameterisation is not possible:\n${problems.map((problem) => `  ${problem}`).join('\n')}`);
}
