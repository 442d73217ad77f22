/** GET /state of a worker. */
import type { WorkerState } from '../fleet/protocol.js';
import type { PageSpace } from '../kv/page_space.js';
import type { ModelIdentity } from '../model/spec.js';
import type { KvArena } from '../native/types.js';

/** Ids of cached blocks that are told. */
const CACHED_BLOCKS = 4096;

export interface WorkerView {
  contextLength: number;
  draining: boolean;
  running: number;
  waiting: number;
  pendingTokens: number;
}

export function workerState(role: WorkerState['role'], id: string, model: ModelIdentity, arena: KvArena, space: PageSpace, worker: WorkerView): WorkerState {
  const { form, ranks, dtype, pageTokens } = arena.layout;
  return {
    role, id, model,
    context_length: worker.contextLength,
    draining: worker.draining,
    running: worker.running,
    waiting: worker.waiting,
    pending_tokens: worker.pendingTokens,
    pages: space.counts,
    attention: { form, ranks, dtype, kv_bytes_per_token_per_rank: arena.bytesPerTokenPerRank },
    page_tokens: pageTokens,
    cached_blocks: space.recentIds(CACHED_BLOCKS),
  };
}
