import { RoleCommand, roleFlags } from '../cli/role_command.js';
import { loadRole } from '../roles/start.js';

export default class ServeDecode extends RoleCommand {
  static override summary = 'Serve a decode worker';
  static override description = `Owns paged KV memory, takes prompts whose KV has landed there and was verified, and streams tokens.`;
  static override examples = [
    '<%= config.bin %> <%= command.id %> -c configs/decode.yaml',
    '<%= config.bin %> <%= command.id %> --listen unix:/run/tpla/decode-0.sock --model models/demo --attention tpla --ranks 2',
  ];
  static override flags = roleFlags('decode');

  async run(): Promise<unknown> {
    return this.serve('decode', () => loadRole('decode'));
  }
}
