import { Config, flush, run } from '@oclif/core';
import { explainFailure, isPlainExit, writeFailure } from './report_error.js';

/** Entry point of bin/tpla.js: `url` is the entry file's, from which oclif finds the package. */
export async function main(url: string, argv: string[] = process.argv.slice(2)): Promise<void> {
  try {
    await run(argv, url);
  } catch (thrown) {
    if (isPlainExit(thrown)) {
      process.exitCode = thrown.oclif.exit ?? 0;
    } else {
      const failure = explainFailure(thrown, (await Config.load(url)).commandIDs);
      writeFailure(failure, false);
      process.exitCode = failure.exitStatus;
    }
  }
  await flush();
  // What failed may have left a server or a thread open; that must not keep the process.
  if (process.exitCode) process.exit();
}
