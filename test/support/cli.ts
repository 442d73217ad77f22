import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';

export const TPLA = fileURLToPath(new URL('../../bin/tpla.js', import.meta.url));

export interface CliResult {
  status: number | null;
  stdout: string;
  stderr: string;
}

/** Runs the built command line to its end. */
export function tpla(args: string[], options: { env?: Record<string, string>; cwd?: string; input?: string } = {}): Promise<CliResult> {
  const child = spawn(process.execPath, [TPLA, ...args], { cwd: options.cwd, env: { ...process.env, ...options.env } });
  child.stdin.end(options.input);
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (chunk: Buffer) => { stdout += chunk.toString(); });
  child.stderr.on('data', (chunk: Buffer) => { stderr += chunk.toString(); });
  return new Promise((resolve) => child.on('close', (status) => resolve({ status, stdout, stderr })));
}
