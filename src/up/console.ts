import ora, { type Ora } from 'ora';
import { exitText } from './service_process.js';
import type { SupervisorEvent } from './supervisor.js';

/** Tells a person on stderr what happens to a stack. What services write is held back while the spinner turns, then passed on. */
export class StackConsole {
  readonly #spinner: Ora = ora({ stream: process.stderr, discardStdin: false });
  readonly #up = new Set<string>();
  #held: string[] | null = [];

  handle(event: SupervisorEvent): void {
    switch (event.kind) {
      case 'starting':
        this.#spinner.start(`starting ${event.names.join(', ')}`);
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
    this.#spinner.stop();
    for (const line of this.#held ?? []) process.stderr.write(`${line}\n`);
    this.#held = null;
  }

  stopping(): void {
    this.#spinner.start('stopping');
  }

  stopped(): void {
    this.#spinner.stop();
  }

  /** A lasting line above the spinner, which goes on where it was turning. */
  #say(text: string, mark: 'succeed' | 'fail'): void {
    const turning = this.#spinner.isSpinning ? this.#spinner.text : null;
    this.#spinner[mark](text);
    if (turning !== null) this.#spinner.start(turning);
  }
}

function endedText({ name, exit, restartMs }: Extract<SupervisorEvent, { kind: 'ended' }>): string {
  const lines = exit.lastLines.map((line) => `\n    ${line}`).join('');
  return `${name} ended with ${exitText(exit)}, starting again in ${restartMs} ms${lines === '' ? '' : `; its last lines:${lines}`}`;
}
