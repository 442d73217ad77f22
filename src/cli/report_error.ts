import { ExitError } from '@oclif/core/errors';
import { nearest } from '../config/suggest.js';
import { TplaError, toTplaError } from '../errors.js';

/** What a person or a script is told, and the status the process ends with. */
export interface Failure {
  error: TplaError;
  exitStatus: number;
}

/** Puts whatever ended a command into terms of the error table. `commands` are the names a misspelt one is compared with. */
export function explainFailure(thrown: unknown, commands: string[] = []): Failure {
  const error = isCommandLineError(thrown) ? new TplaError('USAGE', usageText(thrown.message, commands), { cause: thrown }) : toTplaError(thrown);
  return { error, exitStatus: error.exitStatus };
}

/** `this.exit(n)`, --help and --version end a command without there being anything to report. */
export function isPlainExit(thrown: unknown): thrown is ExitError {
  return thrown instanceof ExitError;
}

/** One line on stderr; details follow indented. With `verbose`, the stack too. */
export function writeFailure({ error }: Failure, verbose: boolean): void {
  process.stderr.write(`tpla: ${error.code}: ${error.message}\n`);
  if (!verbose) return;
  for (let cause: unknown = error; cause instanceof Error; cause = cause.cause) process.stderr.write(`${cause.stack}\n`);
}

function isCommandLineError(thrown: unknown): thrown is Error {
  return thrown instanceof Error && !(thrown instanceof TplaError) && 'oclif' in thrown;
}

function usageText(message: string, commands: string[]): string {
  const unknown = /^command (.+) not found$/.exec(message);
  if (unknown) {
    const near = nearest(unknown[1] as string, commands);
    return `there is no command "${unknown[1]}"; ${near === null ? 'see `tpla --help`' : `did you mean "${near}"?`}`;
  }
  return message.replace(/\nSee more help with --help$/, '').replaceAll('\n', ' ');
}
