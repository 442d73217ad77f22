import ora from 'ora';
import { exitText } from './service_process.js';
import type { SupervisorEvent } from './supervisor.js';

/**
 * Tells a person on stderr what happens to a stack: with a spinner on a terminal, in plain lines elsewhere. What services write is held back
 * while they start, then passed on.
 */
export class StackConsole {
  readonly #spinner = process.stderr.isTTY ? ora({ stream: process.stderr, discardStdin: false }) : null;
  readonly #up = new Set<string>();
  #held: string[] | null = [];

  /** Something that takes a while, until the next call. */
  busy(text: string): void {
    if (this.#spinner) this.#spinner.start(text);
    else process.stderr.write(`${text}\n`);
  }

  handle(event: SupervisorEvent): void {
    switch (event.kind) {
      case 'starting':
        this.busy(`starting ${event.names.join(', ')}`);
        return;
      case 'ready':
        this.#say(`${event.name} ${this.#up.has(event.name) ? 'is back' : 'serves'} on ${event.addresses.join(', ')}`, 'succeed');
        this.#up.add(event.name);
        return;
      case 'ended':
        this.#say(endedText(event), 'fail');
        return;
      case 'line':
        if (this.#held) this.#held.push(event.line);
        else process.stderr.write(`${event.line}\n`);
    }
  }

  /** Everything is up: from now on lines pass as they come. */
  started(): void {
    this.done();
    for (const line of this.#held ?? []) process.stderr.write(`${line}\n`);
    this.#held = null;
  }

  /** Nothing is being waited for any more. */
  done(): void {
    this.#spinner?.stop();
  }

  /** A lasting line above the spinner, which goes on where it was turning. */
  #say(text: string, mark: 'succeed' | 'fail'): void {
    if (!this.#spinner) {
      process.stderr.write(`${text}\n`);
      return;
    }
    const turning = this.#spinner.isSpinning ? this.#spinner.text : null;
    this.#spinner[mark](text);
    if (turning !== null) this.#spinner.start(turning);
  }
}

function endedText({ name, exit, restartMs }: Extract<SupervisorEvent, { kind: 'ended' }>): string {
  const lines = exit.lastLines.map((line) => `\n    ${line}`).join('');
  return `${name} ended with ${exitText(exit)}, starting again in ${restartMs} ms${lines === '' ? '' : `; its last lines:${lines}`}`;
}
