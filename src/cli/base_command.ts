import { Command } from '@oclif/core';
import { readVariables } from '../config/env.js';
import { errorBody } from '../http/error_body.js';
import { explainFailure, isPlainExit, writeFailure } from './report_error.js';

/** What every command shares: coded errors, exit statuses of the error table, plain JSON. */
export abstract class BaseCommand extends Command {
  protected override async catch(thrown: Error): Promise<void> {
    if (isPlainExit(thrown)) throw thrown;
    const failure = explainFailure(thrown);
    if (this.jsonEnabled()) this.logJson(errorBody(failure.error));
    writeFailure(failure, this.isVerbose());
    process.exitCode = failure.exitStatus;
  }

  /** One JSON value, without the colours oclif would add. */
  protected override logJson(json: unknown): void {
    process.stdout.write(`${JSON.stringify(json, null, 2)}\n`);
  }

  /** Asked for by --log-level debug; read from the raw arguments because parsing them may be what failed. */
  private isVerbose(): boolean {
    const at = this.argv.findIndex((argument) => argument === '--log-level' || argument.startsWith('--log-level='));
    const typed = at < 0 ? undefined : this.argv[at]?.split('=')[1] ?? this.argv[at + 1];
    const level = typed ?? readVariables(['TPLA_LOG_LEVEL']).get('TPLA_LOG_LEVEL');
    return level === 'debug' || level === 'trace';
  }
}
