#!/usr/bin/env node
import { existsSync } from 'node:fs';
import { execute } from '@oclif/core';

if (!existsSync(new URL('../dist/commands', import.meta.url))) {
  process.stderr.write('tpla is not built yet: run `npm ci` (or `npm run build`) in its directory first.\n');
  process.exit(69);
}
await execute({ dir: import.meta.url });
