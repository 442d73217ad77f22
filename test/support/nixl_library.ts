/** Libraries with NIXL's C API, compiled for a test: the stand-in of nixl_stand_in.cpp, and ones with something missing. */
import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';

function compile(source: string, library: string, flags: string[] = []): string {
  const { status, stderr } = spawnSync('g++', ['-std=c++17', '-O1', '-shared', '-fPIC', '-fvisibility=hidden', ...flags, '-o', library, source, '-pthread'], { encoding: 'utf8' });
  if (status !== 0) throw new Error(`cannot compile ${source}: ${stderr}`);
  return library;
}

/** The stand-in, as libnixl_capi.so in `directory`. `flags` for the compiler. */
export function buildNixlStandIn(directory: string, name = 'libnixl_capi.so', flags: string[] = []): string {
  return compile(join(import.meta.dirname, 'nixl_stand_in.cpp'), join(directory, name), flags);
}

export function buildLibrary(directory: string, name: string, code: string): string {
  const source = join(directory, `${name}.cpp`);
  writeFileSync(source, code);
  return compile(source, join(directory, name));
}
