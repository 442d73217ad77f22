/** Which NIXL a worker loads, and whether it does. */
import { existsSync, readdirSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { setNixlEnvironment } from '../config/env.js';
import type { NixlConfig } from '../config/types.js';
import { TplaError } from '../errors.js';
import { native } from '../native/loader.js';
import type { Nixl } from '../native/types.js';
import { describeUcx } from './ucx.js';

/** NIXL's own place, then /usr/local and the distribution's. */
const STANDARD_PLACES = [
  ...['x86_64-linux-gnu', 'aarch64-linux-gnu', ''].flatMap((triplet) => ['/opt/nvidia/nvda_nixl', '/usr/local/nixl', '/usr/local', '/usr'].map((prefix) => `${prefix}/lib/${triplet}`)),
  '/opt/nvidia/nvda_nixl/lib64', '/usr/local/nixl/lib64', '/usr/local/lib64', '/usr/lib64',
].map((directory) => `${directory.replace(/\/$/, '')}/libnixl_capi.so`);

/** What the loader finds by itself (LD_LIBRARY_PATH, ld.so.conf). */
export const NIXL_BY_NAME = 'libnixl_capi.so';

/** The library to try: a file of a standard place, else its name. */
export function findNixl(places: string[] = STANDARD_PLACES): string {
  return places.find((file) => existsSync(file)) ?? NIXL_BY_NAME;
}

/** Null where it is not used; `missing` then hears why, of `auto`. Throws CONFIG_INVALID where it is wanted and cannot be had. */
export async function openNixl({ use, library, backends, options }: NixlConfig, missing: (reason: string) => void = () => {}): Promise<Nixl | null> {
  if (use === 'never') return null;
  if (library !== null && !existsSync(library)) {
    throw new TplaError('CONFIG_INVALID', `transfer.nixl.library names ${library}, which does not exist; name the libnixl_capi.so of a NIXL installation`);
  }
  setNixlEnvironment(options);
  try {
    return await native().openNixl(library ?? findNixl(), backends);
  } catch (error) {
    if (use === 'always') throw error;
    missing((error as Error).message);
    return null;
  }
}

/** `1.0.0: UCX (DRAM, VRAM); plug-ins GDS, POSIX, UCX; under it UCX 1.20.0: tcp on eth0; …`: how a NIXL reads in a log line or a table. */
export function describeNixl({ library, backends, plugins, ucx }: Pick<Nixl, 'library' | 'backends' | 'plugins' | 'ucx'>): string {
  const used = backends.map(({ name, memories }) => `${name} (${memories.join(', ')})`).join(', ');
  const under = ucx === null ? '' : `; under it UCX ${describeUcx(ucx)}`;
  return `${nixlVersion(library) ?? 'version unknown'}: ${used === '' ? 'no backend tried' : used}; plug-ins ${plugins.join(', ') || 'none'}${under}`;
}

/** The UCX that a process with this NIXL has to use as well. One under a name of its own, as wheels have it, suffers another beside it. */
export function ucxUnder(nixl: Pick<Nixl, 'ucx'> | null): string | null {
  const file = nixl?.ucx?.library ?? null;
  return file !== null && basename(file).startsWith('libucp.so') ? file : null;
}

/** NIXL's C API does not tell its version; a Python package beside the library does. */
export function nixlVersion(library: string): string | null {
  let directory = dirname(library);
  for (let level = 0; level < 3 && directory !== dirname(directory); level++, directory = dirname(directory)) {
    for (const name of listed(directory)) {
      const version = /^nixl(?:_cu\d+)?-(\d[^-]*)\.dist-info$/.exec(name)?.[1];
      if (version !== undefined) return version;
    }
  }
  return null;
}

function listed(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch {
    return [];
  }
}
