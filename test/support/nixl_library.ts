/** Libraries with NIXL's C API, compiled for a test: the stand-in of nixl_stand_in.cpp, and ones with something missing. */
import { spawnSync } from 'node:child_process';
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
  return compileShared(source, join(directory, name), ['-fvisibility=hidden', `-Wl,-soname,${name}`]);
}

/** Opens a NIXL in a process that has loaded none yet: `loaded FILE`, or the error's code and message. */
export function openInNewProcess(file: string, backends = ['UCX'], env: Record<string, string> = {}): string {
  const script = `import { native } from ${JSON.stringify(join(import.meta.dirname, '../../src/native/loader.ts'))};
    native().openNixl(${JSON.stringify(file)}, ${JSON.stringify(backends)}).then((nixl) => { console.log('loaded', nixl.library); nixl.close(); }, (error) => console.log(error.code, error.message));`;
  return spawnSync(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script], { encoding: 'utf8', env: { ...process.env, ...env } }).stdout;
}
