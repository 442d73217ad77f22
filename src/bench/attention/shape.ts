import { nearest } from '../../config/suggest.js';
import { TplaError } from '../../errors.js';
import type { AttentionPath, AttentionProblem } from '../../native/attention.js';

interface ShapeBase {
  heads: number;
  /** Per sequence; kvLens counts the query tokens too. */
  qLens: number[];
  kvLens: number[];
  causal: boolean;
  path: AttentionPath;
}

/** Absorbed decode: every head reads the same rows of `latent + rope` values. */
export interface DecodeShape extends ShapeBase {
  kind: 'decode';
  latent: number;
  rope: number;
  page: number;
  kvDType: 'bf16' | 'fp8' | 'f32';
  /** With TPLA's logit factor per head. */
  latentScale: boolean;
}

/** Un-absorbed prefill: every head has keys and values of its own. */
export interface PrefillShape extends ShapeBase {
  kind: 'prefill';
  keyDim: number;
  valueDim: number;
}

export type AttentionShape = DecodeShape | PrefillShape;

/** A shape as files and flags write it: the columns of a results file. Lengths of several sequences are joined with `;`. */
export type ShapeFields = Record<string, unknown>;

const DECODE_FIELDS = ['kind', 'kv_dtype', 'latent', 'rope', 'heads', 'batch', 'kv_len', 'kv_lens', 'q_tokens', 'q_lens', 'page', 'causal', 'latent_scale', 'path'];
const PREFILL_FIELDS = ['kind', 'key_dim', 'value_dim', 'heads', 'batch', 'kv_len', 'kv_lens', 'q_tokens', 'q_lens', 'causal', 'path'];
export const SHAPE_FIELDS = [...new Set([...DECODE_FIELDS, ...PREFILL_FIELDS])];

/** Throws REQUEST_INVALID; `where` names the flag list or the file and row. Empty fields count as absent. */
export function shapeFromFields(fields: ShapeFields, where: string): AttentionShape {
  const given = Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== '' && value !== null && value !== undefined));
  const fail = (message: string): never => {
    throw new TplaError('REQUEST_INVALID', `${where}: ${message}`);
  };
  const reader = new FieldReader(given, fail);
  const kind = reader.choice('kind', ['decode', 'prefill'], 'decode');
  const known = kind === 'decode' ? DECODE_FIELDS : PREFILL_FIELDS;
  const strange = Object.keys(given).find((name) => !known.includes(name));
  if (strange !== undefined) {
    const near = nearest(strange, known);
    fail(`a ${kind} shape has no field ${strange}${near === null ? `; it has ${known.join(', ')}` : `; did you mean ${near}?`}`);
  }
  const lengths = sequenceLengths(reader, kind, fail);
  const common = { ...lengths, causal: reader.flag('causal', true), path: reader.choice('path', ['auto', 'sm90', 'sm80'], 'auto') };
  if (kind === 'prefill') {
    return { kind, heads: reader.integer('heads', 128), ...common, keyDim: reader.integer('key_dim', 192), valueDim: reader.integer('value_dim', 128) };
  }
  return {
    kind,
    heads: reader.integer('heads', 128),
    ...common,
    latent: reader.integer('latent', 512),
    rope: reader.integer('rope', 64),
    page: reader.integer('page', 64),
    kvDType: reader.choice('kv_dtype', ['bf16', 'fp8', 'f32'], 'bf16'),
    latentScale: reader.flag('latent_scale', false),
  };
}

/** The fields a results file names a shape with; reading them back gives the same shape. */
export function fieldsOfShape(shape: AttentionShape): Record<string, string | number | boolean> {
  const uniform = (lens: number[]) => lens.every((len) => len === lens[0]);
  const lengths: Record<string, string | number> = { batch: shape.kvLens.length };
  if (uniform(shape.kvLens)) lengths.kv_len = shape.kvLens[0] as number;
  else lengths.kv_lens = shape.kvLens.join(';');
  if (uniform(shape.qLens)) lengths.q_tokens = shape.qLens[0] as number;
  else lengths.q_lens = shape.qLens.join(';');
  if (shape.kind === 'prefill') {
    return { kind: shape.kind, key_dim: shape.keyDim, value_dim: shape.valueDim, heads: shape.heads, ...lengths, causal: shape.causal, path: shape.path };
  }
  return {
    kind: shape.kind, kv_dtype: shape.kvDType, latent: shape.latent, rope: shape.rope, heads: shape.heads, ...lengths,
    page: shape.page, causal: shape.causal, latent_scale: shape.latentScale, path: shape.path,
  };
}

/** Equal for shapes whose times can be compared: the work is the same, whatever the page size or kernel. */
export function workOfShape(shape: AttentionShape): string {
  const width = shape.kind === 'decode' ? [shape.kvDType, shape.latent, shape.rope] : [shape.keyDim, shape.valueDim];
  const causal = shape.kind === 'decode' && shape.qLens.every((len) => len <= 1) ? true : shape.causal;
  return [shape.kind, ...width, shape.heads, shape.qLens.join(';'), shape.kvLens.join(';'), causal].join(' ');
}

/** Short enough for an error message or a label. */
export function describeShape(shape: AttentionShape): string {
  const span = (lens: number[]) => (lens.every((len) => len === lens[0]) ? String(lens[0]) : `${Math.min(...lens)}..${Math.max(...lens)}`);
  const dims = shape.kind === 'decode' ? `latent ${shape.latent}+${shape.rope} ${shape.kvDType}` : `${shape.keyDim}/${shape.valueDim}${shape.causal ? ' causal' : ''}`;
  return `${shape.kind} ${dims}, ${shape.heads} heads, ${shape.kvLens.length} × ${span(shape.kvLens)}, ${span(shape.qLens)} query tokens`;
}

export function problemOfShape(shape: AttentionShape): AttentionProblem {
  const common = {
    heads: shape.heads, qLens: Int32Array.from(shape.qLens), kvLens: Int32Array.from(shape.kvLens), causal: shape.causal, path: shape.path, queryScale: 1,
  };
  if (shape.kind === 'prefill') return { kind: shape.kind, ...common, keyDim: shape.keyDim, valueDim: shape.valueDim };
  return {
    kind: shape.kind, ...common, latent: shape.latent, rope: shape.rope, pageTokens: shape.page, pageGapBytes: 0, kvDType: shape.kvDType, latentScale: shape.latentScale,
  };
}

function sequenceLengths(reader: FieldReader, kind: 'decode' | 'prefill', fail: (message: string) => never): { qLens: number[]; kvLens: number[] } {
  const listed = reader.lengths('kv_lens');
  const each = reader.optionalInteger('kv_len', 0);
  const batch = reader.optionalInteger('batch', 1);
  if (listed === undefined && each === undefined) fail('give kv_len, or kv_lens for sequences of different lengths');
  if (listed !== undefined && batch !== undefined && batch !== listed.length) fail(`batch is ${batch}, but kv_lens has ${listed.length} lengths`);
  const kvLens = listed ?? Array<number>(batch ?? 1).fill(each as number);
  const qListed = reader.lengths('q_lens');
  if (qListed !== undefined && qListed.length !== kvLens.length) fail(`q_lens has ${qListed.length} lengths for ${kvLens.length} sequences`);
  const qTokens = reader.optionalInteger('q_tokens', 0);
  // A prefill without query lengths is a whole prompt.
  const qLens = qListed ?? (qTokens === undefined && kind === 'prefill' ? kvLens : kvLens.map(() => qTokens ?? 1));
  return { qLens, kvLens };
}

class FieldReader {
  constructor(private readonly fields: ShapeFields, private readonly fail: (message: string) => never) {}

  integer(name: string, absent: number): number {
    return this.optionalInteger(name, 1) ?? absent;
  }

  optionalInteger(name: string, least: number): number | undefined {
    const value = this.fields[name];
    return value === undefined ? undefined : this.toInteger(name, value, least);
  }

  lengths(name: string): number[] | undefined {
    const value = this.fields[name];
    if (value === undefined) return undefined;
    const items: unknown[] = Array.isArray(value) ? value : String(value).split(';');
    return items.map((item) => this.toInteger(name, item, 0));
  }

  flag(name: string, absent: boolean): boolean {
    const value = this.fields[name] ?? absent;
    if (typeof value === 'boolean') return value;
    const meaning = ({ true: true, '1': true, false: false, '0': false } as Record<string, boolean>)[String(value)];
    return meaning ?? this.fail(`${name} is ${JSON.stringify(value)}; it takes true or false`);
  }

  choice<T extends string>(name: string, choices: readonly T[], absent: T): T {
    const value = this.fields[name] ?? absent;
    return choices.find((choice) => choice === value) ?? this.fail(`${name} is ${JSON.stringify(value)}; it takes ${choices.join(', ')}`);
  }

  private toInteger(name: string, value: unknown, least: number): number {
    const number = typeof value === 'number' ? value : /^\d+$/.test(String(value).trim()) ? Number(value) : NaN;
    return Number.isInteger(number) && number >= least ? number : this.fail(`${name} is ${JSON.stringify(value)}; it takes an integer of at least ${least}`);
  }
}
