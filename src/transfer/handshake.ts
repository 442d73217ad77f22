import { createHash } from 'node:crypto';
import { TplaError } from '../errors.js';
import { describeShared } from '../model/shared_widths.js';
import type { KvLayout } from '../native/types.js';
import type { Handshake } from './types.js';

/** What both sides must agree on, as text in a fixed order. Form, ranks, page size and dtype may differ: the transfer converts them. */
function agreement({ protocol, identity, layout }: Handshake): [string, string][] {
  return [
    ['protocol', String(protocol)],
    ['model', identity.name],
    ['model fingerprint', identity.fingerprint],
    ['reparameterisation', identity.reparam],
    ['layers', String(layout.layers)],
    ['latent width', String(layout.latent)],
    ['rope width', String(layout.rope)],
  ];
}

/** 64 bits of SHA-256 over what must agree; what logs and refusals print. */
export function handshakeFingerprint(handshake: Handshake): string {
  return createHash('sha256').update(JSON.stringify(agreement(handshake))).digest('hex').slice(0, 16);
}

/** Throws HANDSHAKE_REFUSED with both fingerprints and every field that differs. */
export function checkHandshake(prefill: Handshake, decode: Handshake): void {
  const mine = handshakeFingerprint(prefill);
  const theirs = handshakeFingerprint(decode);
  if (mine === theirs) return;
  const other = new Map(agreement(decode));
  const differences = agreement(prefill)
    .filter(([field, value]) => other.get(field) !== value)
    .map(([field, value]) => `${field} "${value}" against "${other.get(field)}"`);
  throw new TplaError('HANDSHAKE_REFUSED',
    `prefill (fingerprint ${mine}) and decode (fingerprint ${theirs}) do not serve the same KV: ${differences.join(', ')}; start both with the same checkpoint and model name`);
}

/** `mla bf16, 1 rank, 64-token pages`: how a layout reads in a log line. */
export function describeLayout({ form, ranks, dtype, pageTokens, shared }: KvLayout): string {
  return `${form} ${dtype}, ${ranks} rank${ranks === 1 ? '' : 's'}${shared === 0 ? '' : `, ${describeShared(shared)} shared columns`}, ${pageTokens}-token pages`;
}
