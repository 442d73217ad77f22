import { formatBytes } from '../config/bytes.js';
import { facts, table } from '../report/table.js';
import type { Examination } from './examine.js';

/** The examination for a person to read. */
export function printExamination(found: Examination): string {
  const sections = [
    facts([['tpla', found.version], ['node', `${found.node} ${found.platform}`], ['addon', found.addon.loaded ? 'loaded' : 'not loaded (see below)']]),
    ...(found.cpu ? [section('CPU', cpuFacts(found.cpu))] : []),
    ...(found.cuda ? [section('GPUs', gpus(found.cuda))] : []),
    ...(found.libraries.length > 0 ? [section('Libraries', `${libraries(found.libraries)}\nRDMA devices: ${found.rdma_devices.join(', ') || 'none'}`)] : []),
    section('Limits', limitFacts(found.limits)),
    section('Findings', found.findings.length === 0 ? 'none' : found.findings.map(({ severity, text }) => `${severity}: ${text}`).join('\n')),
  ];
  return sections.join('\n\n');
}

function section(title: string, body: string): string {
  return `${title}\n${body.split('\n').map((line) => `  ${line}`).join('\n')}`;
}

function cpuFacts(cpu: NonNullable<Examination['cpu']>): string {
  return facts([
    ['model', cpu.model],
    ['cores', cpu.cores],
    ['instructions', cpu.features.join(' ') || 'none we know of'],
    ['kernels', cpu.kernel],
    ['BLAS', cpu.blas ?? "none; tpla's own GEMM"],
  ]);
}

function gpus(cuda: NonNullable<Examination['cuda']>): string {
  const built = `built ${cuda.compiled ? 'with' : 'without'} CUDA`;
  if (cuda.devices.length === 0) return `none (${cuda.reason}); ${built}`;
  const rows = cuda.devices.map((device) => [
    device.index, device.name, device.capability, formatBytes(device.memory_bytes), device.multiprocessors, device.peers.join(' ') || '-',
  ]);
  return `${cuda.driver}; ${built}\n${table(['#', 'name', 'capability', 'memory', 'SMs', 'reaches directly'], rows, ['right', 'left', 'right', 'right', 'right', 'left'])}`;
}

function libraries(found: Examination['libraries']): string {
  return table(['name', 'found', ''], found.map(({ name, path, detail }) => [name, path ?? 'no', detail]));
}

function limitFacts(limits: Examination['limits']): string {
  const bytes = (value: number | null) => (value === null ? 'no limit' : formatBytes(value));
  return facts([
    ['memory', `${bytes(limits.memory_bytes)}, ${bytes(limits.memory_free_bytes)} free`],
    ['cgroup memory', bytes(limits.cgroup_memory_bytes)],
    ['cgroup CPUs', limits.cgroup_cpus ?? 'no limit'],
    ['locked memory', bytes(limits.memlock_bytes)],
    ['open files', limits.open_files ?? 'no limit'],
    ['/dev/shm', limits.shm_bytes === null ? 'not mounted' : `${bytes(limits.shm_bytes)}, ${bytes(limits.shm_free_bytes)} free`],
  ]);
}
