import { copyFileSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { spawnSync } from 'node:child_process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import { addonCandidates, loadAddon, native } from '../../src/native/loader.js';

const test = suite('native/loader');
const dir = mkdtempSync(join(tmpdir(), 'tpla-loader-'));
const real = addonCandidates()[0] as string;
const version = (JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as { version: string }).version;

test.after(() => rmSync(dir, { recursive: true }));

function failure(paths: string[], wanted = version): string {
  try {
    loadAddon(paths, wanted);
  } catch (error) {
    assert.instance(error, TplaError);
    assert.is((error as TplaError).code, 'ADDON_LOAD_FAILED');
    return (error as TplaError).message;
  }
  throw new Error('the addon loaded');
}

test('loads and probes the built addon, once', () => {
  assert.is(native().probe().version, version);
  assert.is(native(), native());
});

test('a missing build names where it looked and how to build', () => {
  const text = failure([join(dir, 'none.node')]);
  assert.match(text, 'not built');
  assert.match(text, join(dir, 'none.node'));
  assert.match(text, 'npm run build:native');
  assert.match(text, 'apt-get install -y cmake g++ make');
});

test('a file that is no ELF object', () => {
  const path = join(dir, 'text.node');
  writeFileSync(path, 'version https://git-lfs.github.com/spec/v1\n');
  assert.match(failure([path]), 'not an ELF shared object');
});

test('another architecture', () => {
  const path = join(dir, 'arch.node');
  const bytes = readFileSync(real);
  bytes.writeUInt16LE(process.arch === 'arm64' ? 0x3e : 0xb7, 18);
  writeFileSync(path, bytes);
  assert.match(failure([path]), /built for (arm64|x64), this Node runs on/);
});

test('a truncated file', () => {
  const path = join(dir, 'short.node');
  copyFileSync(real, path);
  truncateSync(path, 40);
  assert.match(failure([path]), /file too short|invalid ELF header|cannot read file data/);
});

test('a shared library that is not there is named', () => {
  const source = join(dir, 'needs.c');
  writeFileSync(source, 'int x;');
  const run = (...args: string[]) => assert.is(spawnSync('g++', args, { cwd: dir }).status, 0, args.join(' '));
  run('-shared', '-fPIC', '-o', 'libtplagone.so.1', '-Wl,-soname,libtplagone.so.1', '-x', 'c', source);
  run('-shared', '-fPIC', '-Wl,--no-as-needed', '-o', 'needs.node', '-x', 'c', source, '-x', 'none', 'libtplagone.so.1');
  rmSync(join(dir, 'libtplagone.so.1'));
  const text = failure([join(dir, 'needs.node')]);
  assert.match(text, 'shared library libtplagone.so.1 is missing');
  assert.match(text, 'apt-file search libtplagone.so.1');
});

test('an object that is not an addon, and an addon of another version: both causes in one text', () => {
  const source = join(dir, 'plain.c');
  writeFileSync(source, 'int y;');
  assert.is(spawnSync('g++', ['-shared', '-fPIC', '-o', 'plain.node', '-x', 'c', source], { cwd: dir }).status, 0);
  const text = failure([join(dir, 'plain.node'), real], '9.9.9');
  assert.match(text, 'built for another Node');
  assert.match(text, `built for version ${version}, this is version 9.9.9`);
});

test.run();
