import { TplaError } from '../errors.js';
import type { Checkpoint } from '../model/checkpoint.js';
import { native } from '../native/loader.js';
import type { DecodeItem, Engine, KvArena, KvDType, KvForm, KvLayout, Weights } from '../native/types.js';

export interface RunnerOptions {
  form: KvForm;
  ranks: number;
  dtype: KvDType;
  /** Longest sequence, and how many run side by side. */
  context: number;
  batch: number;
  threads: number;
  /** Test and report only; see EngineOptions. */
  exactSoftmax?: boolean;
}

const PAGE_TOKENS = 64;

/**
 * One model with a canonical arena, filled by exact prefill, and a decode arena in the form under test. What decode reads has gone
 * through the same transfer as in service.
 */
export class Runner {
  readonly #checkpoint: Checkpoint;
  readonly #options: RunnerOptions;
  readonly #weights: Weights;
  readonly #canonical: KvArena;
  readonly #arena: KvArena;
  readonly #prefill: Engine;
  readonly #decode: Engine;
  readonly #pages: number;

  constructor(checkpoint: Checkpoint, options: RunnerOptions) {
    const { spec } = checkpoint;
    if (options.form === 'tpla' && spec.tpla === null) {
      throw new TplaError('REQUEST_INVALID', `${checkpoint.dir} is not reparameterised; TPLA needs the output of \`tpla reparam\``);
    }
    if (options.form === 'tpla' && spec.tpla!.groups !== options.ranks) {
      throw new TplaError('REQUEST_INVALID', `${checkpoint.dir} is reparameterised for ${spec.tpla!.groups} ranks, not ${options.ranks}`);
    }
    const addon = native();
    this.#checkpoint = checkpoint;
    this.#options = options;
    this.#pages = Math.ceil(options.context / PAGE_TOKENS);
    const layout = (form: KvForm, ranks: number): KvLayout => ({
      form, ranks, layers: spec.layers, latent: spec.kvLoraRank, rope: spec.qkRopeHeadDim,
      shared: form === 'tpla' ? spec.tpla!.shared : 0, dtype: options.dtype, pageTokens: PAGE_TOKENS,
    });
    this.#weights = new addon.Weights(checkpoint.files, checkpoint.tensors);
    this.#canonical = new addon.KvArena(layout('mla', 1), this.#pages * options.batch);
    this.#arena = new addon.KvArena(layout(options.form, options.ranks), this.#pages * options.batch);
    this.#prefill = new addon.Engine({ spec, weights: this.#weights, arena: this.#canonical, threads: options.threads });
    this.#decode = new addon.Engine({ spec, weights: this.#weights, arena: this.#arena, threads: options.threads, exactSoftmax: options.exactSoftmax });
  }

  get bytesPerTokenPerRank(): number {
    return this.#arena.bytesPerTokenPerRank;
  }

  /** Exact prefill of whole sequences (at most `batch`); with logits, [tokens, vocab] each. */
  prefill(sequences: Int32Array[], logits: 'none' | 'all'): Promise<Float32Array[]> {
    return this.#prefill.prefill(sequences.map((tokens, slot) => ({ tokens, position: 0, pages: this.#canonicalPages(slot), logits })));
  }

  /** Hands the first `counts[i]` tokens of each prefilled sequence over to decode. */
  async handOver(counts: number[]): Promise<void> {
    const { spec } = this.#checkpoint;
    for (const [slot, count] of counts.entries()) {
      if (count === 0) continue;
      const put = {
        src: this.#canonical, dst: this.#arena, layers: [0, spec.layers] as [number, number], tokens: [0, count] as [number, number],
        srcPages: [this.#canonicalPages(slot)], dstPages: this.#decodePages(slot),
      };
      await native().kvPut(this.#options.form === 'dp' ? { ...put, dstRank: this.#rank(slot) } : put);
    }
  }

  /** One decode step of several sequences; logits [sequences, vocab]. */
  step(items: { slot: number; token: number; position: number }[]): Promise<Float32Array> {
    return this.#decode.decode(items.map(({ slot, token, position }): DecodeItem => ({
      token, position, pages: this.#decodePages(slot), ...(this.#options.form === 'dp' ? { rank: this.#rank(slot) } : {}),
    })));
  }

  close(): void {
    this.#prefill.close();
    this.#decode.close();
    this.#canonical.close();
    this.#arena.close();
    this.#weights.close();
  }

  #rank(slot: number): number {
    return slot % this.#options.ranks;
  }

  #canonicalPages(slot: number): Int32Array {
    return Int32Array.from({ length: this.#pages }, (_, page) => slot * this.#pages + page);
  }

  /** Sequence `slot` owns the same page numbers on every rank; with dcp logical page j is the rank's page ⌊j / ranks⌋. */
  #decodePages(slot: number): Int32Array[] {
    const { form, ranks } = this.#options;
    if (form !== 'dcp') return [this.#canonicalPages(slot)];
    return Array.from({ length: ranks }, (_, rank) => Int32Array.from({ length: Math.ceil((this.#pages - rank) / ranks) }, (_page, j) => slot * this.#pages + j));
  }
}
