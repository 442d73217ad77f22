/** cuFile for tests that need it to say what this machine's does not: the stand-in of cufile_stand_in.cpp, found through LD_LIBRARY_PATH. */
import { spawnSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';

/** Compiles it into a directory of its own, with `flags`; the environment of a process that is to load it. */
export function cuFileStandIn(directory: string, ...flags: string[]): Record<string, string> {
  const at = join(directory, ['cufile', ...flags].join(''));
  mkdirSync(at);
  const source = join(import.meta.dirname, 'cufile_stand_in.cpp');
  const { status, stderr } = spawnSync('g++', ['-std=c++17', '-O1', '-shared', '-fPIC', '-fvisibility=hidden', ...flags, '-o', join(at, 'libcufile.so.0'), source, '-ldl'], { encoding: 'utf8' });
  if (status !== 0) throw new Error(`cannot compile ${source}: ${stderr}`);
  return { LD_LIBRARY_PATH: at };
}
