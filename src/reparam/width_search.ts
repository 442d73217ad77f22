/**
 * Widths of the shared subspace by what decode loses: every layer at every width alone, all others exact, measured as KL on calibration
 * sequences that nothing was fitted on. Losses of layers nearly add up, so the best widths within a budget follow; they are kept where,
 * together and on other such sequences, they lose no more than one width for all layers.
 */
import { existsSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { evaluate } from '../eval/evaluate.js';
import type { Window } from '../eval/windows.js';
import { loadCheckpoint, type Checkpoint } from '../model/checkpoint.js';
import { writeSafetensors } from '../model/safetensors_writer.js';
import type { Tokenizer } from '../model/tokenizer.js';
import type { LayerSample } from '../native/reparam.js';
import type { Weights } from '../native/types.js';
import type { Progress } from '../report/progress.js';
import type { StoredTensor } from './layer_tensors.js';
import type { Method } from './method.js';
import { Overlay } from './overlay.js';
import { reparameteriseLayer, tplaSection, type LayerOptions } from './reparameterise.js';
import { chooseWidths, uniformWidth, type WidthBudget, type WidthChoice, type WidthShape } from './width_choice.js';

/** Loss of each layer at each candidate width, nats per token. */
export interface WidthLosses {
  candidates: number[];
  kl: number[][];
}

export interface WidthSearchOptions {
  source: Checkpoint;
  tokenizer: Tokenizer;
  shape: WidthShape;
  /** Where fitted layers and measurements are kept: what is there is not done again. */
  directory: string;
  /** Closed forms of one layer at one width. */
  fit: (layer: number, shared: number) => Promise<StoredTensor[]>;
  /** The `tpla` section of a checkpoint with these widths. */
  section: (widths: number[]) => object;
  /** Held out of the fit; half of them choose, half confirm. */
  sequences: Int32Array[];
  threads: number;
}

/** Keeps losses, so that a search which was interrupted goes on. */
export interface LossJournal {
  known: (layer: number, shared: number) => number | null;
  keep: (layer: number, shared: number, kl: number) => void;
}

const NO_JOURNAL: LossJournal = { known: () => null, keep: () => {} };

/** Windows that decide, and as many that confirm. */
const MOST_WINDOWS = 8;

export class WidthSearch {
  readonly #options: WidthSearchOptions;
  readonly #deciding: Window[];
  readonly #confirming: Window[];

  constructor(options: WidthSearchOptions) {
    this.#options = options;
    const windows = options.sequences.map((tokens): Window => ({ tokens, prefix: Math.floor(tokens.length / 2) }));
    const half = (parity: number) => windows.filter((_, i) => i % 2 === parity).slice(0, MOST_WINDOWS);
    this.#deciding = half(0);
    this.#confirming = windows.length > 1 ? half(1) : this.#deciding;
  }

  /** Each layer at each width, the others exact. */
  async losses(candidates: number[], progress: Progress, journal: LossJournal = NO_JOURNAL): Promise<WidthLosses> {
    const { layers, kvLoraRank } = this.#options.shape;
    progress.start('measure widths', layers * candidates.length);
    const kl: number[][] = [];
    for (let layer = 0; layer < layers; layer++) {
      const ofLayer: number[] = [];
      for (const shared of candidates) {
        let loss = shared === kvLoraRank ? 0 : journal.known(layer, shared);
        if (loss === null) {
          loss = await this.divergence(this.#alone(layer, shared), this.#deciding);
          journal.keep(layer, shared, loss);
        }
        ofLayer.push(loss);
        progress.advance(1);
      }
      kl.push(ofLayer);
    }
    progress.finish();
    return { candidates, kl };
  }

  async choose(losses: WidthLosses, bytesPerToken: number): Promise<WidthChoice> {
    const { shape } = this.#options;
    const budget: WidthBudget = { bytesPerToken, candidates: losses.candidates };
    const uniform = uniformWidth(budget, shape);
    const everywhere = new Array<number>(shape.layers).fill(uniform);
    const byLayer = chooseWidths(losses.kl, budget, shape);
    const kl = { chosen: await this.divergence(byLayer, this.#confirming), uniform: await this.divergence(everywhere, this.#confirming) };
    const isBetter = kl.chosen <= kl.uniform;
    return { budget_bytes_per_token: bytesPerToken, candidates: losses.candidates, shared: isBetter ? byLayer : everywhere, uniform, kl, losses: losses.kl };
  }

  /** KL to exact MLA in decode with these widths, closed forms, nats per token. */
  async divergence(widths: number[], windows: Window[]): Promise<number> {
    const { source, tokenizer, shape, section, threads } = this.#options;
    const dir = join(this.#options.directory, 'width-model');
    rmSync(dir, { recursive: true, force: true });
    const overlay = new Overlay(source, dir);
    try {
      for (const [layer, shared] of widths.entries()) if (shared < shape.kvLoraRank) overlay.linkLayer(await this.#fitted(layer, shared));
      overlay.finish(section(widths));
      return (await evaluate(loadCheckpoint(dir), tokenizer, windows, { phase: 'decode', form: 'tpla', ranks: shape.groups, dtype: 'bf16', threads })).kl_vs_mla;
    } finally {
      rmSync(dir, { recursive: true });
    }
  }

  #alone(layer: number, shared: number): number[] {
    const { layers, kvLoraRank } = this.#options.shape;
    return Array.from({ length: layers }, (_, index) => (index === layer ? shared : kvLoraRank));
  }

  /** File of a layer's closed forms. */
  async #fitted(layer: number, shared: number): Promise<string> {
    const path = join(this.#options.directory, `width-${String(layer).padStart(4, '0')}-${String(shared).padStart(4, '0')}.safetensors`);
    if (!existsSync(path)) writeSafetensors(path, await this.#options.fit(layer, shared));
    return path;
  }
}

/** What a search fits: the method's closed forms; descent moves all widths alike, and costs most of a conversion. */
export function closedForms(
  source: Checkpoint,
  weights: Weights,
  { method, groups, seed, fit }: Omit<LayerOptions, 'output'>,
  sampleOf: (layer: number) => LayerSample,
): Pick<WidthSearchOptions, 'fit' | 'section'> {
  const closed: Method = { ...method, refine: 0 };
  const statistics = Array.from({ length: source.spec.layers }, () => ({ known: null }));
  return {
    fit: async (layer, shared) => {
      const { tensors } = await reparameteriseLayer(source, weights, layer, sampleOf(layer), { method: { ...closed, shared }, groups, seed, output: 'auto', fit: { ...fit, statistics } });
      weights.release();
      return tensors;
    },
    section: (widths) => tplaSection({ groups, method: closed, widths }, [], '0'.repeat(32)),
  };
}
