import { TplaError } from '../../errors.js';
import type { AttentionPath, AttentionTarget } from '../../native/attention.js';
import { readShapes } from './files.js';
import { PRESETS, presetShapes, type PresetName } from './presets.js';
import { onPath, shapeFromFields, type AttentionShape } from './shape.js';

/** Shape flags as typed; a list separated by commas stands for each of its values. */
export type ShapeFlags = Record<string, string | boolean | undefined>;

/** Shapes of all presets and files, then those of the flags, every combination of their lists. Throws USAGE where none is named. */
export function selectShapes(presets: string[], files: string[], flags: ShapeFlags, path: AttentionPath): AttentionShape[] {
  const shapes = [...presets.flatMap((name) => presetShapes(name as PresetName)), ...files.flatMap(readShapes), ...flagShapes(flags)];
  if (shapes.length === 0) {
    throw new TplaError('USAGE', `name what to run: --preset ${Object.keys(PRESETS).join('|')}, --shapes FILE, or a shape such as --heads 128 --batch 1,32 --kv-len 8192`);
  }
  return path === 'auto' ? shapes : shapes.map((shape) => onPath(shape, path));
}

/** `gpu`, `gpu:1` or `cpu`. */
export function parseTarget(text: string, threads: number): AttentionTarget {
  if (text === 'cpu') return { kind: 'cpu', threads };
  const index = /^gpu(?::(\d+))?$/.exec(text);
  if (index === null) throw new TplaError('USAGE', `--device ${text}: expected gpu, gpu:N or cpu`);
  return { kind: 'gpu', index: Number(index[1] ?? 0) };
}

function flagShapes(flags: ShapeFlags): AttentionShape[] {
  let combinations: Record<string, string | boolean>[] = [{}];
  for (const [flag, value] of Object.entries(flags)) {
    if (value === undefined) continue;
    const name = flag.replaceAll('-', '_');
    const values = typeof value === 'string' ? value.split(',').map((one) => one.trim()) : [value];
    combinations = combinations.flatMap((fields) => values.map((one) => ({ ...fields, [name]: one })));
  }
  if (Object.keys(combinations[0] as object).length === 0) return [];
  return combinations.map((fields) => shapeFromFields(fields, 'shape of the flags'));
}
