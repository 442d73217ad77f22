/** A worker as a role: its address is bound first, so that one in use is found before a model is loaded; /health says 503 until it serves. */
import type { FastifyInstance } from 'fastify';
import type { Registry } from 'prom-client';
import { TplaError } from '../errors.js';
import type { WorkerState } from '../fleet/protocol.js';
import { createHttpServer, listen } from '../http/server.js';
import { addRoleEndpoints } from './endpoints.js';
import type { RoleContext, RunningRole } from './role.js';

/** What is there once the model is loaded. */
export interface ServingWorker<W> {
  worker: W & { readonly draining: boolean; drain(): Promise<void> };
  /** Beside `listen`. */
  addresses: string[];
  metrics: Registry;
  state(): WorkerState;
  /** Ends everything but HTTP. */
  close(): Promise<void>;
}

export interface WorkerRoleOptions<W> {
  listen: string;
  addRoutes(app: FastifyInstance, worker: () => W): void;
  load(): Promise<ServingWorker<W>>;
}

const MAX_BODY_BYTES = 64 << 20;

export async function startWorkerRole<W>(options: WorkerRoleOptions<W>, { log }: RoleContext): Promise<RunningRole> {
  const app = createHttpServer({ log, maxBodyBytes: MAX_BODY_BYTES });
  let loaded: ServingWorker<W> | null = null;
  const serving = () => {
    if (!loaded) throw new TplaError('NO_WORKER', 'this worker is still loading its model; wait until /health says ok');
    return loaded;
  };
  options.addRoutes(app, () => serving().worker);
  addRoleEndpoints(app, {
    status: () => (!loaded ? 'starting' : loaded.worker.draining ? 'draining' : 'ok'),
    state: () => serving().state(),
    metrics: () => serving().metrics,
  });
  const address = await listen(app, options.listen);
  try {
    loaded = await options.load();
  } catch (error) {
    await app.close();
    throw error;
  }
  const { worker, addresses, close } = loaded;
  return {
    addresses: [address, ...addresses],
    drain: () => worker.drain(),
    async close() {
      await close();
      await app.close();
    },
  };
}
