import type { RoleConfigs, RoleName } from '../config/types.js';
import type { StartRole } from './run.js';

type Loaders = { [R in RoleName]: () => Promise<StartRole<RoleConfigs[R]>> };

/** Each role's code is loaded by the command that serves it, and by no other. */
const LOADERS: Loaders = {
  prefill: async () => (await import('./prefill/index.js')).startPrefill,
  decode: async () => (await import('./decode/index.js')).startDecode,
  pool: async () => (await import('./pool/index.js')).startPool,
  route: async () => (await import('./router/index.js')).startRouter,
};

export function loadRole<R extends RoleName>(role: R): Promise<StartRole<RoleConfigs[R]>> {
  return LOADERS[role]();
}
