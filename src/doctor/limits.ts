import { readFileSync, statfsSync } from 'node:fs';
import { freemem, totalmem } from 'node:os';
import { dirname, join } from 'node:path';

/** Limits that decide what a worker can allocate, pin and open. null means no limit, or not known. */
export interface Limits {
  memlock_bytes: number | null;
  open_files: number | null;
  shm_bytes: number | null;
  shm_free_bytes: number | null;
  memory_bytes: number;
  memory_free_bytes: number;
  cgroup_memory_bytes: number | null;
  cgroup_cpus: number | null;
}

export function readLimits(): Limits {
  const shm = shmSize('/dev/shm');
  const cgroup = cgroupLimits('/sys/fs/cgroup', readText('/proc/self/cgroup'));
  const processLimits = readText('/proc/self/limits');
  return {
    memlock_bytes: processLimit(processLimits, 'Max locked memory'),
    open_files: processLimit(processLimits, 'Max open files'),
    shm_bytes: shm?.total ?? null,
    shm_free_bytes: shm?.free ?? null,
    memory_bytes: totalmem(),
    memory_free_bytes: freemem(),
    cgroup_memory_bytes: cgroup.memory,
    cgroup_cpus: cgroup.cpus,
  };
}

/** Soft limit of a line of /proc/PID/limits. */
export function processLimit(text: string, name: string): number | null {
  const line = text.split('\n').find((candidate) => candidate.startsWith(name));
  const soft = line?.slice(name.length).trim().split(/\s+/)[0];
  return soft === undefined || soft === 'unlimited' ? null : Number(soft);
}

/** The tightest limits from the process's own control group up to the root (cgroup v2, or v1 where that is mounted). */
export function cgroupLimits(root: string, procCgroup: string): { memory: number | null; cpus: number | null } {
  const unified = /^0::(.*)$/m.exec(procCgroup)?.[1];
  const memory: number[] = [];
  const cpus: number[] = [];
  for (const directory of upwards(root, unified ?? '/')) {
    memory.push(Number(readText(join(directory, 'memory.max')) || NaN));
    const [quota, period] = readText(join(directory, 'cpu.max')).split(' ').map(Number);
    cpus.push((quota ?? NaN) / (period ?? NaN));
  }
  memory.push(Number(readText(join(root, 'memory/memory.limit_in_bytes')) || NaN));
  cpus.push(Number(readText(join(root, 'cpu/cpu.cfs_quota_us')) || NaN) / Number(readText(join(root, 'cpu/cpu.cfs_period_us')) || NaN));
  return { memory: smallest(memory), cpus: smallest(cpus) };
}

function upwards(root: string, path: string): string[] {
  const directories = [join(root, path)];
  while (path !== '/' && path !== '.' && path !== '') {
    path = dirname(path);
    directories.push(join(root, path));
  }
  return directories;
}

/** Least of the positive numbers that are a real limit; v1 writes "none" as a number beyond any memory. */
function smallest(values: number[]): number | null {
  const limits = values.filter((value) => value > 0 && value < 2 ** 60);
  return limits.length === 0 ? null : Math.min(...limits);
}

function shmSize(path: string): { total: number; free: number } | null {
  try {
    const { bsize, blocks, bavail } = statfsSync(path);
    return { total: bsize * blocks, free: bsize * bavail };
  } catch {
    return null;
  }
}

function readText(path: string): string {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return '';
  }
}
