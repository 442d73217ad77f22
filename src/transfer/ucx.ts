/** Which UCX a worker loads, and whether it does. */
import { existsSync, readdirSync } from 'node:fs';
import { setUcxEnvironment } from '../config/env.js';
import type { UcxConfig } from '../config/types.js';
import { TplaError } from '../errors.js';
import { native } from '../native/loader.js';
import type { Ucx, UcxFacts } from '../native/types.js';

/** An installation of its own (HPC-X, /usr/local) before the distribution's. */
const STANDARD_PLACES = [
  '/opt/hpcx/ucx/lib', '/opt/ucx/lib', '/usr/local/ucx/lib', '/usr/local/lib',
  '/usr/lib/x86_64-linux-gnu', '/usr/lib/aarch64-linux-gnu', '/usr/lib64', '/usr/lib',
].map((directory) => `${directory}/libucp.so.0`);

export function findUcx(places: string[] = STANDARD_PLACES): string | null {
  return places.find((file) => existsSync(file)) ?? null;
}

/** Null where it is not used; `present` is one that the process has already. Throws CONFIG_INVALID where it is wanted and cannot be had. */
export async function openUcx({ use, library, options }: UcxConfig, present: string | null = null): Promise<Ucx | null> {
  if (use === 'never' || (use === 'auto' && rdmaDevices().length === 0)) return null;
  const file = library ?? present ?? findUcx();
  if (file === null) {
    if (use === 'auto') return null;
    throw new TplaError('CONFIG_INVALID', `transfer.ucx.use is "always", and no UCX is installed in ${STANDARD_PLACES.join(', ')}; install it (Debian, Ubuntu: apt-get install libucx0) or name its libucp.so in transfer.ucx.library`);
  }
  if (!existsSync(file)) throw new TplaError('CONFIG_INVALID', `transfer.ucx.library names ${file}, which does not exist; name the libucp.so of a UCX installation`);
  setUcxEnvironment(options);
  return native().openUcx(file);
}

/** `1.13.1: rc_mlx5 on mlx5_0:1, tcp on eth0 and lo; RDMA, takes GPU memory`: how a UCX reads in a log line or a table. */
export function describeUcx({ version, resources, rdma, cuda }: Pick<UcxFacts, 'version' | 'resources' | 'rdma' | 'cuda'>): string {
  const devices = new Map<string, string[]>();
  for (const resource of resources) {
    const [transport, device] = resource.split('/') as [string, string | undefined];
    const known = devices.get(transport) ?? [];
    devices.set(transport, device === undefined || known.includes(device) ? known : [...known, device]);
  }
  // Transports inside a host call their only device `memory`.
  const named = [...devices].map(([transport, names]) => (names.length === 0 || names[0]!.startsWith('memory') ? transport : `${transport} on ${names.join(' and ')}`));
  return `${version}: ${named.join(', ')}; ${rdma ? 'RDMA' : 'no RDMA'}, ${cuda ? 'takes GPU memory' : 'host memory only'}`;
}

/** Names of this host's RDMA devices, such as mlx5_0, as the kernel has them. */
export function rdmaDevices(directory = '/sys/class/infiniband'): string[] {
  try {
    return readdirSync(directory).sort();
  } catch {
    return [];
  }
}
