/** What a conversion spends its time on, in the order in which it does. */
export const STAGES = ['capture', 'read', 'upload', 'statistics', 'basis', 'rotate', 'regress', 'descend', 'measure', 'store', 'shards'] as const;
export type Stage = (typeof STAGES)[number];

/** Seconds by stage, summed over layers. */
export class StageClock {
  readonly #seconds = new Map<Stage, number>();

  add(stage: Stage, seconds: number): void {
    this.#seconds.set(stage, (this.#seconds.get(stage) ?? 0) + seconds);
  }

  async time<T>(stage: Stage, work: () => Promise<T>): Promise<T> {
    const started = performance.now();
    try {
      return await work();
    } finally {
      this.add(stage, (performance.now() - started) / 1000);
    }
  }

  timeNow<T>(stage: Stage, work: () => T): T {
    const started = performance.now();
    try {
      return work();
    } finally {
      this.add(stage, (performance.now() - started) / 1000);
    }
  }

  /** Stages that took any time. */
  get seconds(): Partial<Record<Stage, number>> {
    return Object.fromEntries(STAGES.flatMap((stage) => (this.#seconds.has(stage) ? [[stage, this.#seconds.get(stage)!]] : [])));
  }
}
