import { nixlLibraryFromEnv, setCuFileEnvironment, setUcxEnvironment, ucxLibraryFromEnv } from '../config/env.js';
import { toTplaError } from '../errors.js';
import { native } from '../native/loader.js';
import type { ProbeResult } from '../native/types.js';
import { describeNixl, findNixl, NIXL_BY_NAME, ucxUnder } from '../transfer/nixl.js';
import { describeUcx, findUcx, rdmaDevices } from '../transfer/ucx.js';
import { readLimits, type Limits } from './limits.js';

/** What `tpla doctor --json` prints. */
export interface Examination {
  version: string;
  node: string;
  platform: string;
  addon: { loaded: boolean; error: string | null };
  cpu: { model: string; cores: number; features: string[]; kernel: string; blas: string | null } | null;
  cuda: {
    compiled: boolean;
    driver: string | null;
    reason: string | null;
    devices: { index: number; name: string; capability: string; memory_bytes: number; multiprocessors: number; peers: number[] }[];
  } | null;
  libraries: { name: string; path: string | null; detail: string }[];
  /** Network devices that move memory by themselves, such as mlx5_0. */
  rdma_devices: string[];
  limits: Limits;
  /** What a person should look at, worst first. */
  findings: Finding[];
}

export interface Finding {
  severity: 'error' | 'warning';
  text: string;
}

/** Pinned staging buffers need at least this much lockable memory. */
const MEMLOCK_WANTED = 256 * 2 ** 20;
const OPEN_FILES_WANTED = 4096;

export async function examine(version: string): Promise<Examination> {
  const limits = readLimits();
  const facts = { version, node: process.version, platform: `${process.platform}-${process.arch}`, limits, rdma_devices: rdmaDevices() };
  // Read when libraries are loaded: by UCX, alone or under NIXL, and by cuFile.
  setUcxEnvironment({});
  setCuFileEnvironment();
  let probe: ProbeResult;
  try {
    probe = native().probe();
  } catch (thrown) {
    const error = toTplaError(thrown).message;
    return { ...facts, addon: { loaded: false, error }, cpu: null, cuda: null, libraries: [], findings: [{ severity: 'error', text: error }, ...limitFindings(limits)] };
  }
  // NIXL first, as a worker opens them: it was built for a UCX of its own.
  const nixl = await askNixl();
  const ucx = await askUcx(nixl.ucx);
  return {
    ...facts,
    addon: { loaded: true, error: null },
    cpu: probe.cpu,
    cuda: { ...probe.cuda, devices: probe.cuda.devices.map(({ memoryBytes, ...device }) => ({ ...device, memory_bytes: memoryBytes })) },
    libraries: [...await Promise.all(probe.libraries.map(askLibrary)), ucx, nixl.library],
    findings: [...machineFindings(probe), ...limitFindings(limits)],
  };
}

type Library = ProbeResult['libraries'][number];

/** What a library says itself of this machine, where it can be asked. */
async function askLibrary(library: Library): Promise<Library> {
  const ask = library.path === null ? undefined : ASKABLE[library.name];
  if (!ask) return library;
  try {
    return { ...library, detail: await ask(library.path!) };
  } catch (error) {
    return { ...library, detail: toTplaError(error).message };
  }
}

/** The UCX that a worker would load, NIXL's where it uses that, says itself which transports it has here. */
async function askUcx(present: string | null): Promise<Library> {
  const name = 'UCX';
  const file = ucxLibraryFromEnv() ?? present ?? findUcx();
  if (file === null) return { name, path: null, detail: 'not installed in the standard places (transfer.ucx.library)' };
  try {
    const ucx = await native().openUcx(file);
    ucx.close();
    return { name, path: ucx.library, detail: describeUcx(ucx) };
  } catch (error) {
    return { name, path: file, detail: toTplaError(error).message };
  }
}

const ASKABLE: Record<string, (path: string) => string | Promise<string>> = {
  /** Whether it is GPUDirect Storage or its compatibility mode. */
  cuFile: () => native().describeCuFile().detail,
};

/** NIXL says which plug-ins it has; its usual backend, where it starts, which memory it carries. And the UCX that came with it. */
async function askNixl(): Promise<{ library: Library; ucx: string | null }> {
  const file = nixlLibraryFromEnv() ?? findNixl();
  const name = 'NIXL';
  try {
    const nixl = await native().openNixl(file, []);
    nixl.close();
    const found = { name, path: nixl.library };
    if (!nixl.plugins.includes('UCX')) return { library: { ...found, detail: describeNixl(nixl) }, ucx: null };
    try {
      const agent = await native().openNixl(file, ['UCX']);
      agent.close();
      return { library: { ...found, detail: describeNixl(agent) }, ucx: ucxUnder(agent) };
    } catch (error) {
      return { library: { ...found, detail: `${describeNixl(nixl)}; ${toTplaError(error).message}` }, ucx: null };
    }
  } catch (error) {
    return { library: { name, path: file === NIXL_BY_NAME ? null : file, detail: toTplaError(error).message }, ucx: null };
  }
}

function machineFindings({ cpu, cuda }: ProbeResult): Finding[] {
  const findings: Finding[] = [];
  if (process.arch === 'x64' && !cpu.features.includes('avx2')) findings.push({ severity: 'warning', text: 'the processor has no AVX2: the portable kernels work, slowly' });
  if (cuda.devices.length > 0 && !cuda.compiled) {
    findings.push({ severity: 'warning', text: `${cuda.devices.length} GPU(s) found, but the addon was built without CUDA: TPLA_CUDA=on npm run build:native` });
  }
  if (cuda.compiled && cuda.devices.length === 0) findings.push({ severity: 'warning', text: `the addon was built with CUDA, but no GPU can be used: ${cuda.reason}` });
  return findings;
}

export function limitFindings(limits: Limits): Finding[] {
  const findings: Finding[] = [];
  const warn = (text: string) => findings.push({ severity: 'warning', text });
  if (limits.memlock_bytes !== null && limits.memlock_bytes < MEMLOCK_WANTED) {
    warn('little memory may be locked, which pinned and RDMA buffers need: `ulimit -l unlimited`, or LimitMEMLOCK=infinity in the unit');
  }
  if (limits.open_files !== null && limits.open_files < OPEN_FILES_WANTED) {
    warn(`only ${limits.open_files} open files are allowed, and every stream is one: \`ulimit -n 65536\`, or LimitNOFILE=65536 in the unit`);
  }
  return findings;
}
