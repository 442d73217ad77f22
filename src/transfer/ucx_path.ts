import { TplaError } from '../errors.js';
import type { KvArena, KvMessageReceiver, Ucx } from '../native/types.js';
import { deviceOf, LinkLanding, LinkReach } from './link_path.js';
import type { Welcome } from './path.js';

/** UCX promises that what travels is understood within a release series. */
export function sameUcxSeries(a: string, b: string): boolean {
  const series = (version: string) => version.split('.').slice(0, 2).join('.');
  return series(a) === series(b);
}

/** Decode takes KV from UCX into its pages. */
export function ucxLanding(ucx: Ucx, receiver: KvMessageReceiver): LinkLanding {
  return new LinkLanding(receiver, (key) => ({ path: 'ucx', version: ucx.version, address: receiver.address, key }));
}

/** Prefill sends rows through UCX, by the best transport that both hosts have. */
export async function reachOverUcx(ucx: Ucx, source: KvArena, { layout, offer }: Welcome): Promise<LinkReach> {
  if (offer.path !== 'ucx') throw new TplaError('INTERNAL', `a UCX path was built from an offer of ${offer.path}`);
  return new LinkReach('ucx', await ucx.connect({ address: offer.address, key: offer.key, layout, ...deviceOf(source) }));
}
