import { readFileSync } from 'node:fs';
import { basename, extname } from 'node:path';
import { parse as parseYaml } from 'yaml';
import { TplaError } from '../../errors.js';
import { parseCsv } from '../../report/csv.js';
import { isResultColumn } from './columns.js';
import type { Comparison } from './run.js';
import { shapeFromFields, workOfShape, type AttentionShape, type ShapeFields } from './shape.js';

/** Shapes of a CSV, YAML or JSON file, whose columns or keys are those of a results file. */
export function readShapes(file: string): AttentionShape[] {
  const rows = readRows(file);
  if (rows.length === 0) throw new TplaError('REQUEST_INVALID', `${file} holds no shape`);
  return rows.map(({ fields, where }) => shapeFromFields(withoutResults(fields), where));
}

/** Rows of `file` measured on `gpu`, or on a GPU the file does not name. */
export function readComparison(file: string, gpu: string): Comparison {
  const rows = readRows(file);
  const ms = new Map<string, number>();
  for (const { fields, where } of rows) {
    const time = fields.ms !== undefined && fields.ms !== '' ? Number(fields.ms) : Number(fields.latency_us) / 1000;
    if (!(time > 0)) throw new TplaError('REQUEST_INVALID', `${where}: a comparison needs a column ms (or latency_us) with a positive time, found ${JSON.stringify(fields.ms ?? fields.latency_us)}`);
    if (fields.gpu !== undefined && fields.gpu !== '' && String(fields.gpu).toLowerCase() !== gpu.toLowerCase()) continue;
    ms.set(workOfShape(shapeFromFields(withoutResults(fields), where)), time);
  }
  return { name: basename(file, extname(file)), ms };
}

interface Row {
  fields: ShapeFields;
  /** For errors: file and line or entry. */
  where: string;
}

function readRows(file: string): Row[] {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (cause) {
    throw new TplaError('IO_FAILED', `cannot read ${file}: ${(cause as Error).message}`, { cause });
  }
  const ending = extname(file).toLowerCase();
  if (ending === '.csv') return csvRows(file, text);
  if (ending === '.yaml' || ending === '.yml' || ending === '.json') return listRows(file, text, ending === '.json');
  throw new TplaError('REQUEST_INVALID', `${file}: expected a file that ends in .csv, .yaml, .yml or .json`);
}

function csvRows(file: string, text: string): Row[] {
  const [head, ...rows] = parseCsv(text);
  if (head === undefined) return [];
  return rows.map((cells, i) => {
    if (cells.length !== head.length) {
      throw new TplaError('REQUEST_INVALID', `${file}: row ${i + 1} has ${cells.length} cells under ${head.length} columns`);
    }
    return { fields: Object.fromEntries(head.map((name, j) => [name.trim(), (cells[j] as string).trim()])), where: `${file}, row ${i + 1}` };
  });
}

/** A list of mappings, or a mapping with such a list under `shapes`. */
function listRows(file: string, text: string, json: boolean): Row[] {
  let value: unknown;
  try {
    value = json ? JSON.parse(text) : parseYaml(text);
  } catch (cause) {
    throw new TplaError('REQUEST_INVALID', `${file}: ${(cause as Error).message.split('\n')[0]}`, { cause });
  }
  const list = isMapping(value) && 'shapes' in value ? value.shapes : value;
  if (!Array.isArray(list)) throw new TplaError('REQUEST_INVALID', `${file}: expected a list of shapes, or one under the key shapes`);
  return list.map((fields: unknown, i) => {
    if (!isMapping(fields)) throw new TplaError('REQUEST_INVALID', `${file}: shape ${i + 1} is no mapping of fields`);
    return { fields, where: `${file}, shape ${i + 1}` };
  });
}

function isMapping(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function withoutResults(fields: ShapeFields): ShapeFields {
  return Object.fromEntries(Object.entries(fields).filter(([name]) => !isResultColumn(name)));
}
