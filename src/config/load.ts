import { readFileSync } from 'node:fs';
import { basename, dirname, resolve } from 'node:path';
import { LineCounter, parseDocument } from 'yaml';
import { TplaError } from '../errors.js';
import { parseAddress } from '../http/address.js';
import { readVariables, unknownVariables } from './env.js';
import { fromLmcache, isLmcacheFile } from './lmcache.js';
import { decodeSchema } from './schemas/decode.js';
import { poolSchema } from './schemas/pool.js';
import { prefillSchema } from './schemas/prefill.js';
import { routeSchema } from './schemas/route.js';
import type { Schema } from './schemas/schema.js';
import { envName, fromText, settingsOf, type Setting } from './settings.js';
import { nearest } from './suggest.js';
import type { RoleConfigs, RoleName } from './types.js';
import { validate, type ConfigProblem } from './validate.js';

export const ROLE_SCHEMAS: Record<RoleName, Schema> = {
  prefill: prefillSchema,
  decode: decodeSchema,
  pool: poolSchema,
  route: routeSchema,
};

export interface ConfigSources {
  /** YAML file, if one is given. */
  file?: string;
  /** Values of flags by flag name, as typed. */
  flags?: Record<string, string | string[] | undefined>;
  env?: Record<string, string | undefined>;
  /** Takes lines about a file that was written for something else. */
  note?: (line: string) => void;
}

/** Flags over environment over file over defaults. Throws CONFIG_INVALID with every problem at once. */
export function loadRoleConfig<R extends RoleName>(role: R, sources: ConfigSources): RoleConfigs[R] {
  const schema = ROLE_SCHEMAS[role];
  const settings = settingsOf(schema);
  const fromFile = sources.file === undefined ? {} : readRoleFile(role, sources.file, sources.note);
  if (sources.file !== undefined) resolvePaths(fromFile, schema, dirname(resolve(sources.file)));
  const origins = new Map<string, string>();
  for (const setting of settings) {
    const override = fromFlag(setting, sources.flags ?? {}) ?? fromEnvironment(setting, sources.env);
    if (override === undefined) continue;
    setAt(fromFile, setting.path, override.value);
    origins.set(setting.path.join('.'), override.origin);
  }
  return finishRoleConfig(role, fromFile, {
    where: sources.file ?? `${role} configuration`,
    origins,
    problems: unknownVariableProblems(sources.env),
  });
}

/** A file of ours, or one of LMCache's that means this role. */
function readRoleFile(role: RoleName, file: string, note: ConfigSources['note']): Record<string, unknown> {
  const values = readYamlMapping(file);
  if ((role !== 'prefill' && role !== 'decode') || !isLmcacheFile(values)) return values;
  const translation = fromLmcache(role, values, Object.keys(ROLE_SCHEMAS[role].properties ?? {}), file);
  translation.lines.forEach((line) => note?.(line));
  return translation.values;
}

function finishRoleConfig<R extends RoleName>(
  role: R, values: Record<string, unknown>,
  report: { where: string; origins?: Map<string, string>; problems?: ConfigProblem[] },
): RoleConfigs[R] {
  const problems = [...checkRoleConfig(role, values), ...(report.problems ?? [])];
  if (problems.length > 0) throw configError(report.where, problems, report.origins);
  return inOrder(ROLE_SCHEMAS[role], values) as unknown as RoleConfigs[R];
}

/** Keys in the schema's order, which is the one to read a printed configuration in. */
function inOrder(schema: Schema, values: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(schema.properties ?? {}).map(([key, child]) => [
    key, child.properties ? inOrder(child, values[key] as Record<string, unknown>) : values[key],
  ]));
}

/** Validates in place, fills in defaults and what follows from other keys. With no problem, `values` is a RoleConfigs[role]. */
export function checkRoleConfig(role: RoleName, values: Record<string, unknown>): ConfigProblem[] {
  const problems = validate(ROLE_SCHEMAS[role], values);
  return problems.length > 0 ? problems : derive(role, values);
}

export function configError(where: string, problems: ConfigProblem[], origins: Map<string, string> = new Map()): TplaError {
  const lines = problems.map(({ path, message }) => `${path === '' ? 'the file' : path}: ${message}${origins.has(path) ? ` (from ${origins.get(path)})` : ''}`);
  if (lines.length === 1) return new TplaError('CONFIG_INVALID', `${where}: ${lines[0]}`);
  return new TplaError('CONFIG_INVALID', `${where} has ${lines.length} errors:\n${lines.map((line) => `  ${line}`).join('\n')}`);
}

/** A YAML file whose top level is a mapping. Throws CONFIG_INVALID naming the line, or IO_FAILED. */
export function readYamlMapping(file: string): Record<string, unknown> {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (cause) {
    throw new TplaError('CONFIG_INVALID', `cannot read the configuration file ${file}: ${(cause as Error).message}`, { cause });
  }
  const lines = new LineCounter();
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false });
  if (document.errors.length > 0) {
    throw configError(file, document.errors.map((error) => {
      const { line, col } = lines.linePos(error.pos[0]);
      return { path: `line ${line}, column ${col}`, message: error.message.split('\n')[0] as string };
    }));
  }
  const value: unknown = document.toJS();
  if (value === null || value === undefined) return {};
  if (typeof value !== 'object' || Array.isArray(value)) throw new TplaError('CONFIG_INVALID', `${file}: expected a mapping of keys to values, found ${Array.isArray(value) ? 'a list' : JSON.stringify(value)}`);
  return value as Record<string, unknown>;
}

/** Makes relative paths of a file absolute, from the file's directory. */
export function resolvePaths(values: Record<string, unknown>, schema: Schema, base: string): void {
  for (const [key, child] of Object.entries(schema.properties ?? {})) {
    const value = values[key];
    if (child.path && typeof value === 'string' && value !== '') values[key] = resolve(base, value);
    else if (child.properties && typeof value === 'object' && value !== null) resolvePaths(value as Record<string, unknown>, child, base);
  }
}

interface Override {
  value: unknown;
  origin: string;
}

function fromFlag(setting: Setting, flags: Record<string, string | string[] | undefined>): Override | undefined {
  const typed = flags[setting.flag];
  if (typed === undefined) return undefined;
  const value = Array.isArray(typed) ? typed.flatMap((one) => fromText(setting.schema, one)) : fromText(setting.schema, typed);
  return { value: absolute(setting, value), origin: `--${setting.flag}` };
}

function fromEnvironment(setting: Setting, env: Record<string, string | undefined> | undefined): Override | undefined {
  const text = readVariables([setting.env], env).get(setting.env);
  return text === undefined ? undefined : { value: absolute(setting, fromText(setting.schema, text)), origin: `environment ${setting.env}` };
}

function absolute(setting: Setting, value: unknown): unknown {
  return setting.schema.path && typeof value === 'string' && value !== '' ? resolve(value) : value;
}

function setAt(target: Record<string, unknown>, path: string[], value: unknown): void {
  const [key, ...rest] = path as [string, ...string[]];
  if (rest.length === 0) {
    target[key] = value;
    return;
  }
  if (typeof target[key] !== 'object' || target[key] === null) target[key] = {};
  setAt(target[key] as Record<string, unknown>, rest, value);
}

function unknownVariableProblems(env: Record<string, string | undefined> | undefined): ConfigProblem[] {
  const known = Object.values(ROLE_SCHEMAS).flatMap((schema) => settingsOf(schema).map(({ flag }) => envName(flag)));
  return unknownVariables(known, env).flatMap((name) => {
    const near = nearest(name, known);
    return near === null ? [] : [{ path: `environment ${name}`, message: `unknown variable; did you mean ${near}?` }];
  });
}

/** A second socket that stands beside `listen` unless it is configured. */
const SIDE_SOCKETS: Partial<Record<RoleName, { key: string; suffix: string }>> = {
  decode: { key: 'handoff_listen', suffix: 'handoff' },
  pool: { key: 'channel_listen', suffix: 'channel' },
};

/** Fills in defaults that follow from other keys; `values` are valid by themselves. */
function derive(role: RoleName, values: Record<string, unknown>): ConfigProblem[] {
  if (typeof values.model === 'string') values.model_name ??= basename(values.model);
  const side = SIDE_SOCKETS[role];
  if (side === undefined || values[side.key] !== undefined) return [];
  const listen = parseAddress(values.listen as string);
  if (listen.kind !== 'unix') return [{ path: side.key, message: 'missing: it has no default where `listen` is no Unix socket' }];
  const address = `unix:${listen.path.replace(/\.sock$/, '')}.${side.suffix}.sock`;
  try {
    parseAddress(address);
  } catch (error) {
    return [{ path: side.key, message: (error as Error).message }];
  }
  values[side.key] = address;
  return [];
}
