/** C++ of tests, compiled when they run. */
import { spawnSync } from 'node:child_process';

/** A shared library from one source; throws with what the compiler said. */
export function compileShared(source: string, library: string, flags: string[] = []): string {
  const { status, stderr } = spawnSync('g++', ['-std=c++17', '-O1', '-shared', '-fPIC', '-o', library, source, '-pthread', ...flags], { encoding: 'utf8' });
  if (status !== 0) throw new Error(`cannot compile ${source}: ${stderr}`);
  return library;
}
