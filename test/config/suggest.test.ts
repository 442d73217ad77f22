import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { editDistance, nearest } from '../../src/config/suggest.js';

test('edit distance counts insertions, deletions, substitutions and neighbours swapped', () => {
  const cases: [string, string, number][] = [['', '', 0], ['', 'ab', 2], ['kv', 'kv', 0], ['pages', 'page', 1], ['listen', 'litsen', 1], ['model', 'modal', 1], ['abc', 'xyz', 3], ['kitten', 'sitting', 3]];
  for (const [a, b, distance] of cases) {
    assert.is(editDistance(a, b), distance, `${a} → ${b}`);
    assert.is(editDistance(b, a), distance, `${b} → ${a}`);
  }
});

test('only a near word is suggested', () => {
  const words = ['listen', 'model', 'model_name', 'log_level'];
  assert.is(nearest('litsen', words), 'listen');
  assert.is(nearest('modelname', words), 'model_name');
  assert.is(nearest('Model', words), 'model');
  assert.is(nearest('temperature', words), null);
});

test.run();
