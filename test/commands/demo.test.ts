import { spawn, type ChildProcess } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { DemoReport } from '../../src/demo/report.js';
import { sweepRuntimeDirs } from '../../src/up/runtime_dir.js';
import { tpla, TPLA } from '../support/cli.js';
import { noneLeft, processesWith } from '../support/processes.js';

const test = suite('demo');
/** Everything the demo starts inherits this in its environment, and keeps its files here. */
const runtime = mkdtempSync(join(tmpdir(), 'tpla-demo-'));
const env = { XDG_RUNTIME_DIR: runtime };
test.after(() => {
  for (const pid of processesWith(runtime)) process.kill(pid, 'SIGKILL');
  rmSync(runtime, { recursive: true });
});
test.after.each(async () => {
  try {
    await noneLeft(runtime);
    assert.equal(readdirSync(runtime), []);
  } finally {
    for (const pid of processesWith(runtime)) process.kill(pid, 'SIGKILL');
    for (const name of readdirSync(runtime)) rmSync(join(runtime, name), { recursive: true });
  }
});

interface Demo {
  child: ChildProcess;
  stderr(): string;
  stdout(): string;
  ended: Promise<number | string>;
  /** Resolves when `text` has been written on either stream. */
  saying(text: string): Promise<void>;
}

function start(...args: string[]): Demo {
  const child = spawn(process.execPath, [TPLA, 'demo', ...args], { env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'] });
  let stdout = '';
  let stderr = '';
  child.stdout!.on('data', (chunk: Buffer) => { stdout += chunk.toString(); });
  child.stderr!.on('data', (chunk: Buffer) => { stderr += chunk.toString(); });
  const ended = new Promise<number | string>((resolve) => child.on('close', (code, signal) => resolve(code ?? String(signal))));
  const saying = async (text: string) => {
    while (!(stdout + stderr).includes(text)) {
      if (child.exitCode !== null) throw new Error(`ended before it said "${text}": ${stderr}`);
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  };
  return { child, stdout: () => stdout, stderr: () => stderr, ended, saying };
}

test('--json prints one object: TPLA on two ranks, half the latent and the whole rope key on each', async () => {
  const { status, stdout, stderr } = await tpla(['demo', '--json', '--max-tokens', '24'], { env });
  assert.is(status, 0, stderr);
  const report = JSON.parse(stdout) as DemoReport;
  assert.ok(report.text.length > 20, report.text);
  assert.match(report.reparam ?? '', '2 groups');
  const { ttft_ms, prefill, transfer, decode } = report;
  for (const [name, value] of Object.entries({ ttft_ms, prefill: prefill.ms, transfer: transfer.ms, tpot: decode.tpot_ms })) assert.ok(value > 0, `${name} ${value}`);
  assert.is(prefill.attention, 'mla');
  assert.ok(prefill.tokens > 100 && ttft_ms >= prefill.ms);
  assert.equal([decode.attention, decode.ranks, decode.tokens], ['tpla', 2, 24]);
  // 7 layers of bf16: 128 latent + 32 rope against 64 + 32.
  assert.is(decode.mla_kv_bytes_per_token_per_rank, 7 * (128 + 32) * 2);
  assert.is(decode.kv_bytes_per_token_per_rank, 7 * (64 + 32) * 2);
  assert.is(transfer.path, 'shm');
  assert.is(transfer.bytes, prefill.tokens * decode.kv_bytes_per_token_per_rank * 2);
});

test('for a person: prompt and continuation, then the table', async () => {
  const { status, stdout, stderr } = await tpla(['demo', '--attention', 'dcp', '--ranks', '2', '--prompt', 'To create an index,', '--max-tokens', '8'], { env });
  assert.is(status, 0, stderr);
  assert.match(stdout, /^\nTo create an index,./);
  for (const row of [/^prefill +mla attention +\d+ tokens/m, /^KV hand-off +through shm +[\d,]+ bytes/m, /^decode +dcp attention, 2 ranks +8 tokens +[\d.]+ ms a token$/m, /^TTFT +first request of a fresh stack +[\d.]+ ms$/m]) assert.match(stdout, row);
  assert.not.match(stdout, 'rotated');
});

for (const [moment, words, attention] of [['the checkpoint is prepared', 'rotating', 'tpla'], ['workers start', 'starting prefill-0', 'mla'], ['tokens stream', 'If a standby falls behind, ', 'mla']] as const) {
  test(`Ctrl-C while ${moment} leaves nothing, with status 130`, async () => {
    const demo = start('--max-tokens', '2000', '--attention', attention);
    await demo.saying(words);
    demo.child.kill('SIGINT');
    assert.is(await demo.ended, 130, demo.stderr());
    assert.match(demo.stderr(), 'tpla: CANCELLED');
  });
}

test('a second Ctrl-C ends it at once', async () => {
  const demo = start('--max-tokens', '2000', '--attention', 'mla');
  await demo.saying('starting prefill-0');
  demo.child.kill('SIGINT');
  demo.child.kill('SIGTERM');
  assert.is(await demo.ended, 130);
});

test('kill -9 ends its services too; what is left of its files is swept by the next', async () => {
  const demo = start('--max-tokens', '2000', '--attention', 'mla');
  await demo.saying('starting route-0');
  demo.child.kill('SIGKILL');
  assert.is(await demo.ended, 'SIGKILL');
  await noneLeft(runtime);
  assert.is(readdirSync(runtime).length, 1);
  await sweepRuntimeDirs(runtime);
});

test('a prompt that is too long is told with its code', async () => {
  const { status, stderr, stdout } = await tpla(['demo', '--attention', 'mla', '--json', '--prompt', 'word '.repeat(6000)], { env });
  assert.is(status, 2);
  assert.match(stderr, 'tpla: CONTEXT_LENGTH_EXCEEDED: ');
  assert.is((JSON.parse(stdout) as { error: { code: string } }).error.code, 'CONTEXT_LENGTH_EXCEEDED');
});

test.run();
