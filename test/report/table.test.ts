import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { formatCount, formatMs } from '../../src/report/format.js';
import { facts, table } from '../../src/report/table.js';

test('columns under a heading, numbers to the right, no rules, no trailing blanks', () => {
  assert.is(table(['name', 'ms', ''], [['prefill', 12, 'exact'], ['decode', 3.5, '']], ['left', 'right']), [
    'name      ms',
    'prefill   12  exact',
    'decode   3.5',
  ].join('\n'));
});

test('facts, one a line', () => {
  assert.is(facts([['model', 'demo'], ['context length', 4096]]), 'model           demo\ncontext length  4096');
});

test('numbers', () => {
  assert.equal([0.1234, 9.99, 12.34, 99.96, 123.4].map(formatMs), ['0.12 ms', '9.99 ms', '12.3 ms', '100.0 ms', '123 ms']);
  assert.equal([0, 999, 70272, 1e6].map(formatCount), ['0', '999', '70,272', '1,000,000']);
});

test.run();
