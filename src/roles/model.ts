/** What a worker loads before it can serve: checkpoint, KV arena, engine. */
import { TplaError } from '../errors.js';
import { loadCheckpoint } from '../model/checkpoint.js';
import { sharedProblem } from '../model/shared_widths.js';
import type { ModelIdentity, ModelSpec } from '../model/spec.js';
import type { Engine, KvArena, KvLayout, NativeModule } from '../native/types.js';

export type ModelNative = Pick<NativeModule, 'Weights' | 'KvArena' | 'Engine'>;

export interface ModelConfig {
  model: string;
  model_name: string;
  attention: Pick<KvLayout, 'form' | 'ranks'>;
  kv: { dtype: KvLayout['dtype']; page_tokens: number; pages: number };
  threads: number;
}

export interface LoadedModel {
  spec: ModelSpec;
  identity: ModelIdentity;
  arena: KvArena;
  engine: Engine;
  close(): void;
}

export function loadModel(config: ModelConfig, addon: ModelNative): LoadedModel {
  const { spec, identity, files, tensors } = loadCheckpoint(config.model, { name: config.model_name });
  const arena = new addon.KvArena(kvLayout(spec, config), config.kv.pages);
  const weights = new addon.Weights(files, tensors);
  const engine = new addon.Engine({ spec, weights, arena, threads: config.threads });
  return {
    spec, identity, arena, engine,
    close() {
      engine.close();
      weights.close();
      arena.close();
    },
  };
}

/** Throws CONFIG_INVALID where the checkpoint cannot be laid out so. */
export function kvLayout(spec: ModelSpec, { attention: { form, ranks }, kv }: Pick<ModelConfig, 'attention' | 'kv'>): KvLayout {
  const shared = form === 'tpla' ? spec.tpla?.shared ?? 0 : 0;
  if (form === 'tpla' && spec.tpla && ranks !== 1 && ranks !== spec.tpla.groups) {
    throw new TplaError('CONFIG_INVALID', `the checkpoint was reparameterised for ${spec.tpla.groups} groups, attention.ranks is ${ranks}; set it to ${spec.tpla.groups}, or run reparam again`, { param: 'attention.ranks' });
  }
  const misfit = form === 'tpla' ? sharedProblem(shared, { layers: spec.layers, latent: spec.kvLoraRank, groups: ranks }) : null;
  if (misfit !== null) throw new TplaError('CONFIG_INVALID', `attention.ranks is ${ranks}: ${misfit}; choose a divisor`, { param: 'attention.ranks' });
  return { form, ranks, layers: spec.layers, latent: spec.kvLoraRank, rope: spec.qkRopeHeadDim, shared, dtype: kv.dtype, pageTokens: kv.page_tokens };
}

/** The form in which blocks are computed, pooled and sent. */
export function canonicalLayout(layout: KvLayout): KvLayout {
  return { ...layout, form: 'mla', ranks: 1, shared: 0 };
}
