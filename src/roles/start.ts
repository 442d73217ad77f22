import type { RoleConfigs, RoleName } from '../config/types.js';
import type { StartRole } from './run.js';

const ENTRY: Record<RoleName, { module: string; start: string }> = {
  prefill: { module: './prefill/index.js', start: 'startPrefill' },
  decode: { module: './decode/index.js', start: 'startDecode' },
  pool: { module: './pool/index.js', start: 'startPool' },
  route: { module: './router/index.js', start: 'startRouter' },
};

/** Loads a role's code, which only a command that serves it needs. */
export async function loadRole<R extends RoleName>(role: R): Promise<StartRole<RoleConfigs[R]>> {
  const { module, start } = ENTRY[role];
  return ((await import(module)) as Record<string, StartRole<RoleConfigs[R]>>)[start] as StartRole<RoleConfigs[R]>;
}
