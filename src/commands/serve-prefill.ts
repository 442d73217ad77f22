import { RoleCommand, roleFlags } from '../cli/role_command.js';
import { loadRole } from '../roles/start.js';

export default class ServePrefill extends RoleCommand {
  static override summary = 'Serve a prefill worker';
  static override description = `Computes prompts in chunks and pushes their KV, layer by layer, into the pages a decode worker has reserved.`;
  static override examples = [
    '<%= config.bin %> <%= command.id %> -c configs/prefill.yaml',
    '<%= config.bin %> <%= command.id %> --listen unix:/run/tpla/prefill-0.sock --model models/demo --pool unix:/run/tpla/pool-0.sock',
    '<%= config.bin %> <%= command.id %> -c configs/prefill.yaml --kv-pages 4096 --print-config',
  ];
  static override flags = roleFlags('prefill');

  async run(): Promise<unknown> {
    return this.serve('prefill', () => loadRole('prefill'));
  }
}
