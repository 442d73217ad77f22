/**
 * Interleaves generators as their items come, running at most `concurrency` of them at a time. Each is asked for its next item only once the last was
 * consumed, so a slow consumer slows all of them. The first error ends the merger; the caller cancels the others.
 */
export async function* merge<T>(sources: readonly AsyncGenerator<T>[], concurrency: number): AsyncGenerator<T> {
  if (sources.length === 1) return yield* sources[0]!;
  const waiting = [...sources];
  const ready: { item: T; taken(): void }[] = [];
  let running = 0;
  let failure: { error: unknown } | null = null;
  let left = false;
  let wake = () => {};

  const pump = async (source: AsyncGenerator<T>) => {
    try {
      for await (const item of source) {
        if (left) return;
        await new Promise<void>((taken) => {
          ready.push({ item, taken });
          wake();
        });
        if (left) return;
      }
    } catch (error) {
      failure ??= { error };
    } finally {
      running--;
      if (!left && !failure) start();
      wake();
    }
  };
  const start = () => {
    while (running < concurrency && waiting.length > 0) {
      running++;
      void pump(waiting.shift()!);
    }
  };
  start();

  try {
    for (;;) {
      const next = ready.shift();
      if (next) {
        try {
          yield next.item;
        } finally {
          next.taken();
        }
      } else if (failure) {
        throw (failure as { error: unknown }).error;
      } else if (running === 0) {
        return;
      } else {
        await new Promise<void>((resolve) => { wake = resolve; });
      }
    }
  } finally {
    left = true;
    for (const { taken } of ready) taken();
  }
}
