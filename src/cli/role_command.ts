import { Flags } from '@oclif/core';
import { stringify } from 'yaml';
import { configFileFromEnv } from '../config/env.js';
import { loadRoleConfig } from '../config/load.js';
import type { RoleConfigs, RoleName } from '../config/types.js';
import { runRole, type StartRole } from '../roles/run.js';
import { BaseCommand } from './base_command.js';
import { settingFlags } from './role_flags.js';

export function roleFlags(role: RoleName) {
  return {
    config: Flags.file({ char: 'c', description: 'YAML file [TPLA_CONFIG]; flags and TPLA_… variables go over it', helpValue: 'FILE' }),
    'print-config': Flags.boolean({ description: 'Print the resulting configuration as YAML (JSON with --json) and end' }),
    supervised: Flags.boolean({ hidden: true, description: 'End when standard input closes: set by `tpla up`' }),
    ...settingFlags(role),
  };
}

/** A command that serves a role until it is told to stop. */
export abstract class RoleCommand extends BaseCommand {
  static override enableJsonFlag = true;

  /** Resolves to the effective configuration under --print-config; otherwise the process ends with the role. */
  protected async serve<R extends RoleName>(role: R, load: () => Promise<StartRole<RoleConfigs[R]>>): Promise<unknown> {
    const { flags } = await this.parse({ flags: roleFlags(role), enableJsonFlag: true } as never) as { flags: Record<string, string | string[] | boolean | undefined> };
    const { config: file = configFileFromEnv(), 'print-config': print, supervised, json: _json, ...typed } = flags;
    const config = loadRoleConfig(role, {
      ...(typeof file === 'string' ? { file } : {}), flags: typed as Record<string, string | string[]>, note: (line) => this.logToStderr(line),
    });
    if (print) {
      this.log(stringify(config).trimEnd());
      return config;
    }
    process.exit(await runRole(role, await load(), config, { supervised: supervised === true }));
  }
}
