import type { RouteConfig } from '../config/types.js';
import { TplaError } from '../errors.js';
import { formatAddress, parseAddress } from '../http/address.js';

export type WorkerRole = 'prefill' | 'decode';

export interface WorkerAddress {
  role: WorkerRole;
  address: string;
}

/** The workers that the configuration names, decode first. Throws CONFIG_INVALID for a list that is empty and an address that stands twice. */
export function workersFromConfig({ prefill, decode }: Pick<RouteConfig, 'prefill' | 'decode'>): WorkerAddress[] {
  const workers: WorkerAddress[] = [];
  const owner = new Map<string, string>();
  for (const [role, addresses] of [['decode', decode], ['prefill', prefill]] as const) {
    if (addresses.length === 0) throw new TplaError('CONFIG_INVALID', `${role}: names no worker; list at least one address`, { param: role });
    addresses.forEach((text, i) => {
      const address = formatAddress(parseAddress(text));
      const at = `${role}[${i}]`;
      if (owner.has(address)) throw new TplaError('CONFIG_INVALID', `${at}: ${address} stands already at ${owner.get(address)}; name each worker once`, { param: at });
      owner.set(address, at);
      workers.push({ role, address });
    });
  }
  return workers;
}
