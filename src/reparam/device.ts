import { TplaError } from '../errors.js';
import { native } from '../native/loader.js';
import type { FitTarget } from '../native/reparam.js';
import type { ProbeResult } from '../native/types.js';

export const DEVICES = ['auto', 'cpu', 'cuda'] as const;
export type Device = (typeof DEVICES)[number];

/** GPUs older than this lack what the addon's CUDA code is compiled for. */
const LEAST_CAPABILITY = 8;

/** Where layers are fitted: `auto` takes the first GPU that can be used, else the CPU. Throws GPU_UNAVAILABLE when `cuda` cannot be had. */
export function fitTarget(device: Device, threads: number, probe: () => ProbeResult = () => native().probe()): FitTarget {
  if (device === 'cpu') return { device: 'cpu', threads };
  const { compiled, devices, reason } = probe().cuda;
  const usable = devices.find(({ capability }) => Number(capability) >= LEAST_CAPABILITY);
  if (compiled && usable !== undefined) return { device: 'cuda', index: usable.index };
  if (device === 'auto') return { device: 'cpu', threads };
  throw new TplaError('GPU_UNAVAILABLE', `--device cuda: ${compiled ? whyNot(devices, reason) : 'this addon was built without CUDA; TPLA_CUDA=on npm run build:native builds it with'}. --device cpu computes the same on the CPU`);
}

function whyNot(devices: { name: string; capability: string }[], reason: string | null): string {
  const [first] = devices;
  return first === undefined ? `no GPU can be used (${reason ?? 'none found'})` : `${first.name} has compute capability ${first.capability}, at least ${LEAST_CAPABILITY}.0 is needed`;
}
