/**
 * Runs test/**\/*.test.ts, each file in a process group of its own, two at a time.
 *
 *   npm test                     all of them
 *   npm test -- kv model/config  only files whose path contains one of the words
 *   npm run test:gpu             test/gpu instead, one file at a time, on a machine with a GPU and an addon built with CUDA
 *
 * A file fails when it exits non-zero, runs past its time, ran no test, or leaves processes behind. A file that needs longer than
 * the default says so in a comment: `// time limit: 600 s`. The last line is `N passed, N failed`, counted in tests.
 */
import { spawn } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { toTplaError } from '../src/errors.js';
import { native } from '../src/native/loader.js';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const PARALLEL = 2;
const DEFAULT_LIMIT_S = 300;
/** Test files say so where they leave tests out, and why. */
const SKIPPED = /^(skipping .+)$/gm;
/** How long a finished test's children may take to end. */
const LEFTOVER_GRACE_MS = 3000;

interface FileResult {
  file: string;
  passed: number;
  failed: number;
  skipped: number;
  /** Why the file failed beyond what its tests say, or null. */
  fault: string | null;
  output: string;
  seconds: number;
}

async function main(args: string[]): Promise<number> {
  const onGpu = args.includes('--gpu');
  const words = args.filter((arg) => arg !== '--gpu');
  const files = testFiles(onGpu).filter((file) => words.length === 0 || words.some((word) => file.includes(word)));
  if (files.length === 0) {
    console.log(`no test file under test/ has ${words.map((word) => `"${word}"`).join(' or ')} in its path`);
    return 1;
  }
  if (onGpu) {
    try {
      console.log(`on ${(await native().attention.describeGpu(0)).name}`);
    } catch (thrown) {
      const error = toTplaError(thrown);
      console.error(`tpla: ${error.code}: the GPU tests cannot run: ${error.message}`);
      return error.exitStatus;
    }
  }
  const results = await runAll(files, onGpu ? 1 : PARALLEL);
  const failures = results.filter((result) => result.failed > 0);
  for (const result of failures) {
    console.log(`\n──── ${result.file}${result.fault === null ? '' : `: ${result.fault}`}\n${result.output.trimEnd()}`);
  }
  if (failures.length > 0) console.log(`\nfailed files:\n${failures.map(({ file, fault }) => `  ${file}${fault === null ? '' : ` (${fault})`}`).join('\n')}\n`);
  const sum = (key: 'passed' | 'failed' | 'skipped') => results.reduce((total, result) => total + result[key], 0);
  const skipped = sum('skipped');
  console.log(`${sum('passed')} passed, ${sum('failed')} failed${skipped > 0 ? `, ${skipped} skipped` : ''}`);
  return failures.length > 0 ? 1 : 0;
}

/** Those of test/gpu, or all the others. */
function testFiles(gpu: boolean): string[] {
  return readdirSync(join(ROOT, 'test'), { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('.test.ts') && name.startsWith('gpu/') === gpu)
    .map((name) => relative(ROOT, join(ROOT, 'test', name)))
    .sort();
}

async function runAll(files: string[], parallel: number): Promise<FileResult[]> {
  const results: FileResult[] = [];
  const queue = [...files];
  const worker = async () => {
    for (let file = queue.shift(); file !== undefined; file = queue.shift()) {
      const result = await runFile(file);
      results.push(result);
      const counts = `${result.passed} passed${result.failed > 0 ? `, ${result.failed} failed` : ''}${result.skipped > 0 ? `, ${result.skipped} skipped` : ''}`;
      console.log(`${result.failed > 0 ? 'FAIL' : 'ok  '} ${file}  ${counts}  ${result.seconds.toFixed(1)} s`);
      for (const [, why] of result.skipped > 0 ? result.output.matchAll(SKIPPED) : []) console.log(`       ${why}`);
    }
  };
  await Promise.all(Array.from({ length: parallel }, worker));
  return results;
}

async function runFile(file: string): Promise<FileResult> {
  const started = performance.now();
  const limitS = Number(/^\/\/ time limit: (\d+) s$/m.exec(readFileSync(join(ROOT, file), 'utf8'))?.[1] ?? DEFAULT_LIMIT_S);
  const child = spawn(process.execPath, ['--import', 'tsx', file], {
    cwd: ROOT,
    detached: true,
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, FORCE_COLOR: '0' },
  });
  const group = child.pid!;
  running.add(group);
  let output = '';
  child.stdout.on('data', (chunk: Buffer) => { output += chunk.toString(); });
  child.stderr.on('data', (chunk: Buffer) => { output += chunk.toString(); });
  let timedOut = false;
  const timer = setTimeout(() => { timedOut = true; killGroup(group); }, limitS * 1000);
  const ending = await new Promise<string | null>((resolve) => {
    child.on('exit', (code, signal) => resolve(signal !== null ? `ended by ${signal}` : code === 0 ? null : `exit status ${code}`));
  });
  clearTimeout(timer);
  const leftover = await endsWithin(group, LEFTOVER_GRACE_MS) ? null : 'left processes behind';
  killGroup(group);
  running.delete(group);
  await drained(child.stdout, child.stderr);
  return judge(file, output, timedOut ? `still running after ${limitS} s` : ending ?? leftover, (performance.now() - started) / 1000);
}

/** Reads uvu's closing summaries (one, or one per batch of suites). A file at fault counts as one failure at least. */
function judge(file: string, output: string, fault: string | null, seconds: number): FileResult {
  const read = (label: string) => [...output.matchAll(new RegExp(`^ {2}${label}: +(\\d+)`, 'gm'))].reduce((sum, match) => sum + Number(match[1]), 0);
  const total = read('Total');
  const passed = read('Passed');
  const skipped = read('Skipped');
  if (total + skipped === 0) {
    return { file, passed: 0, failed: 1, skipped: 0, fault: fault ?? 'ran no test', output, seconds };
  }
  // uvu's total leaves skipped tests out.
  const failed = total - passed;
  return { file, passed, failed: fault === null ? failed : Math.max(failed, 1), skipped, fault: failed > 0 ? null : fault, output, seconds };
}

const running = new Set<number>();

function killGroup(group: number): void {
  try {
    process.kill(-group, 'SIGKILL');
  } catch { /* the group is gone, as it should be */ }
}

async function endsWithin(group: number, graceMs: number): Promise<boolean> {
  for (const deadline = performance.now() + graceMs; ; await new Promise((resolve) => setTimeout(resolve, 50))) {
    try {
      process.kill(-group, 0);
    } catch {
      return true;
    }
    if (performance.now() > deadline) return false;
  }
}

/** Resolves when both pipes are read to the end; a grandchild outside the group may hold them open, so not forever. */
async function drained(...streams: NodeJS.ReadableStream[]): Promise<void> {
  const ends = streams.map((stream) => new Promise<void>((resolve) => {
    if (!stream.readable) resolve();
    else stream.once('close', () => resolve());
  }));
  await Promise.race([Promise.all(ends), new Promise((resolve) => setTimeout(resolve, 500).unref())]);
}

for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.on(signal, () => {
    for (const group of running) killGroup(group);
    process.exit(130);
  });
}

process.exit(await main(process.argv.slice(2)));
