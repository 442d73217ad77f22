/** Time as policies see it, in milliseconds; monotonic. Tests and the simulator bring their own. */
export interface Clock {
  now(): number;
}

export const systemClock: Clock = { now: () => performance.now() };

/** Now, in microseconds of the host's monotonic clock, which its processes and the addon share. */
export const monotonicUs = (): number => Number(process.hrtime.bigint()) / 1e3;
