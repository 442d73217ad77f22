import { RoleCommand, roleFlags } from '../cli/role_command.js';
import { loadRole } from '../roles/start.js';

export default class KvPool extends RoleCommand {
  static override summary = 'Serve a pool of KV blocks for the workers of this host';
  static override description = `Keeps canonical KV blocks in shared memory, found by the hash of their tokens, so that a prompt seen before is not computed again.`;
  static override examples = [
    '<%= config.bin %> <%= command.id %> -c configs/pool.yaml',
    '<%= config.bin %> <%= command.id %> --listen unix:/run/tpla/pool-0.sock --dram-bytes 32GiB',
  ];
  static override flags = roleFlags('pool');

  async run(): Promise<unknown> {
    return this.serve('pool', () => loadRole('pool'));
  }
}
