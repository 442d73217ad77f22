import type { Schema } from './schemas/schema.js';

/** One value of a configuration that a flag or an environment variable can set. */
export interface Setting {
  /** Keys from the root, as in the file: ['kv', 'dtype']. */
  path: string[];
  flag: string;
  env: string;
  schema: Schema;
}

/** Every leaf of a schema that names a flag, in the schema's order. */
export function settingsOf(schema: Schema, path: string[] = []): Setting[] {
  return Object.entries(schema.properties ?? {}).flatMap(([key, child]) => {
    const here = [...path, key];
    if (child.flag !== undefined) return [{ path: here, flag: child.flag, env: envName(child.flag), schema: child }];
    return settingsOf(child, here);
  });
}

export function envName(flag: string): string {
  return `TPLA_${flag.replaceAll('-', '_').toUpperCase()}`;
}

/** Text of a flag or variable in the type its schema asks for; text that does not fit is left for validation to name. */
export function fromText(schema: Schema, text: string): unknown {
  if (schema.bytes !== undefined) return text;
  if (Array.isArray(schema.type)) return text === 'none' || text === 'null' ? null : text;
  if (schema.type === 'array') return text.split(',').map((part) => part.trim()).filter((part) => part !== '');
  if (schema.type === 'boolean') return text === 'true' ? true : text === 'false' ? false : text;
  if (schema.type === 'integer' || schema.type === 'number') return /^-?\d+(\.\d+)?$/.test(text) ? Number(text) : text;
  return text;
}
