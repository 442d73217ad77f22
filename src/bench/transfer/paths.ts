/** The paths a benchmark can set up, by name. A new one is an entry here. */
import { nixlLibraryFromEnv, ucxLibraryFromEnv } from '../../config/env.js';
import { TplaError } from '../../errors.js';
import { native } from '../../native/loader.js';
import type { KvLayout } from '../../native/types.js';
import { layerGroups } from '../../transfer/layer_groups.js';
import { describeNixl, findNixl, NIXL_BY_NAME, openNixl, ucxUnder } from '../../transfer/nixl.js';
import { describeUcx, findUcx, openUcx } from '../../transfer/ucx.js';
import { bytesLanded } from './cases.js';
import { gpu, HOST } from './memory.js';
import type { BenchPath, HandoffPath, OpenLink } from './path.js';
import { benchStorage } from './storage.js';

const ucxLibrary = () => ucxLibraryFromEnv() ?? findUcx();

/** Under a NIXL that another row of the same run may use, the UCX that this was built for. */
async function ucxLink(): Promise<OpenLink> {
  const nixl = needsNixl() === null ? await openNixl({ use: 'auto', library: nixlLibrary(), backends: ['UCX'], options: {} }) : null;
  nixl?.close();
  const ucx = (await openUcx({ use: 'always', library: ucxLibraryFromEnv(), options: {} }, ucxUnder(nixl)))!;
  return { carrier: `UCX ${describeUcx(ucx)}`, options: { ucx, requirePath: 'ucx' }, close: () => ucx.close() };
}

const nixlLibrary = () => nixlLibraryFromEnv() ?? findNixl();

async function nixlLink(): Promise<OpenLink> {
  const nixl = (await openNixl({ use: 'always', library: nixlLibrary(), backends: ['UCX'], options: {} }))!;
  return { carrier: `NIXL ${describeNixl(nixl)}`, options: { nixl, requirePath: 'nixl' }, close: () => nixl.close() };
}

/** Nothing but what the path's channel brings. */
const NO_LINK: OpenLink = { options: {}, close() {} };

export function openLink(path: HandoffPath): Promise<OpenLink> {
  return path.link?.() ?? Promise.resolve(NO_LINK);
}

const always = () => null;
const needsGpus = (count: number) => () => {
  const { devices, reason } = native().probe().cuda;
  if (devices.length >= count) return null;
  return devices.length === 0 ? `it needs an NVIDIA GPU: ${reason ?? 'none was found'}` : `it needs ${count} GPUs, this machine has ${devices.length}`;
};

const needsNixl = () => (nixlLibrary() === NIXL_BY_NAME ? 'no NIXL is installed in the standard places (TPLA_NIXL_LIBRARY names a libnixl_capi.so elsewhere)' : null);
const needsUcx = () => (ucxLibrary() === null ? 'no UCX is installed (Debian, Ubuntu: apt-get install libucx0; TPLA_UCX_LIBRARY names a libucp.so elsewhere)' : null);

export const BENCH_PATHS: Record<string, BenchPath> = {
  'same-gpu': { path: 'same-gpu', summary: 'two processes on one GPU, memory by VMM descriptors', missing: needsGpus(1), source: gpu(0), target: gpu(0), channel: 'unix', baseline: 'gpu-copy' },
  'same-gpu-ipc': { path: 'same-gpu', summary: 'two processes on one GPU, memory by CUDA IPC', missing: needsGpus(1), source: gpu(0), target: gpu(0, 'ipc'), channel: 'unix', baseline: 'gpu-copy' },
  'cuda-ipc': { path: 'cuda-ipc', summary: 'first GPU to last, memory by CUDA IPC', missing: needsGpus(2), source: gpu(0), target: gpu(-1, 'ipc'), channel: 'unix', baseline: 'gpu-copy' },
  'cuda-fd': { path: 'cuda-fd', summary: 'first GPU to last, memory by VMM descriptors', missing: needsGpus(2), source: gpu(0), target: gpu(-1), channel: 'unix', baseline: 'gpu-copy' },
  pinned: { path: 'pinned', summary: "a GPU writes into decode's host memory", missing: needsGpus(1), source: gpu(0), target: HOST, channel: 'unix', baseline: 'gpu-copy' },
  'pinned-to-gpu': { path: 'pinned', summary: "a GPU reads prefill's host memory", missing: needsGpus(1), source: HOST, target: gpu(0), channel: 'unix', baseline: 'gpu-copy' },
  shm: { path: 'shm', summary: 'host memory to host memory, mapped by both', missing: always, source: HOST, target: HOST, channel: 'unix', baseline: 'memcpy' },
  nixl: {
    path: 'nixl',
    summary: "host memory to host memory through NIXL's backend UCX, under the NIXL_ and UCX_ settings of the environment",
    missing: needsNixl,
    source: HOST, target: HOST, channel: 'tcp', baseline: 'sockets', link: nixlLink,
  },
  'nixl-gpu': {
    path: 'nixl',
    summary: 'first GPU to last through NIXL, as if they were on two hosts', missing: () => needsGpus(1)() ?? needsNixl(),
    source: gpu(0), target: gpu(-1), channel: 'tcp', baseline: 'sockets', link: nixlLink,
  },
  ucx: {
    path: 'ucx',
    summary: 'host memory to host memory over UCX, under the UCX_ settings of the environment',
    missing: needsUcx,
    source: HOST, target: HOST, channel: 'tcp', baseline: 'sockets', link: ucxLink,
  },
  'ucx-gpu': {
    path: 'ucx',
    summary: 'first GPU to last over UCX, as if they were on two hosts', missing: () => needsGpus(1)() ?? needsUcx(),
    source: gpu(0), target: gpu(-1), channel: 'tcp', baseline: 'sockets', link: ucxLink,
  },
  nvme: { summary: 'blocks to a file of --directory and back, from host or GPU memory; by cuFile, io_uring or threads', missing: always, run: benchStorage },
  tcp: { path: 'tcp', summary: 'host memory to host memory over TCP', missing: always, source: HOST, target: HOST, channel: 'tcp', baseline: 'sockets' },
};

export function benchPath(name: string): BenchPath {
  const path = Object.hasOwn(BENCH_PATHS, name) ? BENCH_PATHS[name] : undefined;
  if (!path) throw new TplaError('USAGE', `path "${name}" is none of ${Object.keys(BENCH_PATHS).join(', ')}`);
  return path;
}

/** The path, where this machine has what it takes. Throws GPU_UNAVAILABLE or REQUEST_INVALID saying what is missing. */
export function availablePath(name: string): BenchPath {
  const path = benchPath(name);
  const missing = path.missing();
  if (missing !== null) throw new TplaError(missing.includes('GPU') ? 'GPU_UNAVAILABLE' : 'REQUEST_INVALID', `path ${name} cannot run here: ${missing}`);
  return path;
}

/** Names of the hand-offs that can run here. */
export function availablePaths(): string[] {
  return Object.keys(BENCH_PATHS).filter((name) => isHandoff(name) && BENCH_PATHS[name]!.missing() === null);
}

/** Two processes take part; for a name that is none of ours, too. */
export function isHandoff(name: string): boolean {
  return !Object.hasOwn(BENCH_PATHS, name) || !('run' in BENCH_PATHS[name]!);
}

/** Layers of each push of a whole sequence, as the prefill worker pushes KV that it need not compute. */
export function wholeInGroups(name: string, target: KvLayout, tokens: number): [number, number][] {
  const path = benchPath(name);
  return 'run' in path ? [[0, target.layers]] : layerGroups(path.path, target.layers, bytesLanded({ target, tokens }));
}

export function handoffPath(name: string): HandoffPath {
  const path = availablePath(name);
  if ('run' in path) throw new TplaError('REQUEST_INVALID', `path ${name} has no other end`);
  return path;
}
