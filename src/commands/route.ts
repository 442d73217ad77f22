import { RoleCommand, roleFlags } from '../cli/role_command.js';
import { loadRole } from '../roles/start.js';

export default class Route extends RoleCommand {
  static override summary = 'Serve the OpenAI-compatible front door';
  static override description = `Takes completions and chat completions, places each on a decode and a prefill worker, and streams the answer.`;
  static override examples = [
    '<%= config.bin %> <%= command.id %> -c configs/route.yaml',
    '<%= config.bin %> <%= command.id %> --model models/demo --prefill unix:/run/tpla/prefill-0.sock --decode unix:/run/tpla/decode-0.sock',
  ];
  static override flags = roleFlags('route');

  async run(): Promise<unknown> {
    return this.serve('route', () => loadRole('route'));
  }
}
