// Builds the addon through cmake-js; a failure ends with one text that says what to install.
import { spawnSync } from 'node:child_process';
import { availableParallelism } from 'node:os';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const missing = ['cmake', 'make', 'g++'].filter((tool) => spawnSync(tool, ['--version'], { stdio: 'ignore' }).error);
if (missing.length > 0) {
  console.error(`tpla's addon cannot be built: ${missing.join(', ')} not found. On Debian or Ubuntu:\n  sudo apt-get install -y cmake g++ make`);
  process.exit(1);
}
const build = spawnSync('npx', ['--no-install', 'cmake-js', 'compile', '--parallel', String(Math.min(availableParallelism(), 16))], { cwd: root, stdio: 'inherit' });
process.exit(build.status ?? 1);
