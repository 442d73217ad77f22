import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { execa } from 'execa';
import { childEnvironment } from '../config/env.js';
import { TplaError } from '../errors.js';
import { loadCheckpoint } from '../model/checkpoint.js';
import type { KvForm } from '../native/types.js';

const TPLA = fileURLToPath(new URL('../../bin/tpla.js', import.meta.url));

/** Regression alone, without the descent that `tpla reparam` would go on with: a fraction of its time, most of its accuracy. */
const QUICK = ['--refine', '0', '--calibration-tokens', '16384'];

export interface DemoCheckpoint {
  dir: string;
  /** How its latent was prepared for the ranks, or null where it is as published. */
  reparam: string | null;
}

export interface CheckpointWish {
  model: string;
  attention: KvForm;
  ranks: number;
}

/**
 * A checkpoint that decodes well in the wished form: TPLA over several ranks wants one whose latent is reparameterised for that many,
 * which is made in `directory` unless the model is one. Throws CANCELLED after a signal.
 */
export async function prepareCheckpoint({ model, attention, ranks }: CheckpointWish, directory: string, stopping: AbortSignal, onWork: () => void): Promise<DemoCheckpoint> {
  const { spec } = loadCheckpoint(model);
  if (spec.tpla !== null) return { dir: model, reparam: `${spec.tpla.groups} groups` };
  if (attention !== 'tpla' || ranks === 1) return { dir: model, reparam: null };
  onWork();
  const out = join(directory, 'model');
  const made = await execa(process.execPath, [TPLA, 'reparam', model, out, '--groups', String(ranks), ...QUICK, '--json'], {
    reject: false, cancelSignal: stopping, stdin: 'ignore', env: childEnvironment(), extendEnv: false,
  });
  if (stopping.aborted) throw new TplaError('CANCELLED', 'stopped while the checkpoint was being prepared');
  if (made.exitCode !== 0) throw new TplaError('INTERNAL', `tpla reparam ended with status ${made.exitCode}: ${String(made.stderr).trim()}`);
  const { method, groups } = JSON.parse(made.stdout) as { method: string; groups: number };
  return { dir: out, reparam: `method ${method} without descent, ${groups} groups` };
}
