import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { formatCsv, parseCsv } from '../../src/report/csv.js';

test('quotes where a cell needs them, and reads them back', () => {
  const text = formatCsv(['a', 'b,c'], [{ a: 'x "y"', 'b,c': 1 }, { a: 'two\nlines', 'b,c': null }, { a: '', 'b,c': true }]);
  assert.is(text, 'a,"b,c"\n"x ""y""",1\n"two\nlines",\n,true\n');
  assert.equal(parseCsv(text), [['a', 'b,c'], ['x "y"', '1'], ['two\nlines', ''], ['', 'true']]);
});

test('reads Windows line endings, blank lines and a last line without an end', () => {
  assert.equal(parseCsv('a,b\r\n\r\n1,2\r\n3,'), [['a', 'b'], ['1', '2'], ['3', '']]);
  assert.equal(parseCsv(''), []);
});

test.run();
