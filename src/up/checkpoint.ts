import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { execa } from 'execa';
import { configError } from '../config/load.js';
import { childEnvironment } from '../config/env.js';
import type { UpConfig } from '../config/types.js';
import { TplaError } from '../errors.js';
import { loadCheckpoint } from '../model/checkpoint.js';

const TPLA = fileURLToPath(new URL('../../bin/tpla.js', import.meta.url));

/** Arguments of `tpla reparam`. Quick is regression alone, without the descent it would go on with: seconds for a small model, most of the accuracy. */
const EFFORT = { quick: ['--refine', '0', '--calibration-tokens', '16384', '--calibration-queries', '128'], full: [] } as const;

export interface PreparedStack {
  stack: UpConfig;
  /** How the checkpoint's latent was prepared for the ranks, or null where it is as published. */
  reparam: string | null;
}

/**
 * Where the stack asks for it (`reparam`), writes its checkpoint into `directory`, reparameterised for the ranks that its decode services
 * split the latent over, and lets every service use that one. A checkpoint that is reparameterised already stays as it is.
 * Throws CANCELLED after a signal, CONFIG_INVALID where decode services have different ranks.
 */
export async function prepareCheckpoint(stack: UpConfig, where: string, directory: string, stopping: AbortSignal, onWork: (text: string) => void): Promise<PreparedStack> {
  const ranks = tplaRanks(stack, where);
  if (stack.model === null || ranks === null) return { stack, reparam: null };
  const { spec } = loadCheckpoint(stack.model);
  if (spec.tpla !== null) return { stack, reparam: `${spec.tpla.groups} groups` };
  if (stack.reparam === 'none') return { stack, reparam: null };
  onWork(`rotating the latent for ${ranks} ranks`);
  const out = join(directory, 'model');
  const made = await execa(process.execPath, [TPLA, 'reparam', stack.model, out, '--groups', String(ranks), ...EFFORT[stack.reparam], '--json'], {
    reject: false, cancelSignal: stopping, stdin: 'ignore', env: childEnvironment(), extendEnv: false,
  });
  if (stopping.aborted) throw new TplaError('CANCELLED', 'stopped while the checkpoint was being prepared');
  if (made.exitCode !== 0) throw new TplaError('INTERNAL', `tpla reparam ended with status ${made.exitCode}: ${String(made.stderr).trim()}`);
  const { method, groups } = JSON.parse(made.stdout) as { method: string; groups: number };
  return {
    stack: { ...stack, model: out, model_name: stack.model_name ?? basename(stack.model) },
    reparam: `method ${method}${stack.reparam === 'quick' ? ' without descent' : ''}, ${groups} groups`,
  };
}

/** Over how many ranks decode splits the latent; null where it does not. */
function tplaRanks(stack: UpConfig, where: string): number | null {
  const ranks = new Set(Object.values(stack.services)
    .filter(({ role, model }) => role === 'decode' && model === undefined)
    .map(({ attention }) => attention as { form?: unknown; ranks?: unknown } | undefined)
    .filter((attention) => attention?.form === 'tpla' && typeof attention.ranks === 'number' && attention.ranks > 1)
    .map((attention) => attention!.ranks as number));
  if (ranks.size > 1 && stack.reparam !== 'none') {
    throw configError(where, [{ path: 'reparam', message: `decode services split the latent over ${[...ranks].join(' and ')} ranks, but one checkpoint is made for one number; give them a \`model\` each` }]);
  }
  return [...ranks][0] ?? null;
}
