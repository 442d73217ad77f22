import { fileURLToPath } from 'node:url';
import { Flags } from '@oclif/core';
import { BaseCommand } from '../cli/base_command.js';
import { DEMO_PROMPT } from '../demo/prompt.js';
import { demoTable, type DemoReport } from '../demo/report.js';
import { runDemo } from '../demo/run.js';
import { StackConsole } from '../up/console.js';

const DEMO_MODEL = fileURLToPath(new URL('../../models/demo', import.meta.url));

export default class Demo extends BaseCommand {
  static override summary = 'See prefill, KV hand-off and TPLA decode work together, in separate processes';
  static override description = `Starts kv-pool, a prefill worker, a decode worker and route on Unix sockets, streams a completion of the shipped model, and says where the
time and the bytes went. Nothing it started is left afterwards.`;
  static override examples = [
    '<%= config.bin %> <%= command.id %>',
    '<%= config.bin %> <%= command.id %> --attention dcp --ranks 4 --prompt "To create an index,"',
    '<%= config.bin %> <%= command.id %> --json',
  ];
  static override enableJsonFlag = true;
  static override flags = {
    prompt: Flags.string({ description: 'Text to continue', default: DEMO_PROMPT, defaultHelp: 'a paragraph on database replication' }),
    'max-tokens': Flags.integer({ description: 'Tokens to generate', default: 96, min: 2, max: 2048 }),
    attention: Flags.option({ options: ['tpla', 'mla', 'dcp', 'dp'] as const, description: 'How decode spreads KV over its ranks', default: 'tpla' as const })(),
    ranks: Flags.integer({ description: 'Ranks of decode', default: 2, min: 1, max: 64 }),
    model: Flags.directory({ description: 'Checkpoint to serve', default: DEMO_MODEL, defaultHelp: 'models/demo' }),
  };

  async run(): Promise<DemoReport> {
    const { flags } = await this.parse(Demo);
    const console = new StackConsole();
    const quiet = this.jsonEnabled();
    const report = await runDemo({ model: flags.model, prompt: flags.prompt, maxTokens: flags['max-tokens'], attention: flags.attention, ranks: flags.ranks }, {
      busy: (text) => console.busy(text),
      handle: (event) => console.handle(event),
      started: () => {
        console.started();
        if (!quiet) process.stdout.write(`\n${flags.prompt}`);
      },
      text: (text) => { if (!quiet) process.stdout.write(text); },
    }).finally(() => console.done());
    this.log(`\n\n${demoTable(report)}`);
    return report;
  }
}
