import { TplaError } from '../errors.js';
import { parseAddress } from '../http/address.js';
import { native } from '../native/loader.js';
import type { KvStreamReceiver } from '../native/types.js';
import { LinkLanding, LinkReach } from './link_path.js';
import type { Welcome } from './path.js';

/** Four fill 25 Gbit/s with one core each; more help only where a single TCP stream is held back by its window or its core. */
const DATA_CONNECTIONS = 4;

/** Decode reads KV from data connections into its pages. */
export function tcpLanding(receiver: KvStreamReceiver): LinkLanding {
  return new LinkLanding(receiver, (key) => ({ path: 'tcp', port: receiver.port, key }));
}

/** Prefill sends rows over several connections. */
export async function reachOverTcp({ address, layout, offer }: Welcome, connections = DATA_CONNECTIONS): Promise<LinkReach> {
  const target = parseAddress(address);
  if (offer.path !== 'tcp' || target.kind !== 'tcp') throw new TplaError('INTERNAL', `a TCP path was built from an offer of ${offer.path} at ${address}`);
  return new LinkReach('tcp', await native().connectKvStream({ host: target.host, port: offer.port, key: offer.key, connections, layout }));
}
