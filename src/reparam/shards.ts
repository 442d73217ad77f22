import { closeSync, existsSync, openSync, readSync } from 'node:fs';
import { basename, join } from 'node:path';
import { TplaError } from '../errors.js';
import type { Checkpoint } from '../model/checkpoint.js';
import { readSafetensors, type SafetensorsFile } from '../model/safetensors.js';
import { SafetensorsWriter, type TensorHeader } from '../model/safetensors_writer.js';

/** One output shard: its tensors in order, each a byte range to copy from somewhere. */
export interface ShardPlan {
  file: string;
  metadata: Record<string, string>;
  parts: { header: TensorHeader; from: string; begin: number; end: number }[];
}

const COPY_BYTES = 8 << 20;

/**
 * Lays the output out like the input: same shards, same order, tensors that no layer file replaces copied as they are. What a
 * layer file adds goes to the end of the shard that holds the layer's kv_b_proj.
 */
export function planShards(checkpoint: Checkpoint, layerFiles: SafetensorsFile[]): ShardPlan[] {
  const replaced = new Map<string, ShardPlan['parts'][number]>();
  const added = new Map<string, string[]>();
  layerFiles.forEach((file, layer) => {
    const names = file.tensors.map(({ name }) => name);
    added.set(`model.layers.${layer}.self_attn.kv_b_proj.weight`, names);
    for (const { name, dtype, shape, begin, end } of file.tensors) replaced.set(name, { header: { name, dtype, shape }, from: file.path, begin, end });
  });
  const owners = ownedTensors(checkpoint);
  const existing = new Set(owners.flat());
  return checkpoint.shards.map((shard, index) => {
    const parts: ShardPlan['parts'] = [];
    const owned = new Set(owners[index]);
    for (const { name, dtype, shape, begin, end } of shard.tensors) {
      if (!owned.has(name)) continue;
      const matrix = name.endsWith('_scale_inv') ? replaced.get(name.slice(0, -'_scale_inv'.length)) : undefined;
      if (matrix !== undefined && !replaced.has(name)) continue;
      parts.push(replaced.get(name) ?? { header: { name, dtype, shape }, from: shard.path, begin, end });
      for (const extra of added.get(name) ?? []) if (!existing.has(extra)) parts.push(replaced.get(extra)!);
    }
    return { file: basename(shard.path), metadata: shard.metadata, parts };
  });
}

/** Names per shard; a tensor that several shards hold belongs to the one that the index names. */
function ownedTensors(checkpoint: Checkpoint): string[][] {
  const selected = new Map(checkpoint.tensors.map(({ name, file }) => [name, file]));
  return checkpoint.shards.map((shard, index) => shard.tensors.map(({ name }) => name).filter((name) => (selected.get(name) ?? index) === index));
}

export function planBytes(plan: ShardPlan): number {
  return plan.parts.reduce((sum, { begin, end }) => sum + end - begin, 0);
}

/** Whether an earlier run finished this shard: it has its name only when it is whole, and its header has to be the planned one. */
export function isWritten(plan: ShardPlan, dir: string): boolean {
  const path = join(dir, plan.file);
  if (!existsSync(path)) return false;
  const { tensors } = readSafetensors(path);
  const describe = ({ name, dtype, shape }: TensorHeader) => `${name} ${dtype} ${shape.join('x')}`;
  if (tensors.map(describe).join() === plan.parts.map(({ header }) => describe(header)).join()) return true;
  throw new TplaError('USAGE', `${path} is there already but is not what this conversion writes; choose another output directory`);
}

/** Writes one shard, a few megabytes at a time; `onBytes` hears of each piece. */
export function writeShard(plan: ShardPlan, dir: string, onBytes: (bytes: number) => void): void {
  const writer = new SafetensorsWriter(join(dir, plan.file), plan.parts.map(({ header }) => header), plan.metadata);
  const buffer = Buffer.alloc(COPY_BYTES);
  const descriptors = new Map<string, number>();
  try {
    for (const { header, from, begin, end } of plan.parts) {
      const fd = descriptors.get(from) ?? openSync(from, 'r');
      descriptors.set(from, fd);
      for (let at = begin; at < end; ) {
        const count = readSync(fd, buffer, 0, Math.min(buffer.length, end - at), at);
        if (count === 0) throw new TplaError('CHECKPOINT_INVALID', `${from} ended at byte ${at}; expected ${end}. It changed while it was read.`);
        writer.write(header.name, buffer.subarray(0, count));
        at += count;
        onBytes(count);
      }
    }
    writer.finish();
  } catch (error) {
    writer.abort();
    throw error;
  } finally {
    for (const fd of descriptors.values()) closeSync(fd);
  }
}
