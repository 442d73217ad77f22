import type { PrefillConfig } from '../../config/types.js';
import { PageSpace } from '../../kv/page_space.js';
import { PoolClient } from '../../kv/pool_client.js';
import { native } from '../../native/loader.js';
import type { NativeModule } from '../../native/types.js';
import { createHandoffSender } from '../../transfer/sender.js';
import { openLinkLibraries } from '../../transfer/libraries.js';
import { PROTOCOL } from '../../transfer/types.js';
import { loadModel } from '../model.js';
import type { RoleContext, RunningRole } from '../role.js';
import { startWorkerRole, type ServingWorker } from '../worker_role.js';
import { workerState } from '../worker_state.js';
import { prefillMetrics } from './metrics.js';
import { addPrefillRoutes } from './server.js';
import { PrefillWorker } from './worker.js';

/** Serves prefill: computes prompts and pushes their KV to decode workers. */
export function startPrefill(config: PrefillConfig, context: RoleContext): Promise<RunningRole> {
  return startWorkerRole({ listen: config.listen, addRoutes: addPrefillRoutes, load: () => loadPrefill(config, context, native()) }, context);
}

async function loadPrefill(config: PrefillConfig, { log, clock }: RoleContext, addon: NativeModule): Promise<ServingWorker<PrefillWorker>> {
  // Canonical: exact attention over unsharded KV, whatever decode makes of it.
  const model = loadModel({ ...config, attention: { form: 'mla', ranks: 1 } }, addon);
  const { arena, spec, identity } = model;
  const { layout } = arena;
  const { require_path: requirePath } = config.transfer;
  const libraries = await openLinkLibraries(config.transfer, log).catch((error: unknown) => {
    model.close();
    throw error;
  });
  const sender = createHandoffSender({ handshake: { protocol: PROTOCOL, identity, layout }, arena, log, clock, ucx: libraries.ucx, nixl: libraries.nixl, ...(requirePath === null ? {} : { requirePath }) });
  const store = config.pool === null ? null : new PoolClient({ address: config.pool, name: config.id, layout, addon, log });
  await store?.ready;
  const space = new PageSpace(layout, config.kv.pages);
  const worker = new PrefillWorker({
    identity, arena, space, engine: model.engine, sender, store, clock, log, createSampler: (params) => new addon.Sampler(params),
  }, {
    vocabSize: spec.vocabSize, contextLength: spec.contextLength, capacityTokens: space.capacityTokens,
    chunkTokens: config.chunk_tokens, maxBatchTokens: config.max_batch_tokens, maxWaiting: config.max_waiting,
  });
  return {
    worker,
    addresses: [],
    metrics: prefillMetrics(worker, space, store),
    state: () => workerState('prefill', config.id, identity, arena, space, worker),
    async close() {
      await worker.close();
      await sender.close();
      libraries.close();
      await store?.close();
      model.close();
    },
  };
}
