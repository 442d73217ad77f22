/** A worker that connects to kv-pool, stores blocks, pins them, reserves more, half writes them, and then stays: `holder.ts POOL_ADDRESS`. */
import { pino } from 'pino';
import { WorkerClient } from '../../../src/http/client.js';
import { PoolClient } from '../../../src/kv/pool_client.js';
import { native } from '../../../src/native/loader.js';
import type { NativeModule } from '../../../src/native/types.js';
import { LAYOUT } from './layout.js';

const address = process.argv[2]!;
const addon = native();
const arena = new addon.KvArena(LAYOUT, 8);
let token = '';
const spy: NativeModule = {
  ...addon,
  connectChannel: (path, handlers) => addon.connectChannel(path, {
    ...handlers,
    onMessage(channel, message, fds) {
      token = (JSON.parse(Buffer.from(message).toString()) as { client: string }).client;
      handlers.onMessage(channel, message, fds);
    },
  }),
};
const pool = new PoolClient({ address, name: 'holder', layout: LAYOUT, addon: spy, log: pino({ level: 'silent' }) });
await pool.ready;
await pool.park([], 200, { arena, pages: [Int32Array.of(0, 1, 2, 3)] });
await new WorkerClient(address).json('POST', '/reserve', { client: token, ids: ['f'.repeat(32), 'e'.repeat(32)], pin: false });
process.stdout.write('holding\n');
setInterval(() => undefined, 1000);
