/** KV pages in plain TypeScript, written from the contract in native/core/kv_layout.h: what the addon is tested against. */
import type { KvArena, KvLayout } from '../../src/native/types.js';

const sharedOf = ({ shared }: KvLayout, layer: number) => (typeof shared === 'number' ? shared : shared[layer]!);
const sliceOf = (layout: KvLayout, layer: number) => (layout.latent - sharedOf(layout, layer)) / layout.ranks;
export const width = (layout: KvLayout, layer = 0) => (layout.form === 'tpla' ? sharedOf(layout, layer) + sliceOf(layout, layer) : layout.latent);
export const copies = (layout: KvLayout) => (layout.form === 'tpla' ? layout.ranks : 1);

export function rowBytes(layout: KvLayout, layer = 0): number {
  const w = width(layout, layer);
  if (layout.dtype === 'f32') return (w + layout.rope) * 4;
  if (layout.dtype === 'bf16') return (w + layout.rope) * 2;
  return Math.ceil(w / 4) * 4 + Math.ceil(w / 128) * 4 + layout.rope * 2;
}

/** Canonical columns in the row of a rank. */
export function columns(layout: KvLayout, rank: number, layer = 0): number[] {
  if (layout.form !== 'tpla') return Array.from({ length: layout.latent }, (_, c) => c);
  const shared = sharedOf(layout, layer);
  const slice = sliceOf(layout, layer);
  return [...Array.from({ length: shared }, (_, c) => c), ...Array.from({ length: slice }, (_, c) => shared + rank * slice + c)];
}

const f32 = new Float32Array(1);
const u32 = new Uint32Array(f32.buffer);

export function toBf16(value: number): number {
  f32[0] = value;
  const bits = u32[0]!;
  if (Number.isNaN(value)) return (bits >>> 16) | 0x40;
  const upper = bits >>> 16;
  const rest = bits & 0xffff;
  return (upper + (rest > 0x8000 || (rest === 0x8000 && (upper & 1) === 1) ? 1 : 0)) & 0xffff;
}

export function fromBf16(bits: number): number {
  u32[0] = bits << 16;
  return f32[0]!;
}

/** All non-negative e4m3fn values by code, 0 to 0x7e. */
const E4M3 = Array.from({ length: 0x7f }, (_, code) => ((code >> 3) === 0 ? (code & 7) * 2 ** -9 : (8 + (code & 7)) * 2 ** ((code >> 3) - 10)));

export function toE4m3(value: number): number {
  const sign = Object.is(value, -0) || value < 0 ? 0x80 : 0;
  if (Number.isNaN(value)) return 0x7f;
  const magnitude = Math.min(Math.abs(value), 448);
  let low = 0;
  for (let high = 0x7e; low < high;) {
    const middle = (low + high + 1) >> 1;
    if (E4M3[middle]! <= magnitude) low = middle;
    else high = middle - 1;
  }
  if (low < 0x7e) {
    const below = magnitude - E4M3[low]!;
    const above = E4M3[low + 1]! - magnitude;
    if (above < below || (above === below && (low & 1) === 1)) low++;
  }
  return sign | low;
}

export const fromE4m3 = (code: number) => (code & 0x7f) === 0x7f ? NaN : (code & 0x80 ? -1 : 1) * E4M3[code & 0x7f]!;

/** Smallest power of two s with amax / s <= 448. */
export function scaleOf(values: number[]): number {
  const amax = Math.max(0, ...values.map(Math.abs));
  if (amax === 0) return 1;
  let exponent = Math.ceil(Math.log2(amax / 448)) - 1;
  while (amax / 2 ** exponent > 448) exponent++;
  return 2 ** Math.max(exponent, -126);
}

export interface Row { latent: number[]; rope: number[] }

export function encodeRow(layout: KvLayout, row: Row, layer = 0): Uint8Array {
  const bytes = new Uint8Array(rowBytes(layout, layer));
  const view = new DataView(bytes.buffer);
  if (layout.dtype === 'f32') [...row.latent, ...row.rope].forEach((value, i) => view.setFloat32(i * 4, value, true));
  if (layout.dtype === 'bf16') [...row.latent, ...row.rope].forEach((value, i) => view.setUint16(i * 2, toBf16(value), true));
  if (layout.dtype !== 'fp8') return bytes;
  const w = row.latent.length;
  const scales = Math.ceil(w / 4) * 4;
  for (let group = 0; group * 128 < w; group++) {
    const values = row.latent.slice(group * 128, group * 128 + 128);
    const scale = scaleOf(values);
    values.forEach((value, i) => { bytes[group * 128 + i] = toE4m3(value / scale); });
    view.setFloat32(scales + group * 4, scale, true);
  }
  const rope = scales + Math.ceil(w / 128) * 4;
  row.rope.forEach((value, i) => view.setUint16(rope + i * 2, toBf16(value), true));
  return bytes;
}

export function decodeRow(layout: KvLayout, bytes: Uint8Array, layer = 0): Row {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const w = width(layout, layer);
  const indices = Array.from({ length: w + layout.rope }, (_, i) => i);
  const split = (values: number[]): Row => ({ latent: values.slice(0, w), rope: values.slice(w) });
  if (layout.dtype === 'f32') return split(indices.map((i) => view.getFloat32(i * 4, true)));
  if (layout.dtype === 'bf16') return split(indices.map((i) => fromBf16(view.getUint16(i * 2, true))));
  const scales = Math.ceil(w / 4) * 4;
  const rope = scales + Math.ceil(w / 128) * 4;
  return split(indices.map((i) => i < w
    ? fromE4m3(bytes[i]!) * view.getFloat32(scales + (i >> 7) * 4, true)
    : fromBf16(view.getUint16(rope + (i - w) * 2, true))));
}

/** Page tables of one sequence, with the pages scattered. */
export interface Sequence { pages: Int32Array[]; rank: number }

/** Gives a sequence of `tokens` every third page or so of an arena, shuffled by `seed`. */
export function scatter(layout: KvLayout, arenaPages: number, tokens: number, seed: number): Sequence {
  const needed = Math.ceil(tokens / layout.pageTokens);
  const shuffled = (salt: number) => {
    const random = xorshift(seed * 977 + salt + 1);
    const ids = Array.from({ length: arenaPages }, (_, i) => i);
    for (let i = ids.length - 1; i > 0; i--) {
      const j = random() % (i + 1);
      [ids[i], ids[j]] = [ids[j]!, ids[i]!];
    }
    return ids;
  };
  if (layout.form !== 'dcp') return { pages: [Int32Array.from(shuffled(0).slice(0, needed))], rank: layout.form === 'dp' ? seed % layout.ranks : 0 };
  return { pages: Array.from({ length: layout.ranks }, (_, r) => Int32Array.from(shuffled(r).slice(0, Math.ceil((needed - r) / layout.ranks)))), rank: 0 };
}

/** Bytes of one row where the layout keeps it; `copy` counts as copies() does. */
export function rowAt(arena: KvArena, sequence: Sequence, layer: number, token: number, copy: number): Uint8Array {
  const { layout } = arena;
  const page = Math.floor(token / layout.pageTokens);
  let rank = copy;
  let id = sequence.pages[0]![page]!;
  if (layout.form === 'dcp') {
    rank = page % layout.ranks;
    id = sequence.pages[rank]![Math.floor(page / layout.ranks)]!;
  }
  if (layout.form === 'dp') rank = sequence.rank;
  const bytes = rowBytes(layout, layer);
  return arena.page(rank, layer, id).subarray((token % layout.pageTokens) * bytes, (token % layout.pageTokens + 1) * bytes);
}

const M64 = (1n << 64n) - 1n;
const GOLDEN = 0x9e3779b97f4a7c15n;

export function mix64(x: bigint): bigint {
  x ^= x >> 33n;
  x = (x * 0xff51afd7ed558ccdn) & M64;
  x ^= x >> 33n;
  x = (x * 0xc4ceb9fe1a85ec53n) & M64;
  return x ^ (x >> 33n);
}

const keys: bigint[] = [];
export const checksumKey = (word: number) => (keys[word] ??= mix64((BigInt(word + 1) * GOLDEN) & M64) | 1n);

export function rowValue(row: Uint8Array, copy: number, layer: number, token: number): bigint {
  const view = new DataView(row.buffer, row.byteOffset, row.byteLength);
  let hash = 0n;
  for (let word = 0; word * 4 < row.length; word++) hash += checksumKey(word) * BigInt(view.getUint32(word * 4, true));
  return mix64((hash + ((BigInt(token) << 18n) | (BigInt(layer) << 6n) | BigInt(copy)) * GOLDEN) & M64);
}

export const sum64 = (values: bigint[]) => values.reduce((total, value) => (total + value) & M64, 0n);

/** Deterministic 31-bit numbers. */
export function xorshift(seed: number): () => number {
  let state = (seed * 2654435761 + 88172645) >>> 0 || 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state >>> 1;
  };
}
