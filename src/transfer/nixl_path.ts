import { TplaError } from '../errors.js';
import type { KvArena, KvMessageReceiver, Nixl } from '../native/types.js';
import { deviceOf, LinkLanding, LinkReach } from './link_path.js';
import type { Welcome } from './path.js';

/** Decode reads KV through NIXL into its pages. */
export function nixlLanding(nixl: Nixl, receiver: KvMessageReceiver): LinkLanding {
  const backends = nixl.backends.map(({ name }) => name);
  return new LinkLanding(receiver, (key) => ({ path: 'nixl', backends, address: receiver.address, key }));
}

/** Prefill makes rows and tells decode of them through NIXL. */
export async function reachOverNixl(nixl: Nixl, source: KvArena, { layout, offer }: Welcome): Promise<LinkReach> {
  if (offer.path !== 'nixl') throw new TplaError('INTERNAL', `a NIXL path was built from an offer of ${offer.path}`);
  return new LinkReach('nixl', await nixl.connect({ address: offer.address, key: offer.key, layout, ...deviceOf(source) }));
}
