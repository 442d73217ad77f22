import type { KvLayout } from '../../native/types.js';
import { PROTOCOL, type Handshake } from '../../transfer/types.js';

/** Both ends of a benchmark serve the same made-up model. */
export const benchHandshake = (layout: KvLayout): Handshake => ({
  protocol: PROTOCOL, identity: { name: 'bench-transfer', fingerprint: `${layout.layers}x${layout.latent}+${layout.rope}`, reparam: 'none' }, layout,
});
