import { TplaError } from '../errors.js';
import type { KvArena, KvMessageReceiver, Nixl } from '../native/types.js';
import { deviceOf, LinkLanding, LinkReach } from './link_path.js';
import type { Welcome } from './path.js';

/** Of the UCX under a NIXL without one, or with one that cannot be asked. */
export const UNKNOWN_UCX = 'unknown';

/** What both sides have to agree on. */
export interface NixlAbility {
  backends: string[];
  /** Of the UCX under its backend of that name. */
  ucxVersion: string;
}

export const nixlAbility = ({ backends, ucx }: Pick<Nixl, 'backends' | 'ucx'>): NixlAbility => ({ backends: backends.map(({ name }) => name), ucxVersion: ucx?.version ?? UNKNOWN_UCX });

/** Decode reads KV through NIXL into its pages. */
export function nixlLanding(nixl: Nixl, receiver: KvMessageReceiver): LinkLanding {
  return new LinkLanding(receiver, (key) => ({ path: 'nixl', ...nixlAbility(nixl), address: receiver.address, key }));
}

/** Prefill makes rows and tells decode of them through NIXL. */
export async function reachOverNixl(nixl: Nixl, source: KvArena, { layout, offer }: Welcome): Promise<LinkReach> {
  if (offer.path !== 'nixl') throw new TplaError('INTERNAL', `a NIXL path was built from an offer of ${offer.path}`);
  return new LinkReach('nixl', await nixl.connect({ address: offer.address, key: offer.key, layout, ...deviceOf(source) }));
}
