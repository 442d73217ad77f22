/** `tpla route`: the OpenAI endpoint in front of a fleet of prefill and decode workers. */
import type { FastifyInstance } from 'fastify';
import type { RouteConfig } from '../../config/types.js';
import { createHttpServer, listen } from '../../http/server.js';
import { addRoleEndpoints } from '../endpoints.js';
import type { RoleContext, RunningRole } from '../role.js';
import { addModelEndpoints } from './model_endpoints.js';
import { Router } from './router.js';
import { routerState } from './state.js';
import { addTextEndpoints } from './text_endpoints.js';

/** Resolves when it listens and has asked every worker once. Workers may be missing then, and come later. */
export async function startRouter(config: RouteConfig, context: RoleContext): Promise<RunningRole> {
  const router = new Router(config, context);
  await router.registry.start();
  const servers: FastifyInstance[] = [];
  const closeServers = () => Promise.all(servers.map((app) => app.close()));
  const addresses: string[] = [];
  try {
    for (const address of config.listen) {
      const app = createHttpServer({
        log: context.log,
        maxBodyBytes: config.max_body_bytes,
        onError: (error, request) => router.metrics.failed(request.routeOptions.url ?? 'unknown', error.code),
      });
      servers.push(app);
      addTextEndpoints(app, router);
      addModelEndpoints(app, router);
      addRoleEndpoints(app, { status: () => router.status, state: () => routerState(router), metrics: () => router.metrics.registry });
      addresses.push(await listen(app, address));
    }
  } catch (thrown) {
    await closeServers();
    await router.close();
    throw thrown;
  }
  return {
    addresses,
    drain: () => router.drain(),
    async close() {
      await router.close();
      await closeServers();
    },
  };
}
