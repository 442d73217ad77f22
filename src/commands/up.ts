import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { Flags } from '@oclif/core';
import { stringify } from 'yaml';
import { BaseCommand } from '../cli/base_command.js';
import { StackConsole } from '../up/console.js';
import { prepareCheckpoint } from '../up/checkpoint.js';
import { loadStack } from '../up/stack_config.js';
import { withStack } from '../up/with_stack.js';

const DEFAULT_STACK = fileURLToPath(new URL('../../configs/up.yaml', import.meta.url));

export default class Up extends BaseCommand {
  static override summary = 'Start a whole stack on this machine and keep it serving';
  static override description = `Starts each service of a YAML file as a process, in order of readiness, and restarts with back-off what ends by itself.
Ctrl-C drains and stops everything; a second one ends it at once.`;
  static override examples = ['<%= config.bin %> <%= command.id %>', '<%= config.bin %> <%= command.id %> -c stack.yaml'];
  static override flags = {
    config: Flags.file({ char: 'c', description: 'Stack to start', helpValue: 'FILE', default: DEFAULT_STACK, defaultHelp: 'configs/up.yaml' }),
    'print-config': Flags.boolean({ description: 'Print the stack with its defaults as YAML (JSON with --json) and end' }),
  };
  static override enableJsonFlag = true;

  async run(): Promise<unknown> {
    const { flags } = await this.parse(Up);
    const stack = loadStack(flags.config);
    if (flags['print-config']) {
      this.log(stringify(stack).trimEnd());
      return stack;
    }
    const console = new StackConsole();
    const prepare = async (directory: string, stopping: AbortSignal) => (
      await prepareCheckpoint(stack, flags.config, directory, stopping, (text) => console.busy(text))
    ).stack;
    await withStack(prepare, {
      where: flags.config,
      onEvent: (event) => console.handle(event),
      onStopping: () => console.busy('stopping'),
    }, async ({ stopping }) => {
      console.started();
      this.log('Ctrl-C stops everything.');
      if (!stopping.aborted) await once(stopping, 'abort');
    }).finally(() => console.done());
    return undefined;
  }
}
