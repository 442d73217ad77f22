import { closeSync, existsSync, openSync, readFileSync, readSync, readdirSync, fstatSync } from 'node:fs';
import { join } from 'node:path';
import { TplaError } from '../errors.js';

/**
 * The safetensors container: 8 bytes little-endian header length, a JSON header, then the tensors' bytes back to back.
 * Only headers are read here; the addon maps the rest.
 */
export interface SafetensorsFile {
  path: string;
  bytes: number;
  /** Length prefix and JSON header together: the absolute offset of the first tensor byte. */
  dataBegin: number;
  metadata: Record<string, string>;
  tensors: SafetensorsEntry[];
}

export interface SafetensorsEntry {
  name: string;
  /** As written, e.g. BF16. */
  dtype: string;
  shape: number[];
  /** Absolute byte range in the file. */
  begin: number;
  end: number;
}

export const DTYPE_BYTES: Record<string, number> = {
  F64: 8, F32: 4, F16: 2, BF16: 2, F8_E4M3: 1, F8_E5M2: 1, F8_E8M0: 1, I64: 8, I32: 4, I16: 2, I8: 1, U64: 8, U32: 4, U16: 2, U8: 1, BOOL: 1,
};

/** What the reference implementation allows. */
const MAX_HEADER_BYTES = 100_000_000;

/** Reads and validates one file's header: ranges inside the file, as long as their shapes say, back to back, nothing left over. */
export function readSafetensors(path: string): SafetensorsFile {
  const { bytes, header } = readHeaderBytes(path);
  const dataBegin = 8 + header.length;
  const { metadata, tensors } = parseHeader(path, header, dataBegin);
  checkRanges(path, bytes, dataBegin, tensors);
  return { path, bytes, dataBegin, metadata, tensors };
}

function readHeaderBytes(path: string): { bytes: number; header: Buffer } {
  let fd: number;
  try {
    fd = openSync(path, 'r');
  } catch (error) {
    throw invalid(path, `cannot be opened (${(error as Error).message})`, error);
  }
  try {
    const bytes = fstatSync(fd).size;
    const prefix = Buffer.alloc(8);
    if (readSync(fd, prefix, 0, 8, 0) < 8) throw invalid(path, `is truncated: ${bytes} bytes, a safetensors file has at least 8`);
    const length = prefix.readBigUInt64LE();
    if (length > BigInt(MAX_HEADER_BYTES)) throw invalid(path, `is not a safetensors file: its header would be ${length} bytes long`);
    if (length > BigInt(bytes - 8)) throw invalid(path, `is truncated: its header needs ${length} bytes, the file has ${bytes - 8} after the length`);
    const header = Buffer.alloc(Number(length));
    readSync(fd, header, 0, header.length, 8);
    return { bytes, header };
  } finally {
    closeSync(fd);
  }
}

function parseHeader(path: string, header: Buffer, dataBegin: number): Pick<SafetensorsFile, 'metadata' | 'tensors'> {
  let json: Record<string, unknown>;
  try {
    json = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(header)) as Record<string, unknown>;
    if (json === null || typeof json !== 'object' || Array.isArray(json)) throw new Error('not an object');
  } catch (error) {
    throw invalid(path, `has a damaged header (${(error as Error).message})`, error);
  }
  const tensors: SafetensorsEntry[] = [];
  for (const [name, value] of Object.entries(json)) {
    if (name === '__metadata__') continue;
    const { dtype, shape, data_offsets: offsets } = (value ?? {}) as { dtype?: unknown; shape?: unknown; data_offsets?: unknown };
    if (typeof dtype !== 'string' || !isSizes(shape) || !isSizes(offsets) || offsets.length !== 2) {
      throw invalid(path, `has a damaged header: tensor ${name} lacks a dtype, shape or data_offsets`);
    }
    const width = DTYPE_BYTES[dtype];
    if (width === undefined) throw invalid(path, `tensor ${name}: unknown dtype ${dtype}`);
    const [begin, end] = offsets as [number, number];
    const expected = shape.reduce((product, size) => product * size, width);
    if (end - begin !== expected) {
      throw invalid(path, `tensor ${name}: expected ${expected} bytes for ${dtype} [${shape.join(', ')}], found a range of ${end - begin}`);
    }
    tensors.push({ name, dtype, shape, begin: dataBegin + begin, end: dataBegin + end });
  }
  return { metadata: (json.__metadata__ ?? {}) as Record<string, string>, tensors };
}

function checkRanges(path: string, bytes: number, dataBegin: number, tensors: SafetensorsEntry[]): void {
  let at = dataBegin;
  for (const tensor of [...tensors].sort((a, b) => a.begin - b.begin || a.end - b.end)) {
    if (tensor.end > bytes) {
      throw invalid(path, `is truncated: tensor ${tensor.name} expects bytes ${tensor.begin} to ${tensor.end}, found a file of ${bytes} bytes. Download the shard again.`);
    }
    if (tensor.begin < at) throw invalid(path, `tensor ${tensor.name} overlaps the tensor before it (begins at byte ${tensor.begin}, expected ${at})`);
    if (tensor.begin > at) throw invalid(path, `has ${tensor.begin - at} bytes before tensor ${tensor.name} that belong to no tensor`);
    at = tensor.end;
  }
  if (at !== bytes) throw invalid(path, `has ${bytes - at} bytes after its last tensor: expected a file of ${at} bytes, found ${bytes}`);
}

function isSizes(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((size) => Number.isSafeInteger(size) && size >= 0);
}

function invalid(path: string, what: string, cause?: unknown): TplaError {
  return new TplaError('CHECKPOINT_INVALID', `${path} ${what}`, { cause });
}

// ---------------------------------------------------------------- shards

const INDEX = 'model.safetensors.index.json';

/**
 * The safetensors files of a checkpoint directory in name order, and which of them holds each tensor:
 * by `model.safetensors.index.json` where there is one, else `model.safetensors`.
 */
export function listShards(dir: string): { files: string[]; weightMap: Map<string, string> | null } {
  const indexPath = join(dir, INDEX);
  if (existsSync(indexPath)) {
    const weightMap = readIndex(indexPath);
    return { files: [...new Set(weightMap.values())].sort().map((file) => join(dir, file)), weightMap };
  }
  if (existsSync(join(dir, 'model.safetensors'))) return { files: [join(dir, 'model.safetensors')], weightMap: null };
  throw new TplaError('CHECKPOINT_INVALID', `${dir}: expected ${INDEX} or model.safetensors, found ${foundInstead(dir)}`);
}

function readIndex(path: string): Map<string, string> {
  let map: unknown;
  try {
    map = (JSON.parse(readFileSync(path, 'utf8')) as { weight_map?: unknown }).weight_map;
  } catch (error) {
    throw invalid(path, `is not valid JSON: ${(error as Error).message}`, error);
  }
  if (map === null || typeof map !== 'object' || Array.isArray(map)) throw invalid(path, 'has no weight_map');
  const entries = Object.entries(map as Record<string, unknown>);
  for (const [tensor, file] of entries) {
    if (typeof file !== 'string' || file.includes('/')) throw invalid(path, `maps tensor ${tensor} to ${JSON.stringify(file)}; expected a file name`);
  }
  return new Map(entries as [string, string][]);
}

function foundInstead(dir: string): string {
  let names: string[];
  try {
    names = readdirSync(dir);
  } catch {
    return 'no such directory';
  }
  const pickled = names.filter((name) => /\.(bin|pt|pth)$/.test(name));
  if (pickled.length > 0) return `${pickled[0]} (PyTorch pickles are not read; convert them to safetensors)`;
  return names.length === 0 ? 'an empty directory' : `no safetensors among ${names.length} files`;
}
