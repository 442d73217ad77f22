import { closeSync } from 'node:fs';
import { TplaError } from '../../errors.js';
import type { PoolConfig } from '../../config/types.js';
import { parseAddress } from '../../http/address.js';
import { createHttpServer, listen, removeStaleSocket } from '../../http/server.js';
import type { PoolHello, PoolState } from '../../kv/pool_protocol.js';
import { native } from '../../native/loader.js';
import type { Channel, ChannelServer } from '../../native/types.js';
import { addRoleEndpoints, type RoleStatus } from '../endpoints.js';
import type { RoleContext, RunningRole } from '../role.js';
import { BlockPool, type PoolNative } from './block_pool.js';
import { poolMetrics } from './metrics.js';
import { addPoolRoutes } from './server.js';

const MAX_BODY_BYTES = 64 << 20;

/** Serves a memory of blocks to the workers of this host. */
export async function startPool(config: PoolConfig, context: RoleContext, addon: PoolNative = native()): Promise<RunningRole> {
  const { log } = context;
  const app = createHttpServer({ log, maxBodyBytes: MAX_BODY_BYTES });
  const { path } = config.nvme;
  const pool = new BlockPool(addon, config.dram_bytes, path === null ? null : { config: { ...config.nvme, path }, log });
  let status: RoleStatus = 'starting';
  let channels: ChannelServer | undefined;
  const open = new Set<Channel>();
  const metrics = poolMetrics(pool);
  addPoolRoutes(app, pool);
  addRoleEndpoints(app, {
    status: () => status,
    metrics: () => metrics,
    state: (): PoolState => ({
      role: 'kv-pool', id: config.id, channel: config.channel_listen, draining: status === 'draining',
      clients: pool.clients, bytes: pool.memory.bytes, layout: pool.layout, pages: pool.pages, nvme: pool.nvme,
    }),
  });
  async function close(): Promise<void> {
    channels?.close();
    for (const channel of open) channel.close();
    await app.close();
    pool.close();
  }
  try {
    channels = await serveChannels(addon, pool, config.channel_listen, open, context);
    const address = await listen(app, config.listen);
    status = 'ok';
    log.info({ address, channel: config.channel_listen, bytes: config.dram_bytes }, 'kv-pool is ready');
    return {
      addresses: [address],
      // Nothing of the pool is unfinished work: workers go on without it.
      drain: async () => { status = 'draining'; },
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

/** The channel on which a worker gets the memory, and whose end says that the worker is gone. */
async function serveChannels(addon: PoolNative, pool: BlockPool, address: string, open: Set<Channel>, { log }: RoleContext): Promise<ChannelServer> {
  const target = parseAddress(address);
  if (target.kind !== 'unix') throw new TplaError('CONFIG_INVALID', `channel_listen is ${address}; memory is passed over a Unix socket only, write unix:/path`, { param: 'channel_listen' });
  await removeStaleSocket(target.path);
  const clients = new Map<Channel, { token: string; name: string }>();
  return addon.listenChannel(target.path, (channel) => { open.add(channel); }, {
    onMessage(channel, message, fds) {
      fds.forEach((fd) => closeSync(fd));
      try {
        const hello = readHello(message);
        if (clients.has(channel)) throw new TplaError('PROTOCOL', 'hello was said already');
        const answer = pool.join(hello);
        channel.send(Buffer.from(JSON.stringify(answer)), answer.type === 'welcome' ? [pool.memory.fd] : []);
        if (answer.type === 'refused') log.warn({ worker: hello.name, reason: answer.message }, 'a worker was refused');
        else {
          clients.set(channel, { token: answer.client, name: hello.name });
          log.info({ worker: hello.name, pid: channel.peer.pid }, 'a worker has connected');
        }
      } catch (error) {
        log.warn({ pid: channel.peer.pid, reason: (error as Error).message }, 'a channel was closed: bad message');
        channel.close();
      }
    },
    onClose(channel, reason) {
      open.delete(channel);
      const client = clients.get(channel);
      clients.delete(channel);
      if (!client) return;
      pool.leave(client.token);
      log.info({ worker: client.name, reason }, 'a worker is gone; what it pinned is released');
    },
  });
}

function readHello(message: Uint8Array): PoolHello {
  const hello = JSON.parse(Buffer.from(message).toString()) as PoolHello;
  if (hello?.type !== 'hello' || typeof hello.name !== 'string' || typeof hello.layout !== 'object' || hello.layout === null) {
    throw new TplaError('PROTOCOL', 'expected a hello with name and layout');
  }
  return hello;
}
