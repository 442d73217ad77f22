import { closeSync, existsSync, fsyncSync, mkdirSync, openSync, readFileSync, readdirSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { TplaError } from '../errors.js';
import { canonicalJson } from '../model/checkpoint.js';
import { attemptWrite } from '../model/safetensors_writer.js';

const WORK = '.tpla-reparam';

/**
 * What an unfinished conversion has done so far, in `OUT/.tpla-reparam/`: its plan, and one file per finished layer. Everything is
 * written beside its name and renamed once it is on disk, so after kill -9 a name stands for a whole file. `config.json` is the last
 * file of a conversion: a directory without it does not load.
 */
export class Journal {
  readonly dir: string;
  readonly #work: string;

  private constructor(dir: string) {
    this.dir = dir;
    this.#work = join(dir, WORK);
  }

  /** Starts a conversion in `dir`, or goes on with the one that was begun there under the same plan. */
  static open(dir: string, plan: object): { journal: Journal; resumed: boolean } {
    const journal = new Journal(dir);
    const entries = existsSync(dir) ? readdirSync(dir) : [];
    const planPath = join(journal.#work, 'plan.json');
    if (entries.includes('config.json')) {
      // Of a conversion that was killed when it had only this left to do.
      if (existsSync(planPath)) journal.close();
      throw new TplaError('USAGE', `${dir} already holds a checkpoint; choose another output directory or remove it`);
    }
    if (existsSync(planPath)) {
      if (readFileSync(planPath, 'utf8') !== canonicalJson(plan)) {
        throw new TplaError('USAGE', `${dir} holds an unfinished conversion of another checkpoint or with other options; remove it or choose another output directory`);
      }
      return { journal, resumed: true };
    }
    if (entries.some((entry) => entry !== WORK)) throw new TplaError('USAGE', `${dir} is not empty; choose another output directory`);
    attemptWrite(dir, () => mkdirSync(journal.#work, { recursive: true }));
    journal.writeText(join(WORK, 'plan.json'), canonicalJson(plan));
    return { journal, resumed: false };
  }

  /** How many steps with such names an interrupted conversion to `dir` has finished. */
  static finished(dir: string, names: RegExp): number {
    try {
      return readdirSync(join(dir, WORK)).filter((name) => names.test(name)).length;
    } catch {
      return 0;
    }
  }

  /** File of a finished or future step, inside the work directory. */
  path(name: string): string {
    return join(this.#work, name);
  }

  has(name: string): boolean {
    return existsSync(this.path(name));
  }

  /** Files of steps that later ones have replaced. */
  remove(names: RegExp): void {
    for (const name of readdirSync(this.#work)) if (names.test(name)) rmSync(join(this.#work, name), { recursive: true });
  }

  readJson<T>(name: string): T {
    return JSON.parse(readFileSync(this.path(name), 'utf8')) as T;
  }

  writeJson(name: string, value: unknown): void {
    this.writeText(join(WORK, name), JSON.stringify(value));
  }

  /** Writes a file of the output directory at once or not at all. */
  writeText(name: string, text: string): void {
    writeAtomically(join(this.dir, name), text);
  }

  /** The conversion is complete: what only resuming needs goes away. */
  close(): void {
    rmSync(this.#work, { recursive: true, force: true });
  }
}

/** The file has its old content or the new one, whenever the machine stops. */
export function writeAtomically(path: string, content: string | Uint8Array): void {
  const partial = `${path}.partial`;
  attemptWrite(path, () => {
    try {
      writeFileSync(partial, content);
    } catch (error) {
      rmSync(partial, { force: true });
      throw error;
    }
    const fd = openSync(partial, 'r');
    fsyncSync(fd);
    closeSync(fd);
    renameSync(partial, path);
  });
}
