import { TplaError } from '../errors.js';

export interface NumberRange {
  min?: number;
  max?: number;
  /** The minimum itself is not allowed. */
  above?: boolean;
  integer?: boolean;
}

/** Refuses a request for one of its fields. */
export function invalid(param: string, message: string): TplaError {
  return new TplaError('REQUEST_INVALID', message, { param });
}

/** A value as it may appear in an error message. */
export function shown(value: unknown): string {
  const text = typeof value === 'number' ? String(value) : JSON.stringify(value) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}

/** Reads the fields of a JSON object. A field that is absent or null is undefined; one of the wrong type or range is refused by its name. */
export class Fields {
  readonly #object: Record<string, unknown>;
  readonly #path: string;
  readonly #read = new Set<string>();

  /** `path` names the object inside the request; '' is the request itself. */
  constructor(value: unknown, path = '') {
    if (typeof value !== 'object' || value === null || Array.isArray(value)) {
      const what = `must be a JSON object; got ${shown(value)}`;
      if (path !== '') throw invalid(path, `${path} ${what}`);
      throw new TplaError('REQUEST_INVALID', value === undefined
        ? 'the request has no body; send a JSON object with content-type: application/json' : `the request body ${what}`);
    }
    this.#object = value as Record<string, unknown>;
    this.#path = path;
  }

  path(name: string): string {
    return this.#path === '' ? name : `${this.#path}.${name}`;
  }

  raw(name: string): unknown {
    this.#read.add(name);
    return (Object.hasOwn(this.#object, name) ? this.#object[name] : undefined) ?? undefined;
  }

  string(name: string): string | undefined {
    return this.#typed(name, 'string', 'a string') as string | undefined;
  }

  boolean(name: string): boolean | undefined {
    return this.#typed(name, 'boolean', 'true or false') as boolean | undefined;
  }

  number(name: string, range: NumberRange = {}): number | undefined {
    const value = this.#typed(name, 'number', range.integer ? 'a whole number' : 'a number') as number | undefined;
    if (value !== undefined) checkRange(this.path(name), value, range);
    return value;
  }

  oneOf<T extends string>(name: string, allowed: readonly T[]): T | undefined {
    const value = this.raw(name);
    if (value === undefined || (allowed as readonly unknown[]).includes(value)) return value as T | undefined;
    throw invalid(this.path(name), `${this.path(name)} must be one of ${allowed.map(shown).join(', ')}; got ${shown(value)}`);
  }

  object(name: string): Fields | undefined {
    const value = this.raw(name);
    return value === undefined ? undefined : new Fields(value, this.path(name));
  }

  array(name: string): unknown[] | undefined {
    const value = this.raw(name);
    if (value === undefined || Array.isArray(value)) return value as unknown[] | undefined;
    throw invalid(this.path(name), `${this.path(name)} must be an array; got ${shown(value)}`);
  }

  names(): string[] {
    return Object.keys(this.#object);
  }

  required<T>(name: string, value: T | undefined): T {
    if (value === undefined) throw invalid(this.path(name), `${this.path(name)} is required`);
    return value;
  }

  /** Refuses the first field that nothing has asked for, so that a misspelt one is not silently without effect. */
  refuseOthers(): void {
    const unknown = this.names().find((name) => !this.#read.has(name));
    if (unknown !== undefined) throw invalid(this.path(unknown), `unrecognized request argument: ${this.path(unknown)}`);
  }

  #typed(name: string, type: string, words: string): unknown {
    const value = this.raw(name);
    if (value === undefined || typeof value === type) return value;
    throw invalid(this.path(name), `${this.path(name)} must be ${words}; got ${shown(value)}`);
  }
}

function checkRange(path: string, value: number, { min = -Infinity, max = Infinity, above = false, integer = false }: NumberRange): void {
  // JSON text such as 1e999 parses to Infinity
  const inside = Number.isFinite(value) && value <= max && (above ? value > min : value >= min);
  if (inside && (!integer || Number.isSafeInteger(value))) return;
  const kind = integer ? 'a whole number' : 'a number';
  const lower = above ? `above ${min}` : `at least ${min}`;
  const bounds = [...(min === -Infinity ? [] : [lower]), ...(max === Infinity ? [] : [`at most ${max}`])].join(' and ');
  throw invalid(path, `${path} must be ${kind}${bounds === '' ? '' : ` ${bounds}`}; got ${shown(value)}`);
}
