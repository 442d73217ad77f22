import { readFileSync, readdirSync } from 'node:fs';

/** Pids of the processes whose command line or environment has `text`, this one left out. */
export function processesWith(text: string): number[] {
  return readdirSync('/proc').map(Number).filter((pid) => {
    if (!(pid > 0) || pid === process.pid) return false;
    try {
      if (/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))) return false;
      return ['cmdline', 'environ'].some((file) => readFileSync(`/proc/${pid}/${file}`, 'latin1').includes(text));
    } catch {
      return false; // it ended while we looked
    }
  });
}

/** Resolves when there is none left; throws with what is after 20 s. */
export async function noneLeft(text: string): Promise<void> {
  for (const deadline = Date.now() + 20_000; ; await new Promise((resolve) => setTimeout(resolve, 20))) {
    const pids = processesWith(text);
    if (pids.length === 0) return;
    if (Date.now() > deadline) throw new Error(`still running: ${pids.map((pid) => `${pid} ${readFileSync(`/proc/${pid}/cmdline`, 'latin1').replaceAll('\0', ' ')}`).join('; ')}`);
  }
}
