/** A role as a process: `role_child.ts ROLE CONFIG_JSON`. */
import type { RoleName } from '../../src/config/types.js';
import { runRole } from '../../src/roles/run.js';
import { loadRole } from '../../src/roles/start.js';

const [name, config] = [process.argv[2] as RoleName, JSON.parse(process.argv[3]!)];
process.exit(await runRole(name, await loadRole(name), config, { supervised: true }).catch((error: Error & { exitStatus?: number }) => {
  process.stderr.write(`${error.stack}\n`);
  return error.exitStatus ?? 70;
}));
