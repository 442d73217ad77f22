/** A service for the supervisor's tests: a real role on a Unix socket. Arguments: socket, then `key=value` words of what goes wrong. */
import { existsSync, writeFileSync } from 'node:fs';
import { createHttpServer, listen } from '../../src/http/server.js';
import { TplaError } from '../../src/errors.js';
import { runRole } from '../../src/roles/run.js';

const [socket, ...words] = process.argv.slice(2);
const told = Object.fromEntries(words.map((word) => word.split('=') as [string, string]));
const sleep = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

process.exit(await runRole('pool', async (_config, { log }) => {
  if (told.refuse) throw new TplaError('HANDSHAKE_REFUSED', told.refuse);
  if (told.refuseAgain) {
    if (existsSync(told.refuseAgain)) throw new TplaError('IO_FAILED', 'not a second time');
    writeFileSync(told.refuseAgain, '');
  }
  await sleep(Number(told.start ?? 0));
  const app = createHttpServer({ log, maxBodyBytes: 1024 });
  const began = performance.now();
  app.get('/health', async (_request, reply) => (performance.now() - began < Number(told.unhealthy ?? 0) ? reply.code(503).send() : { status: 'ok' }));
  app.post('/crash', async () => {
    log.error('about to crash');
    setImmediate(() => process.exit(9));
    return {};
  });
  const address = await listen(app, `unix:${socket}`);
  return { addresses: [address], drain: () => sleep(Number(told.drain ?? 0)), close: () => app.close() };
}, { id: told.id ?? 'fixture', log_level: 'info', drain_ms: 10_000 }, { supervised: true }).catch((error: TplaError) => {
  process.stderr.write(`tpla: ${error.code}: ${error.message}\n`);
  return error.exitStatus;
}));
