/** Which of decode's offers prefill takes up: policy, no I/O. */
import { TplaError } from '../errors.js';
import type { PathOffer } from './messages.js';
import { PATHS, type TransferPath } from './types.js';
import { type NixlAbility, UNKNOWN_UCX } from './nixl_path.js';
import { sameUcxSeries } from './ucx_path.js';

/** What prefill can do itself. */
export interface PathAbilities {
  /** Its pages are in GPU memory. */
  onGpu: boolean;
  /** Version of its UCX, where it uses one. */
  ucxVersion: string | null;
  /** Its NIXL, where it uses one. */
  nixl: NixlAbility | null;
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
  const what = best ? `the path to decode is ${best.path}, ${demand(required)} is required` : 'decode offers no path that can be used';
  const why = passedOver.map(({ path, reason }) => `${path}: ${reason}`).join('; ');
  throw new TplaError('HANDSHAKE_REFUSED', `${what}${why === '' ? '' : ` (${why})`}; see docs/transfer.md for what each path needs`);
}

/** Throws HANDSHAKE_REFUSED for a path slower than the one asked for. */
export function checkPath(path: TransferPath, required: TransferPath | undefined): void {
  if (!isSlower(path, required)) return;
  throw new TplaError('HANDSHAKE_REFUSED', `the path to decode is ${path}, ${demand(required)} is required; see docs/transfer.md for what each path needs`);
}

function unusable(offer: PathOffer, { onGpu, ucxVersion, nixl }: PathAbilities): string | null {
  if (offer.path === 'tcp' && onGpu) return 'KV in GPU memory goes to workers of the same host (unix: addresses), or between hosts over UCX or NIXL (transfer.ucx, transfer.nixl)';
  if (offer.path === 'nixl') {
    if (nixl === null) return 'this side uses no NIXL (transfer.nixl)';
    if (!nixl.backends.some((name) => offer.backends.includes(name))) return `NIXL has ${nixl.backends.join(', ')} on this side and ${offer.backends.join(', ')} on decode's (transfer.nixl.backends)`;
    // UCX 1.22 ends its process at the address of a 1.13.
    const versions = [nixl.ucxVersion, offer.ucxVersion];
    if (!versions.includes(UNKNOWN_UCX) && !sameUcxSeries(nixl.ucxVersion, offer.ucxVersion)) return `NIXL has UCX ${versions.join(' under it on this side and ')} on decode's; install the same release series on both`;
  }
  if (offer.path !== 'ucx') return null;
  if (ucxVersion === null) return 'this side uses no UCX (transfer.ucx)';
  if (!sameUcxSeries(ucxVersion, offer.version)) return `UCX ${ucxVersion} on this side and ${offer.version} on decode's; install the same release series on both`;
  return null;
}

/** Memory of this host may turn out to be a better path than its offer's name; checkPath sees it when it is open. */
function isKnownSlower(offer: PathOffer, required: TransferPath | undefined): boolean {
  return required === 'nixl' ? offer.path !== 'nixl' : isBetweenHosts(offer.path) && isSlower(offer.path, required);
}

const isBetweenHosts = (path: PathOffer['path']): path is 'nixl' | 'tcp' | 'ucx' => path === 'nixl' || path === 'tcp' || path === 'ucx';

const demand = (required: TransferPath | undefined) => (required === 'nixl' ? 'nixl and nothing else' : `at least ${required}`);

function isSlower(path: TransferPath, required: TransferPath | undefined): boolean {
  return required === 'nixl' ? path !== 'nixl' : required !== undefined && PATHS.indexOf(path) > PATHS.indexOf(required);
}
