import { readFileSync } from 'node:fs';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { README, withTables } from '../scripts/readme_tables.js';

test('the tables are those of the code; `npx tsx scripts/readme_tables.ts` writes them', async () => {
  const text = readFileSync(README, 'utf8');
  assert.is(text, await withTables(text), 'run `npx tsx scripts/readme_tables.ts`');
});

test.run();
