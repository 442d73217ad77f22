import { accessSync, constants, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { connect } from 'node:net';
import { join } from 'node:path';
import { runtimeBase } from '../config/env.js';

/** Longest base that leaves room for `/tpla-PID-XXXXXX/NAME.handoff.sock` in a socket address. */
const MAX_BASE_BYTES = 50;
const NAME = /^tpla-(\d+)-[A-Za-z0-9]{6}$/;

/** Makes a directory of this process alone, for sockets and configurations; the caller removes it. */
export function makeRuntimeDir(base: string = usableBase()): string {
  return mkdtempSync(join(base, `tpla-${process.pid}-`));
}

/** Removes what a supervisor that was killed has left: directories whose process is gone and whose sockets nobody answers on. */
export async function sweepRuntimeDirs(base: string = usableBase()): Promise<string[]> {
  const swept: string[] = [];
  for (const name of readdirSync(base)) {
    const pid = Number(NAME.exec(name)?.[1] ?? 0);
    const path = join(base, name);
    if (pid === 0 || isAlive(pid) || await anyoneAnswers(path)) continue;
    try {
      rmSync(path, { recursive: true });
      swept.push(path);
    } catch { /* another user's, or swept by somebody else just now */ }
  }
  return swept;
}

function usableBase(): string {
  const base = runtimeBase();
  try {
    accessSync(base, constants.W_OK | constants.X_OK);
  } catch {
    return '/tmp';
  }
  return Buffer.byteLength(base) > MAX_BASE_BYTES ? '/tmp' : base;
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}

async function anyoneAnswers(directory: string): Promise<boolean> {
  let names: string[];
  try {
    names = readdirSync(directory).filter((name) => name.endsWith('.sock'));
  } catch {
    return true; // not ours to read, so not ours to remove
  }
  const answers = await Promise.all(names.map((name) => new Promise<boolean>((resolve) => {
    const socket = connect(join(directory, name));
    socket.once('connect', () => { socket.destroy(); resolve(true); });
    socket.once('error', () => resolve(false));
  })));
  return answers.includes(true);
}
