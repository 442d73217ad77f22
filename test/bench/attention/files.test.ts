import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { readComparison, readShapes } from '../../../src/bench/attention/files.js';
import { presetShapes } from '../../../src/bench/attention/presets.js';
import { workOfShape } from '../../../src/bench/attention/shape.js';

const test = suite('bench-attention files');
const dir = mkdtempSync(join(tmpdir(), 'tpla-shapes-'));
test.after(() => rmSync(dir, { recursive: true }));

const file = (name: string, text: string): string => {
  writeFileSync(join(dir, name), text);
  return join(dir, name);
};

const ANCHOR = `gpu,batch,heads,kv_len,q_tokens,kv_lens,ms
H100,1,128,32768,1,,0.0604
H200,1,128,32768,1,,0.0548
H100,4,128,,4,4641;45118;1730;1696,0.1216
`;

test('CSV, YAML and JSON give the same shapes; columns of results are passed over', () => {
  const fromCsv = readShapes(file('a.csv', ANCHOR));
  assert.is(fromCsv.length, 3);
  assert.equal(fromCsv[2]?.kind === 'decode' && fromCsv[2].kvLens, [4641, 45118, 1730, 1696]);
  const yaml = 'shapes:\n  - { batch: 1, heads: 128, kv_len: 32768 }\n  - { heads: 128, q_tokens: 4, kv_lens: [4641, 45118, 1730, 1696], ms: 3 }\n';
  const fromYaml = readShapes(file('b.yaml', yaml));
  assert.equal(fromYaml, [fromCsv[0], fromCsv[2]]);
  assert.equal(readShapes(file('c.json', JSON.stringify([{ batch: 1, heads: 128, kv_len: 32768, q_tokens: 1 }]))), [fromCsv[0]]);
});

test("a comparison holds this GPU's rows, and those of no GPU in particular", () => {
  const h100 = readComparison(file('flashmla.csv', ANCHOR), 'H100');
  assert.is(h100.name, 'flashmla');
  assert.equal([...h100.ms.values()], [0.0604, 0.1216]);
  const works = new Set(presetShapes('flashmla').map(workOfShape));
  for (const work of h100.ms.keys()) assert.ok(works.has(work), work);
  assert.is(readComparison(join(dir, 'flashmla.csv'), 'A100').ms.size, 0);
  assert.equal([...readComparison(file('us.csv', 'heads,kv_len,latency_us,mfu\n16,64,20.5,0.1\n'), 'A100').ms.values()], [0.0205]);
});

test('what cannot be read is refused with file and row', () => {
  const refused = (name: string, text: string, read: (path: string) => unknown = readShapes) => {
    try {
      read(file(name, text));
    } catch (error) {
      return (error as Error).message.replace(dir, '');
    }
    return assert.unreachable(name) as never;
  };
  assert.is(refused('a.txt', 'x'), '/a.txt: expected a file that ends in .csv, .yaml, .yml or .json');
  assert.is(refused('empty.csv', 'batch,kv_len\n'), '/empty.csv holds no shape');
  assert.is(refused('short.csv', 'batch,kv_len\n1\n'), '/short.csv: row 1 has 1 cells under 2 columns');
  assert.is(refused('bad.csv', 'batch,kv_len\n1,2\n1,-2\n'), '/bad.csv, row 2: kv_len is "-2"; it takes an integer of at least 0');
  assert.is(refused('scalar.yaml', 'shapes: 3\n'), '/scalar.yaml: expected a list of shapes, or one under the key shapes');
  assert.is(refused('entry.json', '[1]'), '/entry.json: shape 1 is no mapping of fields');
  assert.match(refused('broken.json', '[{'), /^\/broken\.json: /);
  assert.match(refused('untimed.csv', 'kv_len,ms\n5,\n', (path) => readComparison(path, 'H100')), /^\/untimed\.csv, row 1: a comparison needs a column ms/);
  assert.match(refused('x.csv', '', () => readShapes(join(dir, 'absent.csv'))), /^cannot read .*absent\.csv: ENOENT/);
});

test.run();
