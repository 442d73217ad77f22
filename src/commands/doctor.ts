import { BaseCommand } from '../cli/base_command.js';
import { examine, type Examination } from '../doctor/examine.js';
import { printExamination } from '../doctor/print.js';
import { ERRORS } from '../errors.js';

export default class Doctor extends BaseCommand {
  static override summary = 'Say what this machine offers and what is missing';
  static override description = `CPU instruction sets, GPUs and the links between them, libraries that are opened at run time, and limits.
Ends with status ${ERRORS.ADDON_LOAD_FAILED.exit} where the native addon cannot be loaded.`;
  static override examples = ['<%= config.bin %> <%= command.id %>', '<%= config.bin %> <%= command.id %> --json'];
  static override enableJsonFlag = true;

  async run(): Promise<Examination> {
    await this.parse(Doctor);
    const found = await examine(this.config.version);
    this.log(printExamination(found));
    if (!found.addon.loaded) process.exitCode = ERRORS.ADDON_LOAD_FAILED.exit;
    return found;
  }
}
