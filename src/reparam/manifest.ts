import { basename } from 'node:path';
import type { Checkpoint } from '../model/checkpoint.js';
import { sharedWidths } from '../model/shared_widths.js';
import type { BasisKind } from './basis.js';
import type { CalibrationOptions, CalibrationText } from './calibration.js';
import type { Journal } from './journal.js';
import type { Method } from './method.js';
import type { WidthChoice } from './width_choice.js';

/** What is known of one converted layer. */
export interface LayerRecord {
  layer: number;
  /** Width of its shared subspace; the whole latent where the layer is left as published. */
  shared: number;
  /** SHA-256 of the layer's new tensors; empty where there are none. */
  hash: string;
  /** Where the layer's basis started from. */
  basis: BasisKind;
  /** W_UK cut, or the logits regressed on a rank's columns. */
  queries: Method['queries'];
  /** Whether descent lowered the error on held-out calibration sequences and was kept. */
  descended: boolean;
  /** Share of the calibration latents' variance in the shared subspace and in each rank's slice; null without calibration. */
  variance_shares: { shared: number; slices: number[] } | null;
  norm_scale: number[] | null;
  /** ‖attention output − exact‖² / ‖exact‖² on held-out calibration sequences. */
  output_error: number | null;
  /** What fitted the layer; devices differ by rounding. */
  fitted_on: string;
}

export const MANIFEST = 'tpla.json';

/** Writes `tpla.json`: how the checkpoint was made, for people and for audits. Nothing is read back from it. */
export function writeManifest(
  journal: Journal,
  made: { source: Checkpoint; text: CalibrationText | null; fingerprint: string; layers: LayerRecord[]; method: Method; methodName: string; groups: number; calibration: CalibrationOptions | null; widths: number[]; choice: WidthChoice | null },
): void {
  const { source, text, calibration, method, groups, methodName, fingerprint, layers, widths, choice } = made;
  const manifest = {
    format: 1,
    fingerprint,
    source: { name: source.identity.name, fingerprint: source.identity.fingerprint },
    method: { name: methodName, groups, ...method, shared: sharedWidths(widths) },
    width_choice: choice,
    calibration: text === null ? null : { file: basename(text.file), sha256: text.hash, sequences: text.sequences.length, context: calibration!.context, queries_per_sequence: text.queries, seed: calibration!.seed },
    layers,
  };
  journal.writeText(MANIFEST, `${JSON.stringify(manifest, null, 2)}\n`);
}
