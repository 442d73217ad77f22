import { closeSync, openSync, readFileSync, readSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import { TplaError } from '../errors.js';
import type { NativeModule } from './types.js';

const PACKAGE_ROOT = fileURLToPath(new URL('../../', import.meta.url));
const BUILD = 'npm run build:native';
const INSTALL_TOOLS = 'sudo apt-get install -y cmake g++ make';

/** Where cmake-js and plain CMake leave the addon, in the order they are tried. */
export function addonCandidates(root: string = PACKAGE_ROOT): string[] {
  return ['build/Release/tpla.node', 'build/Debug/tpla.node', 'build/tpla.node'].map((path) => root + path);
}

let loaded: NativeModule | undefined;

/** The addon, loaded and checked on first use. Throws ADDON_LOAD_FAILED with every cause and the command that mends it. */
export function native(): NativeModule {
  loaded ??= loadAddon(addonCandidates(), packageVersion());
  return loaded;
}

/** Loads the first candidate that is there and works; `version` is what it has to report. */
export function loadAddon(candidates: string[], version: string): NativeModule {
  const failures: Failure[] = [];
  for (const path of candidates) {
    const header = readHeader(path);
    if (header === null) continue;
    try {
      const addon = createRequire(import.meta.url)(path) as NativeModule;
      const stale = checkVersion(addon, version);
      if (stale === null) return addon;
      failures.push({ path, ...stale });
    } catch (error) {
      failures.push({ path, ...explain(error as Error, header) });
    }
  }
  throw new TplaError('ADDON_LOAD_FAILED', failureText(candidates, failures));
}

interface Diagnosis {
  cause: string;
  mend: string;
}

interface Failure extends Diagnosis {
  path: string;
}

function failureText(candidates: string[], failures: Failure[]): string {
  if (failures.length === 0) {
    return [
      "tpla's native addon is not built. Looked for:",
      ...candidates.map((path) => `  ${path}`),
      `Build it with \`${BUILD}\` (needs cmake, g++ and make; on Debian or Ubuntu: \`${INSTALL_TOOLS}\`).`,
    ].join('\n');
  }
  return [
    "tpla's native addon cannot be loaded:",
    ...failures.map(({ path, cause }) => `  ${path}: ${cause}`),
    ...new Set(failures.map(({ mend }) => mend)),
  ].join('\n');
}

/** A module that loads may still be an old build; only one of this package's version will do. */
function checkVersion(addon: NativeModule, version: string): Diagnosis | null {
  const mend = `Rebuild it with \`${BUILD}\`.`;
  if (typeof addon.version !== 'string') return { cause: 'it exports no version, so it is not an addon of tpla', mend };
  return addon.version === version ? null : { cause: `it was built for version ${addon.version}, this is version ${version}`, mend };
}

function packageVersion(): string {
  return (JSON.parse(readFileSync(PACKAGE_ROOT + 'package.json', 'utf8')) as { version: string }).version;
}

// ---------------------------------------------------------------- why dlopen refused

const ELF_MACHINES: Record<number, string> = { 0x03: 'ia32', 0x28: 'arm', 0x3e: 'x64', 0xb7: 'arm64', 0xf3: 'riscv64', 0x15: 'ppc64', 0x16: 's390x' };

/** First bytes of a file, or null where there is none. */
function readHeader(path: string): Buffer | null {
  let fd: number;
  try {
    fd = openSync(path, 'r');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    return Buffer.alloc(0);
  }
  try {
    const header = Buffer.alloc(20);
    return header.subarray(0, readSync(fd, header, 0, header.length, 0));
  } catch {
    return Buffer.alloc(0);
  } finally {
    closeSync(fd);
  }
}

function explain(error: Error, header: Buffer): Diagnosis {
  const text = error.message.split('\n')[0] as string;
  const rebuild = `Rebuild it on this machine with \`${BUILD}\`.`;
  if (header.length >= 4 && header.readUInt32BE(0) !== 0x7f454c46) {
    return { cause: 'not an ELF shared object (damaged, or built for another operating system)', mend: rebuild };
  }
  const machine = header.length >= 20 ? (ELF_MACHINES[header.readUInt16LE(18)] ?? `ELF machine ${header.readUInt16LE(18)}`) : process.arch;
  if (machine !== process.arch) return { cause: `built for ${machine}, this Node runs on ${process.arch}`, mend: rebuild };

  const libc = /version `(GLIBC\w*_[\d.]+)' not found/.exec(text);
  if (libc) return { cause: `built against a newer C or C++ library than this machine has (${libc[1]} is missing)`, mend: rebuild };
  const library = /(?:Error loading shared library )?([\w.+-]+\.so[\w.]*): (?:cannot open shared object file|No such file)/.exec(text);
  if (library) {
    const name = library[1] as string;
    if (/^(libc\.musl|ld-musl|ld-linux)/.test(name)) return { cause: `built for another C library (it needs ${name})`, mend: rebuild };
    return { cause: `shared library ${name} is missing`, mend: `Install the package that has ${name} (\`apt-file search ${name}\`), or rebuild without it: \`${BUILD}\`.` };
  }
  if (/NODE_MODULE_VERSION|undefined symbol: napi_|self-register/.test(text)) {
    return { cause: `built for another Node (this one is ${process.version}, ABI ${process.versions.modules}): ${text}`, mend: rebuild };
  }
  return { cause: text, mend: rebuild };
}
