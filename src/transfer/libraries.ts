/** The libraries that a worker carries KV between hosts with, opened once for its life. */
import type { Logger } from 'pino';
import type { NixlConfig, UcxConfig } from '../config/types.js';
import type { Nixl, Ucx } from '../native/types.js';
import { describeNixl, openNixl, ucxUnder } from './nixl.js';
import { describeUcx, openUcx } from './ucx.js';

export interface LinkLibraries {
  ucx: Ucx | null;
  nixl: Nixl | null;
  close(): void;
}

export const NO_LINK_LIBRARIES: LinkLibraries = { ucx: null, nixl: null, close() {} };

/** Says what is used, and what was wanted and is not there. Throws CONFIG_INVALID. */
export async function openLinkLibraries(config: { ucx: UcxConfig; nixl: NixlConfig }, log: Logger): Promise<LinkLibraries> {
  // NIXL first: the loader gives it whichever UCX is in the process already, and it was built for its own.
  const nixl = await openNixl(config.nixl, (reason) => log.info({ reason }, 'NIXL is not used: the best of the other paths carries KV'));
  if (nixl) log.info({ library: nixl.library }, `NIXL ${describeNixl(nixl)}`);
  try {
    const ucx = await openUcx(config.ucx, ucxUnder(nixl));
    if (ucx) log.info({ library: ucx.library }, `UCX ${describeUcx(ucx)}`);
    return {
      ucx, nixl,
      close() {
        nixl?.close();
        ucx?.close();
      },
    };
  } catch (error) {
    nixl?.close();
    throw error;
  }
}
