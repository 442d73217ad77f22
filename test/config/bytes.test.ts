import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { formatBytes, parseBytes } from '../../src/config/bytes.js';

test('sizes with decimal and binary units', () => {
  const cases: [string, number | null][] = [
    ['0', 0], ['4096', 4096], ['1B', 1], ['2KB', 2000], ['2KiB', 2048], ['512MiB', 536_870_912], ['2GiB', 2_147_483_648], ['1.5 GB', 1_500_000_000], ['1TiB', 2 ** 40],
    ['', null], ['GiB', null], ['-1', null], ['2 gib', null], ['2G', null], ['1e9', null], ['99999999TiB', null],
  ];
  for (const [text, bytes] of cases) assert.is(parseBytes(text), bytes, text);
});

test('printed in the largest binary unit', () => {
  const cases: [number, string][] = [[0, '0 B'], [1023, '1023 B'], [1024, '1 KiB'], [1536, '1.5 KiB'], [2 ** 30 * 2.25, '2.25 GiB'], [2 ** 40, '1 TiB'], [10 * 2 ** 20, '10 MiB']];
  for (const [bytes, text] of cases) assert.is(formatBytes(bytes), text);
});

test.run();
