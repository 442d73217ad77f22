import { nearest } from '../../config/suggest.js';
import { TplaError } from '../../errors.js';
import { fieldsOfVariants, labelOfVariants, parseBlockMask, problemOfVariants, VARIANT_FIELDS, type BlockMask, type LogitVariants } from './variants.js';
import type { AttentionPath, AttentionProblem, ChunkForm, DecodeProblem, PrefillProblem } from '../../native/attention.js';

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
  /** Absent: none. */
  variants?: LogitVariants;
}

/** Decode with ordinary keys and values: `heads / kvHeads` query heads read one KV head. */
export interface GqaShape extends ShapeBase {
  kind: 'gqa';
  kvHeads: number;
  headDim: number;
  page: number;
  layout: 'nhd' | 'hnd';
  variants?: LogitVariants;
}

/** Un-absorbed prefill: every head has keys and values of its own. */
export interface PrefillShape extends ShapeBase {
  kind: 'prefill';
  keyDim: number;
  valueDim: number;
}

/** A chunk of prefill at the end of cached latents, with DeepSeek's dimensions: from queries before absorption to values. */
export interface ChunkShape extends ShapeBase {
  kind: 'chunk';
  page: number;
  kvDType: 'bf16' | 'fp8' | 'f32';
  form: ChunkForm;
}

/** Values of a cached token, and of a head without position. */
export const CHUNK = { latent: 512, rope: 64, head: 128 } as const;
/** Query tokens of a chunk that names none. */
const CHUNK_TOKENS = 512;

/** Prefill and decode of one step. */
export interface PodShape {
  kind: 'pod';
  prefill: PrefillShape;
  decode: DecodeShape;
  /** Multiprocessors that begin with decode; 0: chosen from the lengths. */
  decodeSms: number;
}

export type AttentionShape = DecodeShape | GqaShape | PrefillShape | ChunkShape | PodShape;

/** A shape as files and flags write it: the columns of a results file. Lengths of several sequences are joined with `;`. */
export type ShapeFields = Record<string, unknown>;

const KV_DTYPES = ['bf16', 'fp8', 'f32'] as const;
const DECODE_FIELDS = ['kind', 'kv_dtype', 'latent', 'rope', 'heads', 'batch', 'kv_len', 'kv_lens', 'q_tokens', 'q_lens', 'page', 'causal', 'latent_scale', 'path'];
const PREFILL_FIELDS = ['kind', 'key_dim', 'value_dim', 'heads', 'batch', 'kv_len', 'kv_lens', 'q_tokens', 'q_lens', 'causal', 'path'];
/** The prefill of a pod shape; its decode has the fields of a decode shape. */
const PREFIX = 'prefill_';
const POD_FIELDS = [...DECODE_FIELDS, ...['heads', 'batch', 'kv_len', 'kv_lens', 'q_tokens', 'q_lens', 'causal'].map((name) => PREFIX + name), 'decode_sms'];
const GQA_FIELDS = ['kind', 'head_dim', 'heads', 'kv_heads', 'batch', 'kv_len', 'kv_lens', 'q_tokens', 'q_lens', 'page', 'kv_layout', 'causal', 'path'];
const CHUNK_FIELDS = ['kind', 'kv_dtype', 'heads', 'batch', 'kv_len', 'kv_lens', 'q_tokens', 'q_lens', 'page', 'causal', 'form', 'path'];
const FIELDS = { decode: [...DECODE_FIELDS, ...VARIANT_FIELDS], gqa: [...GQA_FIELDS, ...VARIANT_FIELDS], prefill: PREFILL_FIELDS, chunk: CHUNK_FIELDS, pod: POD_FIELDS };
export const SHAPE_KINDS = ['decode', 'gqa', 'prefill', 'chunk', 'pod'] as const;
export const SHAPE_FIELDS = [...new Set([...DECODE_FIELDS, ...PREFILL_FIELDS, ...GQA_FIELDS, ...VARIANT_FIELDS, ...POD_FIELDS, ...CHUNK_FIELDS])];

/** Throws REQUEST_INVALID; `where` names the flag list or the file and row. Empty fields count as absent. */
export function shapeFromFields(fields: ShapeFields, where: string): AttentionShape {
  const given = Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== '' && value !== null && value !== undefined));
  const fail = (message: string): never => {
    throw new TplaError('REQUEST_INVALID', `${where}: ${message}`);
  };
  const reader = new FieldReader(given, fail);
  const kind = reader.choice('kind', SHAPE_KINDS, 'kv_heads' in given || 'head_dim' in given ? 'gqa' : 'decode');
  const known = FIELDS[kind];
  const strange = Object.keys(given).find((name) => !known.includes(name));
  if (strange !== undefined) {
    const near = nearest(strange, known);
    fail(`a ${kind} shape has no field ${strange}${near === null ? `; it has ${known.join(', ')}` : `; did you mean ${near}?`}`);
  }
  if (kind === 'pod') return podFromFields(given, reader, where);
  const lengths = sequenceLengths(reader, kind, fail);
  const common = { ...lengths, causal: reader.flag('causal', true), path: reader.choice('path', ['auto', 'sm90', 'sm80'], 'auto') };
  if (kind === 'prefill') {
    return { kind, heads: reader.integer('heads', 128), ...common, keyDim: reader.integer('key_dim', 192), valueDim: reader.integer('value_dim', 128) };
  }
  if (kind === 'chunk') {
    return {
      kind, heads: reader.integer('heads', 128), ...common, page: reader.integer('page', 64), kvDType: reader.choice('kv_dtype', KV_DTYPES, 'bf16'),
      form: reader.choice('form', ['auto', 'absorbed', 'unabsorbed'], 'auto'),
    };
  }
  const variants = variantsFromFields(reader);
  if (kind === 'gqa') {
    return {
      kind, heads: reader.integer('heads', 32), kvHeads: reader.integer('kv_heads', 8), ...common, headDim: reader.integer('head_dim', 128), page: reader.integer('page', 64),
      layout: reader.choice('kv_layout', ['nhd', 'hnd'], 'nhd'), ...(variants && { variants }),
    };
  }
  return {
    kind,
    heads: reader.integer('heads', 128),
    ...common,
    latent: reader.integer('latent', 512),
    rope: reader.integer('rope', 64),
    page: reader.integer('page', 64),
    kvDType: reader.choice('kv_dtype', KV_DTYPES, 'bf16'),
    latentScale: reader.flag('latent_scale', false),
    ...(variants && { variants }),
  };
}

/** Undefined where none is given. */
function variantsFromFields(reader: FieldReader): LogitVariants | undefined {
  const variants = { softcap: reader.number('softcap', 0), window: reader.optionalInteger('window', 0) ?? 0, alibi: reader.flag('alibi', false), blockMask: reader.blockMask('block_mask') };
  return variants.softcap > 0 || variants.window > 0 || variants.alibi || variants.blockMask !== null ? variants : undefined;
}

/** The fields a results file names a shape with; reading them back gives the same shape. */
export function fieldsOfShape(shape: AttentionShape): Record<string, string | number | boolean> {
  if (shape.kind === 'pod') {
    const ofPrefill = Object.entries(fieldsOfShape(shape.prefill)).map(([name, value]) => [PREFIX + name, value] as const);
    return { ...fieldsOfShape(shape.decode), kind: shape.kind, ...Object.fromEntries(ofPrefill.filter(([name]) => POD_FIELDS.includes(name))), decode_sms: shape.decodeSms };
  }
  const uniform = (lens: number[]) => lens.every((len) => len === lens[0]);
  const lengths: Record<string, string | number> = { batch: shape.kvLens.length };
  if (uniform(shape.kvLens)) lengths.kv_len = shape.kvLens[0] as number;
  else lengths.kv_lens = shape.kvLens.join(';');
  if (uniform(shape.qLens)) lengths.q_tokens = shape.qLens[0] as number;
  else lengths.q_lens = shape.qLens.join(';');
  if (shape.kind === 'prefill') {
    return { kind: shape.kind, key_dim: shape.keyDim, value_dim: shape.valueDim, heads: shape.heads, ...lengths, causal: shape.causal, path: shape.path };
  }
  if (shape.kind === 'chunk') {
    return { kind: shape.kind, kv_dtype: shape.kvDType, heads: shape.heads, ...lengths, page: shape.page, causal: shape.causal, form: shape.form, path: shape.path };
  }
  if (shape.kind === 'gqa') {
    return {
      kind: shape.kind, head_dim: shape.headDim, heads: shape.heads, kv_heads: shape.kvHeads, ...lengths, page: shape.page, kv_layout: shape.layout, causal: shape.causal, path: shape.path,
      ...fieldsOfVariants(shape.variants),
    };
  }
  return {
    kind: shape.kind, kv_dtype: shape.kvDType, latent: shape.latent, rope: shape.rope, heads: shape.heads, ...lengths,
    page: shape.page, causal: shape.causal, latent_scale: shape.latentScale, path: shape.path,
    ...fieldsOfVariants(shape.variants),
  };
}

/** Equal for shapes whose times can be compared: the work is the same, whatever the page size, form or kernel. */
export function workOfShape(shape: AttentionShape): string {
  if (shape.kind === 'pod') return `pod ${workOfShape(shape.prefill)} ${workOfShape(shape.decode)}`;
  const causal = shape.kind !== 'prefill' && shape.qLens.every((len) => len <= 1) ? true : shape.causal;
  return [shape.kind, ...widths(shape), shape.heads, shape.qLens.join(';'), shape.kvLens.join(';'), causal].join(' ') + ('variants' in shape ? labelOfVariants(shape.variants) : '');
}

function widths(shape: Exclude<AttentionShape, PodShape>): (string | number)[] {
  switch (shape.kind) {
    case 'decode': return [shape.kvDType, shape.latent, shape.rope];
    case 'gqa': return [shape.headDim, shape.kvHeads];
    case 'prefill': return [shape.keyDim, shape.valueDim];
    case 'chunk': return [shape.kvDType];
  }
}

/** Short enough for an error message or a label. */
export function describeShape(shape: AttentionShape): string {
  if (shape.kind === 'pod') return `${describeShape(shape.prefill)}, and ${describeShape(shape.decode)}`;
  const span = (lens: number[]) => (lens.every((len) => len === lens[0]) ? String(lens[0]) : `${Math.min(...lens)}..${Math.max(...lens)}`);
  return `${shape.kind} ${describeWidths(shape)}, ${shape.heads} heads, ${shape.kvLens.length} × ${span(shape.kvLens)}, ${span(shape.qLens)} query tokens`;
}

function describeWidths(shape: Exclude<AttentionShape, PodShape>): string {
  switch (shape.kind) {
    case 'decode': return `latent ${shape.latent}+${shape.rope} ${shape.kvDType}${labelOfVariants(shape.variants)}`;
    case 'gqa': return `${shape.kvHeads} KV heads of ${shape.headDim}${labelOfVariants(shape.variants)}`;
    case 'prefill': return `${shape.keyDim}/${shape.valueDim}${shape.causal ? ' causal' : ''}`;
    case 'chunk': return `latent ${CHUNK.latent}+${CHUNK.rope} ${shape.kvDType}${shape.causal ? ' causal' : ''}`;
  }
}

export function problemOfShape(shape: DecodeShape): DecodeProblem;
export function problemOfShape(shape: PrefillShape): PrefillProblem;
export function problemOfShape(shape: AttentionShape): AttentionProblem;
export function problemOfShape(shape: AttentionShape): AttentionProblem {
  if (shape.kind === 'pod') return { kind: shape.kind, prefill: problemOfShape(shape.prefill), decode: problemOfShape(shape.decode), decodeMultiprocessors: shape.decodeSms };
  const common = {
    heads: shape.heads, qLens: Int32Array.from(shape.qLens), kvLens: Int32Array.from(shape.kvLens), causal: shape.causal, path: shape.path, queryScale: 1,
  };
  if (shape.kind === 'prefill') return { kind: shape.kind, ...common, keyDim: shape.keyDim, valueDim: shape.valueDim };
  if (shape.kind === 'chunk') return { kind: shape.kind, ...common, pageTokens: shape.page, kvDType: shape.kvDType, form: shape.form };
  const variants = shape.variants && { variants: problemOfVariants(shape.variants, shape.kvLens) };
  if (shape.kind === 'gqa') {
    return { kind: shape.kind, ...common, kvHeads: shape.kvHeads, headDim: shape.headDim, pageTokens: shape.page, pageGapBytes: 0, layout: shape.layout, ...variants };
  }
  return {
    kind: shape.kind, ...common, latent: shape.latent, rope: shape.rope, pageTokens: shape.page, pageGapBytes: 0, kvDType: shape.kvDType, latentScale: shape.latentScale,
    ...variants,
  };
}

/** The same shape on the given kernels. */
export function onPath(shape: AttentionShape, path: AttentionPath): AttentionShape {
  if (shape.kind === 'pod') return { ...shape, prefill: { ...shape.prefill, path }, decode: { ...shape.decode, path } };
  return { ...shape, path };
}

function podFromFields(given: ShapeFields, reader: FieldReader, where: string): PodShape {
  const ofPrefill: ShapeFields = {};
  const ofDecode: ShapeFields = {};
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith(PREFIX)) ofPrefill[name.slice(PREFIX.length)] = value;
    else if (name !== 'decode_sms') ofDecode[name] = value;
  }
  if (given.path !== undefined) ofPrefill.path = given.path;
  return {
    kind: 'pod',
    prefill: shapeFromFields({ ...ofPrefill, kind: 'prefill' }, `${where}, prefill`) as PrefillShape,
    decode: shapeFromFields({ ...ofDecode, kind: 'decode' }, `${where}, decode`) as DecodeShape,
    decodeSms: reader.optionalInteger('decode_sms', 0) ?? 0,
  };
}

function sequenceLengths(reader: FieldReader, kind: AttentionShape['kind'], fail: (message: string) => never): { qLens: number[]; kvLens: number[] } {
  const listed = reader.lengths('kv_lens');
  const each = reader.optionalInteger('kv_len', 0);
  const batch = reader.optionalInteger('batch', 1);
  if (listed === undefined && each === undefined) fail('give kv_len, or kv_lens for sequences of different lengths');
  if (listed !== undefined && batch !== undefined && batch !== listed.length) fail(`batch is ${batch}, but kv_lens has ${listed.length} lengths`);
  const kvLens = listed ?? Array<number>(batch ?? 1).fill(each as number);
  const qListed = reader.lengths('q_lens');
  if (qListed !== undefined && qListed.length !== kvLens.length) fail(`q_lens has ${qListed.length} lengths for ${kvLens.length} sequences`);
  const qTokens = reader.optionalInteger('q_tokens', 0);
  return { qLens: qListed ?? kvLens.map((kvLen) => qTokens ?? usualQueryTokens(kind, kvLen)), kvLens };
}

/** A prefill is a whole prompt, a chunk its last tokens, decode one token. */
function usualQueryTokens(kind: AttentionShape['kind'], kvLen: number): number {
  if (kind === 'prefill') return kvLen;
  return kind === 'chunk' ? Math.min(CHUNK_TOKENS, kvLen) : 1;
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

  number(name: string, absent: number): number {
    const value = this.fields[name] ?? absent;
    const number = typeof value === 'string' && value.trim() === '' ? NaN : Number(value);
    return Number.isFinite(number) && number >= 0 ? number : this.fail(`${name} is ${JSON.stringify(value)}; it takes a number of at least 0`);
  }

  blockMask(name: string): BlockMask | null {
    const value = this.fields[name];
    if (value === undefined) return null;
    return parseBlockMask(String(value)) ?? this.fail(`${name} is ${JSON.stringify(value)}; it takes tokens of a block and the share of blocks that are visible, such as 128:0.25`);
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
