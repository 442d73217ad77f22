export const DEMO_PROMPT = `A standby server connects to the primary and receives changes as they are written to the log. The changes are applied in the order in which they were made, so a query on the standby sees the state of the database at some earlier point in time. If the connection is lost, the standby waits for a while and then tries again, beginning with the last record that it has received. The primary keeps old log files until every standby that is known to it has confirmed them.

If a standby falls behind,`;

/** A model this small repeats itself when it is decoded greedily. */
export const DEMO_SAMPLING = { temperature: 0.6, top_p: 0.9, repetition_penalty: 1.1, seed: 2 };
