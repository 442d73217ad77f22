import { createHash, type Hash } from 'node:crypto';
import { closeSync, openSync, readSync } from 'node:fs';
import { basename, resolve } from 'node:path';
import { TplaError } from '../errors.js';
import type { TensorEntry, WeightDType } from '../native/types.js';
import { loadModelConfig, type JsonObject } from './config.js';
import { listShards, readSafetensors, type SafetensorsEntry, type SafetensorsFile } from './safetensors.js';
import type { ModelIdentity, ModelSpec } from './spec.js';
import { expectedTensors, scaleTensor, type ExpectedTensor } from './tensors.js';

/** A checkpoint directory whose every needed tensor is known to be there, of the right shape and dtype. */
export interface Checkpoint {
  dir: string;
  spec: ModelSpec;
  identity: ModelIdentity;
  /** Absolute paths; `TensorEntry.file` indexes them. */
  files: string[];
  /** Tensors the engine reads, block scales included; extra ones (multi-token prediction layers, …) are left out. */
  tensors: TensorEntry[];
  /** All that the files hold. */
  shards: SafetensorsFile[];
  bosTokenId: number | null;
  /** From `config.json`; generation_config.json may name more. */
  eosTokenIds: number[];
  /** `config.json` as read. */
  config: JsonObject;
}

/**
 * Reads config, index and safetensors headers, never the weights, and checks every expected tensor for presence, shape and
 * dtype. Errors name file, tensor, expected and found, several at once.
 */
export function loadCheckpoint(dir: string, options: { name?: string } = {}): Checkpoint {
  const path = resolve(dir);
  const { spec, raw, bosTokenId, eosTokenIds } = loadModelConfig(path);
  const { files, weightMap } = listShards(path);
  const shards = files.map(readSafetensors);
  const located = locate(shards, weightMap, path);
  const tensors = selectTensors(spec, located, shards, path);
  const identity: ModelIdentity = {
    name: options.name ?? basename(path),
    fingerprint: fingerprint(spec, tensors, shards),
    reparam: spec.tpla?.fingerprint ?? 'none',
  };
  return { dir: path, spec, identity, files, tensors, shards, bosTokenId, eosTokenIds, config: raw };
}

interface Located {
  file: number;
  entry: SafetensorsEntry;
}

function locate(shards: SafetensorsFile[], weightMap: Map<string, string> | null, dir: string): Map<string, Located> {
  const located = new Map<string, Located>();
  shards.forEach((shard, file) => {
    for (const entry of shard.tensors) {
      const mapped = weightMap?.get(entry.name);
      if (mapped !== undefined && mapped !== basename(shard.path)) continue;
      const earlier = located.get(entry.name);
      if (earlier) throw new TplaError('CHECKPOINT_INVALID', `${dir}: tensor ${entry.name} is in both ${basename(shards[earlier.file]!.path)} and ${basename(shard.path)}`);
      located.set(entry.name, { file, entry });
    }
  });
  return located;
}

const COMPUTED_DTYPES: readonly string[] = ['F32', 'BF16', 'F16'];
const MAX_LISTED = 8;

function selectTensors(spec: ModelSpec, located: Map<string, Located>, shards: SafetensorsFile[], dir: string): TensorEntry[] {
  const tensors: TensorEntry[] = [];
  const problems: string[] = [];
  const select = (expected: ExpectedTensor, dtypes: readonly string[]): SafetensorsEntry | null => {
    const found = located.get(expected.name);
    const wanted = `expected ${dtypes.join(' or ')} [${expected.shape.join(', ')}]`;
    if (!found) {
      problems.push(`tensor ${expected.name}: ${wanted}, found in none of ${shards.length} file${shards.length === 1 ? '' : 's'}`);
      return null;
    }
    const { file, entry } = found;
    const shapeMatches = entry.shape.length === expected.shape.length && entry.shape.every((size, axis) => size === expected.shape[axis]);
    if (!shapeMatches || !dtypes.includes(entry.dtype)) {
      problems.push(`${basename(shards[file]!.path)}: tensor ${expected.name}: ${wanted}, found ${entry.dtype} [${entry.shape.join(', ')}]`);
      return null;
    }
    tensors.push({ ...entry, dtype: entry.dtype as WeightDType, file });
    return entry;
  };
  for (const expected of expectedTensors(spec)) {
    const quantized = expected.quantizable && spec.weightBlock !== null;
    const entry = select(expected, quantized ? [...COMPUTED_DTYPES, 'F8_E4M3'] : COMPUTED_DTYPES);
    if (entry?.dtype === 'F8_E4M3') select(scaleTensor(expected, spec.weightBlock!), ['F32']);
  }
  if (problems.length > 0) {
    const listed = problems.slice(0, MAX_LISTED).map((problem) => `  ${problem}`);
    if (problems.length > MAX_LISTED) listed.push(`  … and ${problems.length - MAX_LISTED} more`);
    throw new TplaError('CHECKPOINT_INVALID', `${dir} does not hold the model that its config.json describes:\n${listed.join('\n')}`);
  }
  return tensors;
}

// ---------------------------------------------------------------- fingerprint

const SAMPLES_PER_FILE = 16;
const SAMPLE_BYTES = 256;

/**
 * Tells models apart whose KV must never mix: hash of the normalised config, tensor headers, shard sizes, and a sample of the
 * weights (fine-tunes share all the rest). Reads kilobytes, however large the checkpoint.
 */
function fingerprint(spec: ModelSpec, tensors: TensorEntry[], shards: SafetensorsFile[]): string {
  const hash = createHash('sha256');
  hash.update(canonicalJson(spec));
  const descriptors = shards.map((shard) => openSync(shard.path, 'r'));
  try {
    for (const tensor of tensors) {
      hash.update(`\n${tensor.name} ${tensor.dtype} ${tensor.shape.join('x')} `);
      if (!tensor.name.includes('.experts.')) sample(hash, descriptors[tensor.file]!, (tensor.begin + tensor.end) / 2, tensor.end);
    }
    shards.forEach((shard, file) => {
      hash.update(`\n${shard.bytes} `);
      for (let i = 0; i < SAMPLES_PER_FILE; i++) sample(hash, descriptors[file]!, shard.dataBegin + ((shard.bytes - shard.dataBegin) * i) / SAMPLES_PER_FILE, shard.bytes);
    });
  } finally {
    descriptors.forEach((fd) => closeSync(fd));
  }
  return hash.digest('hex').slice(0, 32);
}

function sample(hash: Hash, fd: number, position: number, end: number): void {
  const bytes = Buffer.alloc(SAMPLE_BYTES);
  const begin = Math.floor(position);
  const count = readSync(fd, bytes, 0, Math.min(SAMPLE_BYTES, end - begin), begin);
  hash.update(bytes.subarray(0, count));
}

/** JSON with sorted keys, so that equal values hash equally. */
export function canonicalJson(value: unknown): string {
  return JSON.stringify(value, (_key, inner: unknown) =>
    inner !== null && typeof inner === 'object' && !Array.isArray(inner)
      ? Object.fromEntries(Object.entries(inner).sort(([a], [b]) => (a < b ? -1 : 1)))
      : inner);
}
