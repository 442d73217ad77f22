/** What a benchmark moves: the KV of one sequence, from prefill's canonical pages into decode's layout. */
import { TplaError } from '../../errors.js';
import { STORAGE_ENGINES, type KvDType, type KvForm, type KvLayout, type StorageEngine } from '../../native/types.js';
import { copiesOf, rowBytes, tokenBytes } from '../../kv/layout.js';
import { sharedWidths, type SharedWidths } from '../../model/shared_widths.js';
import type { Rectangle } from '../../transfer/path.js';
import { DIRECTIONS, type HandoffDirection } from '../../transfer/types.js';

/** KV shape of published models: what a token leaves behind. */
export const MODELS = {
  'deepseek-v3': { layers: 61, latent: 512, rope: 64 },
  'deepseek-v2': { layers: 60, latent: 512, rope: 64 },
  'deepseek-v2-lite': { layers: 27, latent: 512, rope: 64 },
  'kimi-k2': { layers: 61, latent: 512, rope: 64 },
} as const;
export type ModelName = keyof typeof MODELS;

export type KvShape = Pick<KvLayout, 'layers' | 'latent' | 'rope'>;

/** Calls that move bytes cover these layers [begin, end), each with so many tokens. */
export interface PushShape {
  layers: [number, number][];
  tokens: number;
}

/** To a disk and from it. */
export const STORAGE_DIRECTIONS = ['write', 'read'] as const;
export type StorageDirection = (typeof STORAGE_DIRECTIONS)[number];

/** Where blocks of the sequence are kept on a disk, and what moves them. */
export interface StorageShape {
  directory: string;
  direction: StorageDirection;
  memory: 'host' | 'gpu';
  engine: StorageEngine;
  pagesPerBlock: number;
  /** Pieces of a transfer under way where io_uring serves, and transfers at a time. */
  queueDepth: number;
  threads: number;
}

export interface BenchCase {
  /** Name in the registry of paths. */
  path: string;
  tokens: number;
  /** Prefill's canonical pages, and decode's. */
  source: KvLayout;
  target: KvLayout;
  /** How decode's view was asked for: `tpla2`. */
  view: string;
  push: PushShape;
  direction: HandoffDirection;
  /** Requests under way at a time, all of them the same prompt, each into pages of its own. */
  inFlight: number;
  /** Of path nvme, which hands nothing off: the source's pages go to a disk or come from it. */
  storage?: StorageShape;
}

export interface Sweep {
  shape: KvShape;
  paths: string[];
  directions: string[];
  tokens: number[];
  views: string[];
  pageTokens: number[];
  targetPageTokens: number[];
  dtypes: string[];
  targetDTypes: string[];
  /** Empty: as `wholeInGroups` says. */
  layersPerPush: number[];
  tokensPerPush: number[];
  inFlight: number[];
  wholeInGroups(path: string, target: KvLayout, tokens: number): [number, number][];
}

/** Every combination, in the order of the flags; a list of decode's side that is empty follows prefill's. */
export function expand(sweep: Sweep): BenchCase[] {
  const cases: BenchCase[] = [];
  for (const path of sweep.paths) for (const direction of sweep.directions.map(parseDirection)) for (const view of sweep.views) for (const tokens of sweep.tokens) {
    for (const dtype of sweep.dtypes) for (const targetDType of orSame(sweep.targetDTypes, dtype)) {
      for (const pageTokens of sweep.pageTokens) for (const targetPageTokens of orSame(sweep.targetPageTokens, pageTokens)) {
        const source = canonical(sweep.shape, parseDType(dtype), pageTokens);
        const target = { ...sweep.shape, ...parseView(view, sweep.shape.layers), dtype: parseDType(targetDType), pageTokens: targetPageTokens };
        for (const layers of groupings(sweep, path, target, tokens)) for (const perPush of orSame(sweep.tokensPerPush, tokens)) {
          for (const inFlight of sweep.inFlight) cases.push({ path, direction, inFlight, tokens, view, push: { layers, tokens: Math.min(perPush, tokens) }, source, target });
        }
      }
    }
  }
  return cases;
}

function groupings({ layersPerPush, wholeInGroups }: Sweep, path: string, target: KvLayout, tokens: number): [number, number][][] {
  if (layersPerPush.length === 0) return [wholeInGroups(path, target, tokens)];
  return layersPerPush.map((count) => inGroupsOf(count, target.layers));
}

export function inGroupsOf(count: number, layers: number): [number, number][] {
  return Array.from({ length: Math.ceil(layers / count) }, (_, group) => [group * count, Math.min((group + 1) * count, layers)]);
}

export interface StorageSweep {
  shape: KvShape;
  directory: string;
  directions: string[];
  tokens: number[];
  dtypes: string[];
  pageTokens: number[];
  pagesPerBlock: number[];
  memories: string[];
  engines: string[];
  queueDepths: number[];
  threads: number[];
}

/** Every combination for path nvme but host memory with cuFile: blocks on a disk are canonical. */
export function expandStorage(sweep: StorageSweep): BenchCase[] {
  const cases: BenchCase[] = [];
  if (sweep.engines.includes('cufile') && !sweep.memories.includes('gpu')) throw new TplaError('USAGE', 'mechanism cufile moves GPU memory: --memory gpu');
  for (const memory of sweep.memories.map(parseMemory)) for (const engine of sweep.engines.map(parseEngine)) for (const direction of sweep.directions.map(parseStorageDirection)) {
    if (engine === 'cufile' && memory === 'host') continue;
    for (const tokens of sweep.tokens) for (const dtype of sweep.dtypes) for (const pageTokens of sweep.pageTokens) {
      for (const pagesPerBlock of sweep.pagesPerBlock) for (const queueDepth of sweep.queueDepths) for (const threads of sweep.threads) {
        const layout = canonical(sweep.shape, parseDType(dtype), pageTokens);
        cases.push({
          path: 'nvme', direction: 'push', inFlight: 1, tokens, view: 'mla', push: { layers: [[0, sweep.shape.layers]], tokens }, source: layout, target: layout,
          storage: { directory: sweep.directory, direction, memory, engine, pagesPerBlock, queueDepth, threads },
        });
      }
    }
  }
  return cases;
}

const orSame = <T>(list: T[], same: T): T[] => (list.length > 0 ? list : [same]);

export function canonical(shape: KvShape, dtype: KvDType, pageTokens: number): KvLayout {
  return { ...shape, form: 'mla', ranks: 1, shared: 0, dtype, pageTokens };
}

/** `mla`, `tpla2`, `tpla2+64` (64 shared columns), `tpla2+0/64` (none and 64 by turns, layer after layer), `dcp4`, `dp2`. */
export function parseView(text: string, layers: number): { form: KvForm; ranks: number; shared: SharedWidths } {
  const match = /^(mla|tpla|dcp|dp)(\d{1,2})?(?:\+(\d{1,4}(?:\/\d{1,4})*))?$/.exec(text);
  const form = match?.[1] as KvForm | undefined;
  if (form === undefined || (match![3] !== undefined && form !== 'tpla')) {
    throw new TplaError('USAGE', `view "${text}" is none of mla, tplaN, tplaN+SHARED, tplaN+SHARED/SHARED, dcpN, dpN`);
  }
  const turns = (match![3] ?? '0').split('/').map(Number);
  const shared = sharedWidths(Array.from({ length: layers }, (_, layer) => turns[layer % turns.length]!));
  return { form, ranks: Number(match![2] ?? (form === 'mla' ? 1 : 2)), shared };
}

function parseDirection(text: string): HandoffDirection {
  if (text !== 'push' && text !== 'pull') throw new TplaError('USAGE', `direction "${text}" is none of ${DIRECTIONS.join(', ')}`);
  return text;
}

function parseStorageDirection(text: string): StorageDirection {
  if (text !== 'write' && text !== 'read') throw new TplaError('USAGE', `direction "${text}" is none of ${STORAGE_DIRECTIONS.join(', ')}, which path nvme takes`);
  return text;
}

function parseMemory(text: string): 'host' | 'gpu' {
  if (text !== 'host' && text !== 'gpu') throw new TplaError('USAGE', `memory "${text}" is none of host, gpu`);
  return text;
}

function parseEngine(text: string): StorageEngine {
  const engine = STORAGE_ENGINES.find((known) => known === text);
  if (engine === undefined) throw new TplaError('USAGE', `mechanism "${text}" is none of ${STORAGE_ENGINES.join(', ')}`);
  return engine;
}

function parseDType(text: string): KvDType {
  if (text !== 'f32' && text !== 'bf16' && text !== 'fp8') throw new TplaError('USAGE', `dtype "${text}" is none of f32, bf16, fp8`);
  return text;
}

/** What stands together on both sides: tokens of the smaller page, one layer. */
export function pieces({ source, target, tokens }: BenchCase): { bytes: number; count: number } {
  const pageTokens = Math.min(source.pageTokens, target.pageTokens);
  return { bytes: pageTokens * rowBytes(source, 0), count: Math.ceil(tokens / pageTokens) * source.layers };
}

/** Bytes of a sequence in decode's pages, over all ranks that keep a part of their own. */
export function bytesLanded({ target, tokens }: Pick<BenchCase, 'target' | 'tokens'>): number {
  return tokenBytes(target) * tokens * copiesOf(target);
}

/** Bytes of the first rank's memory of an arena. */
export function memoryBytes(layout: KvLayout, pages: number): number {
  return tokenBytes(layout) * layout.pageTokens * pages;
}

/** Rectangles of layers and tokens that calls cover, in the order in which prefill computes them. */
export function rectangles({ tokens, push }: BenchCase): Rectangle[] {
  return push.layers.flatMap((layers) => Array.from({ length: Math.ceil(tokens / push.tokens) }, (_, i): Rectangle =>
    ({ layers, tokens: [i * push.tokens, Math.min((i + 1) * push.tokens, tokens)] })));
}

/** Pages of decode's arena. */
export const targetPages = ({ target, tokens, inFlight }: BenchCase): number => inFlight * pagesFor(target, tokens);

/** Page tables of a sequence whose pages lie scattered over the pagesFor() pages of request `request`; `seed` decides how. */
export function scatteredPages(layout: KvLayout, tokens: number, seed: number, request = 0): Int32Array[] {
  const needed = Math.ceil(tokens / layout.pageTokens);
  const table = (count: number, salt: number) => {
    const ids = Array.from({ length: pagesFor(layout, tokens) }, (_, i) => i);
    let state = (Math.imul(seed, 2654435761) + salt * 40503 + 1) >>> 0;
    for (let i = ids.length - 1; i > 0; i--) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      const j = (state >>> 8) % (i + 1);
      [ids[i], ids[j]] = [ids[j]!, ids[i]!];
    }
    return Int32Array.from(ids.slice(0, count), (id) => request * ids.length + id);
  };
  if (layout.form !== 'dcp') return [table(needed, 0)];
  return Array.from({ length: layout.ranks }, (_, rank) => table(Math.ceil((needed - rank) / layout.ranks), rank));
}

/** Pages of an arena for a sequence, with some to spare so that scattering has room. */
export function pagesFor(layout: KvLayout, tokens: number): number {
  const perRank = Math.ceil(tokens / layout.pageTokens / (layout.form === 'dcp' ? layout.ranks : 1));
  return perRank + Math.ceil(perRank / 8) + 1;
}
