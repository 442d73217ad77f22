import { spawn, type ChildProcess } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { HandoffTicket } from '../../src/transfer/types.js';
import { until } from './handoff.js';

/** A process at the other end; its lines as they come. */
export class Peer {
  readonly lines: string[] = [];
  readonly child: ChildProcess;
  readonly ended: Promise<unknown>;

  constructor(args: string[], wrapper: string[] = [], env: Record<string, string> = {}) {
    const script = join(import.meta.dirname, 'handoff_peer.ts');
    const [command, ...rest] = [...wrapper, process.execPath, '--import', 'tsx', script, ...args];
    this.child = spawn(command!, rest, { stdio: ['pipe', 'pipe', 'inherit'], env: { ...process.env, ...env } });
    createInterface({ input: this.child.stdout! }).on('line', (line) => this.lines.push(line));
    this.ended = new Promise((resolve) => this.child.on('exit', resolve));
  }

  tell(ticket: HandoffTicket): void {
    this.child.stdin!.write(`${JSON.stringify(ticket)}\n`);
  }

  async line(start: string): Promise<string> {
    await until(() => this.lines.some((line) => line.startsWith(start)), `"${start}" from the peer; it said ${this.lines.join(' | ')}`, 60_000);
    return this.lines.find((line) => line.startsWith(start))!;
  }

  async kill(): Promise<void> {
    this.child.kill('SIGKILL');
    await this.ended;
  }
}
