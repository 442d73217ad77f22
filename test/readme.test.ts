import { readFileSync, readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { README, withTables } from '../scripts/readme_tables.js';

const text = readFileSync(README, 'utf8');

test('the tables are those of the code (npx tsx scripts/readme_tables.ts writes them)', () => {
  assert.is(text, withTables(text));
});

test('every command is listed', () => {
  const commands = readdirSync(fileURLToPath(new URL('../src/commands/', import.meta.url))).map((file) => file.replace(/\.ts$/, ''));
  assert.equal(commands.filter((command) => !text.includes(`\`tpla ${command}\``)), []);
});

test.run();
