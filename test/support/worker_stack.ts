/** kv-pool, serve-prefill and serve-decode as processes over a tiny random checkpoint, and what route would do with them. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { DecodeConfig, PoolConfig, PrefillConfig } from '../../src/config/types.js';
import type { DecodeReport, GenerateEvent, GenerateRequest, PrefillEvent, PrefillRequest, SamplingRequest, WorkerState } from '../../src/fleet/protocol.js';
import { WorkerClient } from '../../src/http/client.js';
import type { PoolState } from '../../src/kv/pool_protocol.js';
import type { SampledToken } from '../../src/native/types.js';
import type { PrefillStats } from '../../src/transfer/types.js';
import { TINY_V3, writeCheckpoint } from './checkpoint.js';
import { eventually, RoleProcess } from './role_process.js';

export const VOCAB = TINY_V3.vocab_size as number;
export const LAYERS = TINY_V3.num_hidden_layers as number;

/** A pool in memory alone. */
export const NO_DISK: PoolConfig['nvme'] = { path: null, bytes: 1 << 30, queue_depth: 16 };

/** Hand-offs as one host does them. */
export const LOCAL_TRANSFER: PrefillConfig['transfer'] = { require_path: null, ucx: { use: 'never', library: null, options: {} }, nixl: { use: 'never', library: null, backends: ['UCX'], options: {} } };

export class WorkerStack {
  readonly directory = mkdtempSync(join(tmpdir(), 'tpla-stack-'));
  readonly model = join(this.directory, 'model');
  readonly #processes = new Set<RoleProcess>();

  constructor() {
    writeCheckpoint(this.model, { seed: 5 });
  }

  prefillConfig(fields: Partial<PrefillConfig> = {}): PrefillConfig {
    return {
      listen: this.address('prefill'), id: 'prefill-0', model: this.model, model_name: 'tiny', pool: null, kv: { dtype: 'f32', page_tokens: 64, pages: 256 },
      chunk_tokens: 256, max_batch_tokens: 512, max_waiting: 256, transfer: LOCAL_TRANSFER, threads: 1, drain_ms: 20_000, log_level: 'info', ...fields,
    };
  }

  decodeConfig(fields: Partial<DecodeConfig> = {}): DecodeConfig {
    return {
      listen: this.address('decode'), id: 'decode-0', model: this.model, model_name: 'tiny', pool: null, handoff_listen: this.address('handoff'),
      attention: { form: 'tpla', ranks: 2 }, kv: { dtype: 'f32', page_tokens: 64, pages: 256 }, max_batch: 64, max_waiting: 256, handoff_direction: 'push', first_token: 'prefill', lease_ms: 5000,
      transfer: LOCAL_TRANSFER, threads: 1, drain_ms: 20_000, log_level: 'info', ...fields,
    };
  }

  poolConfig(fields: Partial<PoolConfig> = {}): PoolConfig {
    return { listen: this.address('pool'), id: 'pool-0', channel_listen: this.address('pool-channel'), dram_bytes: 64 << 20, nvme: NO_DISK, drain_ms: 1000, log_level: 'info', ...fields };
  }

  address(name: string): string {
    return `unix:${this.directory}/${name}.sock`;
  }

  async start<R extends 'prefill' | 'decode' | 'pool'>(role: R, config: R extends 'prefill' ? PrefillConfig : R extends 'decode' ? DecodeConfig : PoolConfig): Promise<RoleProcess> {
    const started = await RoleProcess.start(role, config as never);
    this.#processes.add(started);
    return started;
  }

  async stop(...processes: RoleProcess[]): Promise<void> {
    await Promise.all(processes.map((process) => process.stop()));
    for (const process of processes) this.#processes.delete(process);
  }

  async stopAll(): Promise<void> {
    await this.stop(...this.#processes);
  }

  async end(): Promise<void> {
    await this.stopAll();
    rmSync(this.directory, { recursive: true });
  }
}

export interface Generated {
  /** Tokens by choice. */
  text: number[][];
  tokens: SampledToken[][];
  reasons: string[];
  cachedTokens: number;
  prefill: PrefillStats | null;
  transfer: { path: string; bytes: number; ms: number } | null;
  report: DecodeReport;
}

const GREEDY: SamplingRequest = { temperature: 0, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0, seed: '0', logprobs: -1, logit_bias: [] };

export interface GenerateOptions {
  id?: string;
  maxTokens?: number;
  n?: number;
  sampling?: Partial<SamplingRequest>;
  stop?: number[];
  signal?: AbortSignal;
  onEvent?(event: GenerateEvent): void;
}

let serial = 0;

export function promptOf(length: number, seed = 0): number[] {
  return Array.from({ length }, (_, i) => (i * 131 + seed * 7919 + ((i * seed) >> 3)) % VOCAB);
}

/** One prompt through both workers, both legs cancelled by `signal`. Throws the error that either reports. */
export async function generate(prefill: WorkerClient, decode: WorkerClient, tokens: number[], options: GenerateOptions = {}): Promise<Generated> {
  const { id = `request-${serial++}`, maxTokens = 16, n = 1, sampling = {}, stop = [], signal, onEvent } = options;
  const base = { id, tokens, sampling: { ...GREEDY, ...sampling }, n, qos: 'standard' as const };
  const request: GenerateRequest = { ...base, max_tokens: maxTokens, stop_token_ids: stop };
  const result: Generated = { text: [], tokens: [], reasons: [], cachedTokens: 0, prefill: null, transfer: null, report: null as never };
  for (let index = 0; index < n; index++) { result.text.push([]); result.tokens.push([]); }
  const legs = new AbortController();
  const both = signal ? AbortSignal.any([signal, legs.signal]) : legs.signal;
  let prefillError: unknown;
  let landed = false;
  try {
    for await (const event of decode.stream<GenerateEvent>('/generate', request, both)) {
      onEvent?.(event);
      switch (event.event) {
        case 'reserved':
          result.cachedTokens = event.cached_tokens;
          if (event.ticket) runPrefill(prefill, { ...base, ticket: event.ticket }, both).catch((error: unknown) => { prefillError = error; if (!landed) legs.abort(); });
          break;
        case 'recompute': runPrefill(prefill, { ...base, tokens: event.tokens, n: 1, ticket: event.ticket }, both).catch(() => {}); break;
        case 'landed': landed = true; result.prefill = event.prefill; result.transfer = event.transfer; break;
        case 'token': result.text[event.index]!.push(event.token.token); result.tokens[event.index]!.push(event.token); break;
        case 'finish': result.reasons[event.index] = event.reason; break;
        case 'error': throw Object.assign(new Error(event.error.message), event.error, { retryable: event.retryable });
        case 'done': result.report = event.decode; return result;
      }
    }
    throw new Error('the stream ended early');
  } catch (error) {
    throw prefillError ?? error;
  } finally {
    if (!landed) legs.abort();
  }
}

async function runPrefill(prefill: WorkerClient, request: PrefillRequest, signal: AbortSignal): Promise<void> {
  for await (const event of prefill.stream<PrefillEvent>('/prefill', request, signal)) {
    if (event.event === 'error') throw Object.assign(new Error(event.error.message), event.error, { retryable: event.retryable });
    if (event.event === 'done') return;
  }
  throw new Error('the prefill stream ended early');
}

/** Waits until nothing is held: no page, no request, nothing pinned. */
export async function atRest(...processes: RoleProcess[]): Promise<void> {
  for (const process of processes) {
    let state: WorkerState | PoolState | undefined;
    await eventually(async () => {
      state = await process.state<WorkerState | PoolState>();
      return state.pages.used === 0 && ('running' in state ? state.running + state.waiting === 0 : true);
    }, 'every page to be given back').catch((error: Error) => { throw new Error(`${error.message}: ${JSON.stringify({ ...state, cached_blocks: undefined })}\n${process.stderr.slice(-2000)}`); });
    if ((await process.client.text('/metrics')).match(/page_accounting_errors_total [1-9]/)) throw new Error(`page accounting is wrong:\n${process.stderr}`);
  }
}
