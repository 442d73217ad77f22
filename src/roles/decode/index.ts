import type { DecodeConfig } from '../../config/types.js';
import { parseAddress } from '../../http/address.js';
import { PageSpace } from '../../kv/page_space.js';
import { PoolClient } from '../../kv/pool_client.js';
import { native } from '../../native/loader.js';
import type { NativeModule } from '../../native/types.js';
import { NO_LINK_LIBRARIES, openLinkLibraries } from '../../transfer/libraries.js';
import { createHandoffReceiver } from '../../transfer/receiver.js';
import { PROTOCOL, type HandoffReceiver } from '../../transfer/types.js';
import { canonicalLayout, loadModel } from '../model.js';
import type { RoleContext, RunningRole } from '../role.js';
import { startWorkerRole, type ServingWorker } from '../worker_role.js';
import { workerState } from '../worker_state.js';
import { decodeMetrics } from './metrics.js';
import { addDecodeRoutes } from './server.js';
import { DecodeWorker } from './worker.js';

/** Serves decode: reserves pages, takes KV in, generates. */
export function startDecode(config: DecodeConfig, context: RoleContext): Promise<RunningRole> {
  return startWorkerRole({ listen: config.listen, addRoutes: addDecodeRoutes, load: () => loadDecode(config, context, native()) }, context);
}

async function loadDecode(config: DecodeConfig, { log, clock }: RoleContext, addon: NativeModule): Promise<ServingWorker<DecodeWorker>> {
  const model = loadModel(config, addon);
  const { arena, spec, identity } = model;
  const { layout } = arena;
  let libraries = NO_LINK_LIBRARIES;
  let receiver: HandoffReceiver;
  try {
    if (parseAddress(config.handoff_listen).kind === 'tcp') libraries = await openLinkLibraries(config.transfer, log);
    receiver = await createHandoffReceiver(config.handoff_listen, {
      handshake: { protocol: PROTOCOL, identity, layout }, arena, log, clock, ucx: libraries.ucx, nixl: libraries.nixl, direction: config.handoff_direction,
    });
  } catch (error) {
    libraries.close();
    model.close();
    throw error;
  }
  const store = config.pool === null ? null : new PoolClient({ address: config.pool, name: config.id, layout: canonicalLayout(layout), addon, log });
  await store?.ready;
  const space = new PageSpace(layout, config.kv.pages);
  const worker = new DecodeWorker({
    identity, arena, space, engine: model.engine, receiver, store, clock, log,
    createSampler: (params) => new addon.Sampler(params),
    copyPage: ({ from, to, rank }) => addon.kvCopyPage(arena, from, to, rank),
  }, {
    vocabSize: spec.vocabSize, contextLength: spec.contextLength, capacityTokens: space.capacityTokens,
    maxBatch: config.max_batch, maxWaiting: config.max_waiting, leaseMs: config.lease_ms, firstToken: config.first_token,
  });
  return {
    worker,
    addresses: [receiver.address],
    metrics: decodeMetrics(worker, space, store, receiver),
    state: () => workerState('decode', config.id, identity, arena, space, worker),
    async close() {
      await worker.close();
      await receiver.close();
      libraries.close();
      await store?.close();
      model.close();
    },
  };
}
