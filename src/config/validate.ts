import { Ajv, type ErrorObject, type SchemaValidateFunction, type ValidateFunction } from 'ajv';
import { parseAddress } from '../http/address.js';
import { parseBytes } from './bytes.js';
import type { Schema } from './schemas/schema.js';
import { settingsOf } from './settings.js';
import { nearest } from './suggest.js';

export interface ConfigProblem {
  /** Dotted, as in the file: `kv.page_tokens`, `decode[1]`. */
  path: string;
  /** What came and what is allowed. */
  message: string;
}

/**
 * Checks `value` against `schema`, fills in defaults and turns sizes into numbers, in place.
 * Returns every problem at once; none means the value has the schema's type.
 */
export function validate(schema: Schema, value: unknown): ConfigProblem[] {
  const check = compiled(schema);
  if (check(value)) return [];
  return (check.errors ?? []).map((error) => describe(error, schema));
}

const cache = new Map<Schema, ValidateFunction>();

function compiled(schema: Schema): ValidateFunction {
  let check = cache.get(schema);
  if (!check) {
    check = newAjv().compile(schema);
    cache.set(schema, check);
  }
  return check;
}

function newAjv(): Ajv {
  const ajv = new Ajv({ allErrors: true, verbose: true, useDefaults: true, strict: true, allowUnionTypes: true });
  ajv.addKeyword({ keyword: 'flag', schemaType: 'string' });
  ajv.addKeyword({ keyword: 'path', schemaType: 'boolean' });
  ajv.addKeyword({ keyword: 'address', type: 'string', schemaType: 'boolean', validate: checkAddress, errors: true });
  ajv.addKeyword({ keyword: 'bytes', schemaType: 'object', modifying: true, validate: checkBytes, errors: true });
  return ajv;
}

const checkAddress: SchemaValidateFunction = (_schema: boolean, text: string) => {
  try {
    parseAddress(text);
    return true;
  } catch (error) {
    checkAddress.errors = [{ keyword: 'address', message: (error as Error).message, params: {} }];
    return false;
  }
};

const checkBytes: SchemaValidateFunction = ({ minimum }: { minimum: number }, value: unknown, _parent, context) => {
  const bytes = typeof value === 'string' ? parseBytes(value) : value;
  if (Number.isSafeInteger(bytes) && (bytes as number) >= minimum) {
    if (context) context.parentData[context.parentDataProperty] = bytes;
    return true;
  }
  checkBytes.errors = [{ keyword: 'bytes', message: `is no size of at least ${minimum} bytes; write a number or a text such as 512MiB, 2GiB, 10GB`, params: {} }];
  return false;
};

function describe(error: ErrorObject, root: Schema): ConfigProblem {
  const path = dotted(error.instancePath);
  const found = show(error.data);
  const params = error.params as Record<string, unknown>;
  switch (error.keyword) {
    case 'additionalProperties': {
      const key = String(params.additionalProperty);
      return { path: join(path, key), message: `unknown key; ${hint(key, error.parentSchema as Schema, root)}` };
    }
    case 'required': {
      const key = String(params.missingProperty);
      const child = (error.parentSchema as Schema).properties?.[key];
      return { path: join(path, key), message: `missing${child ? `: ${lowerFirst(child.description)}` : ''}` };
    }
    case 'type':
      return { path, message: `${found} is not ${article(params.type as string | string[])}` };
    case 'enum':
      return { path, message: `${found} is not one of ${(params.allowedValues as unknown[]).join(', ')}` };
    case 'minimum':
      return { path, message: `${found} is too small; at least ${params.limit} is allowed` };
    case 'maximum':
      return { path, message: `${found} is too large; at most ${params.limit} is allowed` };
    case 'multipleOf':
      return { path, message: `${found} is not a multiple of ${params.multipleOf}` };
    case 'minItems':
      return { path, message: `${found} is too short; at least ${params.limit} ${params.limit === 1 ? 'entry is' : 'entries are'} needed` };
    case 'minLength':
      return { path, message: `${found} is empty` };
    case 'pattern':
      return { path, message: `${found} does not match ${params.pattern}` };
    case 'bytes':
      return { path, message: `${found} ${error.message}` };
    default:
      return { path, message: error.message ?? error.keyword };
  }
}

function hint(key: string, level: Schema, root: Schema): string {
  const keys = Object.keys(level.properties ?? {});
  const near = nearest(key, keys);
  if (near !== null) return `did you mean "${near}"?`;
  // A key that is right but stands at the wrong level, or a flag's name.
  const moved = settingsOf(root).find((setting) => setting.path.at(-1) === key || setting.flag === key || setting.flag.replaceAll('-', '_') === key);
  if (moved) return `did you mean "${moved.path.join('.')}"?`;
  return `allowed: ${keys.join(', ')}`;
}

/** `/decode/1` → `decode[1]`. */
function dotted(pointer: string): string {
  return pointer.split('/').slice(1).map((part) => part.replaceAll('~1', '/').replaceAll('~0', '~'))
    .reduce((path, part) => (/^\d+$/.test(part) ? `${path}[${part}]` : join(path, part)), '');
}

function join(path: string, key: string): string {
  return path === '' ? key : `${path}.${key}`;
}

function show(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 80 ? `${text.slice(0, 77)}...` : text;
}

function article(type: string | string[]): string {
  const names: Record<string, string> = { integer: 'a whole number', number: 'a number', string: 'a text', boolean: 'true or false', object: 'a mapping', array: 'a list', null: 'null' };
  return [type].flat().flatMap((one) => one.split(',')).map((one) => names[one] ?? one).join(' or ');
}

function lowerFirst(text: string): string {
  return text.charAt(0).toLowerCase() + text.slice(1);
}
