#!/usr/bin/env node
import { existsSync } from 'node:fs';

if (!existsSync(new URL('../dist/commands', import.meta.url))) {
  process.stderr.write('tpla is not built yet: run `npm ci` (or `npm run build`) in its directory first.\n');
  process.exit(69);
}
const { main } = await import('../dist/cli/main.js');
await main(import.meta.url);
