import { Flags } from '@oclif/core';
import type { FlagInput } from '@oclif/core/interfaces';
import { ROLE_SCHEMAS } from '../config/load.js';
import type { Schema } from '../config/schemas/schema.js';
import { settingsOf, type Setting } from '../config/settings.js';
import type { RoleName } from '../config/types.js';

/** One flag per setting of a role, so that help, completion and validation all come from its schema. */
export function settingFlags(role: RoleName): FlagInput {
  return Object.fromEntries(settingsOf(ROLE_SCHEMAS[role]).map((setting) => [setting.flag, flagOf(setting)]));
}

/** Values as typed; validation of the whole configuration judges them, so that all errors come at once. */
function flagOf({ schema, path, env }: Setting) {
  const common = { description: `${schema.description} [${path.join('.')}, ${env}]${defaultText(schema)}`, helpValue: valueName(schema) };
  return schema.type === 'array' ? Flags.string({ ...common, multiple: true }) : Flags.string(common);
}

function defaultText(schema: Schema): string {
  if (schema.default === undefined) return '';
  return ` (default ${schema.default === null ? 'none' : String(schema.default)})`;
}

function valueName(schema: Schema): string {
  if (schema.enum) return schema.enum.join('|');
  if (schema.bytes) return 'SIZE';
  if (schema.path) return 'DIR';
  if (schema.address || schema.items?.address) return 'ADDRESS';
  return schema.type === 'integer' || schema.type === 'number' ? 'N' : 'TEXT';
}
