/** Libraries with NIXL's C API, compiled for a test: the stand-in of nixl_stand_in.cpp, and ones with something missing. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { compileShared } from './compile.js';

/** The stand-in, as libnixl_capi.so in `directory`. `flags` for the compiler. */
export function buildNixlStandIn(directory: string, name = 'libnixl_capi.so', flags: string[] = []): string {
  return compileShared(join(import.meta.dirname, 'nixl_stand_in.cpp'), join(directory, name), ['-fvisibility=hidden', ...flags]);
}

export function buildLibrary(directory: string, name: string, code: string): string {
  const source = join(directory, `${name}.cpp`);
  writeFileSync(source, code);
  return compileShared(source, join(directory, name), ['-fvisibility=hidden']);
}
