/** Time as policies see it, in milliseconds; monotonic. Tests and the simulator bring their own. */
export interface Clock {
  now(): number;
}

export const systemClock: Clock = { now: () => performance.now() };
