/** Which of decode's offers prefill takes up: policy, no I/O. */
import { TplaError } from '../errors.js';
import type { PathOffer } from './messages.js';
import { PATHS, type TransferPath } from './types.js';
import { sameUcxSeries } from './ucx_path.js';

/** What prefill can do itself. */
export interface PathAbilities {
  /** Its pages are in GPU memory. */
  onGpu: boolean;
  /** Version of its UCX, where it uses one. */
  ucxVersion: string | null;
}

export interface RankedOffers {
  /** In the order to try them. */
  usable: PathOffer[];
  passedOver: { path: PathOffer['path']; reason: string }[];
}

/** Decode lists its offers best first; that order is kept. Throws HANDSHAKE_REFUSED where nothing is left, with the reason for each. */
export function rankOffers(offers: PathOffer[], abilities: PathAbilities, required: TransferPath | undefined): RankedOffers {
  const passedOver: RankedOffers['passedOver'] = [];
  const able = offers.filter((offer) => {
    const reason = unusable(offer, abilities);
    if (reason !== null) passedOver.push({ path: offer.path, reason });
    return reason === null;
  });
  const usable = able.filter((offer) => !isKnownSlower(offer, required));
  if (usable.length > 0) return { usable, passedOver };
  const [best] = able;
  const what = best ? `the path to decode is ${best.path}, at least ${required} is required` : 'decode offers no path that can be used';
  const why = passedOver.map(({ path, reason }) => `${path}: ${reason}`).join('; ');
  throw new TplaError('HANDSHAKE_REFUSED', `${what}${why === '' ? '' : ` (${why})`}; see docs/transfer.md for what each path needs`);
}

/** Throws HANDSHAKE_REFUSED for a path slower than the one asked for. */
export function checkPath(path: TransferPath, required: TransferPath | undefined): void {
  if (!isSlower(path, required)) return;
  throw new TplaError('HANDSHAKE_REFUSED', `the path to decode is ${path}, at least ${required} is required; see docs/transfer.md for what each path needs`);
}

function unusable(offer: PathOffer, { onGpu, ucxVersion }: PathAbilities): string | null {
  if (isBetweenHosts(offer.path) && onGpu) return 'KV in GPU memory goes to workers of the same host (unix: addresses); between hosts it has to be in host memory';
  if (offer.path !== 'ucx') return null;
  if (ucxVersion === null) return 'this side uses no UCX (transfer.ucx)';
  if (!sameUcxSeries(ucxVersion, offer.version)) return `UCX ${ucxVersion} on this side and ${offer.version} on decode's; install the same release series on both`;
  return null;
}

/** Memory of this host may turn out to be a better path than its offer's name; checkPath sees it when it is open. */
function isKnownSlower(offer: PathOffer, required: TransferPath | undefined): boolean {
  return isBetweenHosts(offer.path) && isSlower(offer.path, required);
}

const isBetweenHosts = (path: PathOffer['path']): path is 'tcp' | 'ucx' => path === 'tcp' || path === 'ucx';

function isSlower(path: TransferPath, required: TransferPath | undefined): boolean {
  return required !== undefined && PATHS.indexOf(path) > PATHS.indexOf(required);
}
