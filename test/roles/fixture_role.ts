/** A role for the life-cycle tests: what it does is told by its arguments, one `key=value` each. */
import { runRole } from '../../src/roles/run.js';
import { TplaError } from '../../src/errors.js';

const told = Object.fromEntries(process.argv.slice(2).map((word) => word.split('=') as [string, string]));
const sleep = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));
const say = (text: string) => process.stdout.write(`${text}\n`);

const config = { id: 'fixture', log_level: 'info' as const, drain_ms: Number(told.drain_ms ?? 10_000) };

process.exit(await runRole('pool', async () => {
  say('starting');
  await sleep(Number(told.start ?? 0));
  if (told.fail) throw new TplaError('ADDRESS_IN_USE', 'taken');
  if (told.crash) setTimeout(() => { throw new Error('nobody catches this'); }, Number(told.crash));
  if (told.hang) setTimeout(() => { for (;;); }, Number(told.hang));
  say('ready');
  return {
    addresses: ['unix:/fixture.sock'],
    async drain() {
      say('draining');
      await sleep(Number(told.drain ?? 0));
      say('drained');
    },
    async close() { say('closed'); },
  };
}, config, { supervised: told.supervised === 'yes' }).catch((error: TplaError) => error.exitStatus));
