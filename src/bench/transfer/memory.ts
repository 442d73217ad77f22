/** Where an end of a benchmark keeps its pages. */
import { native } from '../../native/loader.js';
import type { KvArena, KvLayout } from '../../native/types.js';

export type Memory =
  | { kind: 'host' }
  /** GPU `index` of the process, -1 for its last. */
  | { kind: 'gpu'; index: number; sharing: 'descriptor' | 'ipc' };

export const HOST: Memory = { kind: 'host' };
export const gpu = (index: number, sharing: 'descriptor' | 'ipc' = 'descriptor'): Memory => ({ kind: 'gpu', index, sharing });

export function newArena(memory: Memory, layout: KvLayout, pages: number): KvArena {
  const addon = native();
  if (memory.kind === 'host') return new addon.KvArena(layout, pages);
  const device = memory.index < 0 ? addon.probe().cuda.devices.length + memory.index : memory.index;
  return new addon.CudaKvArena(layout, pages, [device], memory.sharing);
}
