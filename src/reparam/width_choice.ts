/** Which widths of the shared subspace layers may take, and which of them together lose least within a budget of bytes. */
import { TplaError } from '../errors.js';
import { rankColumns } from '../model/shared_widths.js';

/** What layers and ranks have in common. */
export interface WidthShape {
  layers: number;
  groups: number;
  kvLoraRank: number;
  qkRopeHeadDim: number;
}

/** Bytes of cache per token and rank, all layers, in bf16; and the widths a layer may take, ascending. */
export interface WidthBudget {
  bytesPerToken: number;
  candidates: number[];
}

/** Latent columns beside a rope key of 64 for which there are decode kernels (docs/kernels.md). */
const KERNEL_COLUMNS = [128, 256, 288, 320, 512];
const KERNEL_ROPE = 64;
/** Keeps rows of other shapes, which are decoded on CPUs, aligned for the transfer kernels. */
const STEP = 16;

/**
 * Widths to choose from: where a rank's columns can be those of a kernel, only such; else multiples of 16 up to half of the latent. The whole
 * latent is always among them: it leaves a layer exact.
 */
export function candidateWidths({ groups, kvLoraRank, qkRopeHeadDim }: WidthShape): number[] {
  const isPossible = (shared: number) => Number.isInteger(shared) && shared >= 0 && shared < kvLoraRank && (kvLoraRank - shared) % groups === 0;
  const ofKernels = qkRopeHeadDim === KERNEL_ROPE ? KERNEL_COLUMNS.map((columns) => (columns * groups - kvLoraRank) / (groups - 1)).filter(isPossible) : [];
  const steps = Array.from({ length: Math.floor(kvLoraRank / 2 / STEP) + 1 }, (_, i) => i * STEP).filter(isPossible);
  return [...(ofKernels.length > 0 ? ofKernels : steps), kvLoraRank];
}

/** Throws USAGE where a width cannot be. */
export function checkCandidates(candidates: number[], { groups, kvLoraRank }: WidthShape): void {
  const bad = candidates.find((shared) => shared > kvLoraRank || (kvLoraRank - shared) % groups !== 0);
  if (bad !== undefined) throw new TplaError('USAGE', `a shared width of ${bad} is not possible: the latent's ${kvLoraRank} less it must divide by ${groups} groups`);
}

/** Bytes of a bf16 cache per token and rank with these widths, one a layer. */
export function widthBytes(widths: readonly number[], { groups, kvLoraRank, qkRopeHeadDim }: Omit<WidthShape, 'layers'>): number {
  return widths.reduce((sum, shared) => sum + (rankColumns(kvLoraRank, shared, groups) + qkRopeHeadDim) * 2, 0);
}

/** The widest candidate that every layer can have within the budget; throws USAGE where none is. */
export function uniformWidth({ bytesPerToken, candidates }: WidthBudget, shape: WidthShape): number {
  const everywhere = (shared: number) => widthBytes(new Array<number>(shape.layers).fill(shared), shape);
  const fitting = candidates.filter((shared) => everywhere(shared) <= bytesPerToken);
  if (fitting.length > 0) return Math.max(...fitting);
  const least = Math.min(...candidates);
  throw new TplaError('USAGE', `no slicing over ${shape.groups} groups stays within ${bytesPerToken} bytes per token; ${least === 0 ? 'without a shared subspace' : `with the narrowest, ${least},`} it is ${everywhere(least)}`);
}

/** What was chosen and why; part of the manifest. */
export interface WidthChoice {
  budget_bytes_per_token: number;
  candidates: number[];
  /** Of each layer. */
  shared: number[];
  /** The one width that fits everywhere, which the choice was compared with. */
  uniform: number;
  /** Of closed forms, in decode, on sequences that neither fit nor choice have seen. */
  kl: { chosen: number; uniform: number };
  /** [layer][candidate], on which the choice rests. */
  losses: number[][];
}

/**
 * One candidate a layer so that the losses add up to the least within the budget: exact, by dynamic programming over what is spent. Of
 * choices that lose the same, one that takes fewer bytes.
 *
 * @param losses [layer][candidate]
 */
export function chooseWidths(losses: readonly (readonly number[])[], { bytesPerToken, candidates }: WidthBudget, shape: WidthShape): number[] {
  const costs = candidates.map((shared) => widthBytes([shared], shape));
  const unit = costs.reduce(gcd, costs[0]!);
  const most = Math.floor(bytesPerToken / unit);
  // least[b]: what the layers so far lose at best with exactly b units; taken[layer][b]: the last of them's candidate in that.
  let least = new Float64Array(most + 1).fill(Infinity);
  least[0] = 0;
  const taken = losses.map((ofLayer) => {
    const next = new Float64Array(most + 1).fill(Infinity);
    const choice = new Int32Array(most + 1).fill(-1);
    for (const [candidate, loss] of ofLayer.entries()) {
      const cost = costs[candidate]! / unit;
      for (let spent = cost; spent <= most; spent++) {
        const total = least[spent - cost]! + loss;
        if (total < next[spent]!) {
          next[spent] = total;
          choice[spent] = candidate;
        }
      }
    }
    least = next;
    return choice;
  });
  let spent = least.indexOf(Math.min(...least));
  if (!Number.isFinite(least[spent]!)) uniformWidth({ bytesPerToken, candidates }, shape);
  const widths: number[] = [];
  for (const choice of taken.reverse()) {
    const candidate = choice[spent]!;
    widths.unshift(candidates[candidate]!);
    spent -= costs[candidate]! / unit;
  }
  return widths;
}

function gcd(a: number, b: number): number {
  return b === 0 ? a : gcd(b, a % b);
}
