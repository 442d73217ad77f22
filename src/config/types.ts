/** What each role's YAML says after defaults, environment and flags are laid over one another. Bytes are plain numbers. */
import type { KvDType, KvForm } from '../native/types.js';
import type { HandoffDirection, TransferPath } from '../transfer/types.js';

export interface PrefillConfig {
  /** `unix:/run/tpla/prefill-0.sock` or `tcp://127.0.0.1:7200`. */
  listen: string;
  id: string;
  /** Checkpoint directory. */
  model: string;
  /** Served name; default: the directory's name. */
  model_name: string;
  /** Address of kv-pool, or null for none. */
  pool: string | null;
  kv: { dtype: KvDType; page_tokens: number; pages: number };
  chunk_tokens: number;
  max_batch_tokens: number;
  max_waiting: number;
  transfer: { require_path: TransferPath | null; ucx: UcxConfig; nixl: NixlConfig };
  threads: number;
  /** After SIGTERM, how long running requests may take to finish. */
  drain_ms: number;
  log_level: LogLevel;
}

export interface UcxConfig {
  use: 'auto' | 'always' | 'never';
  library: string | null;
  /** UCX_… settings. */
  options: Record<string, string>;
}

export interface NixlConfig {
  use: 'auto' | 'always' | 'never';
  library: string | null;
  /** Plug-ins to start. */
  backends: string[];
  /** NIXL_… and UCX_… settings. */
  options: Record<string, string>;
}

export interface DecodeConfig {
  listen: string;
  id: string;
  model: string;
  model_name: string;
  pool: string | null;
  /** Where prefill workers connect to push KV. */
  handoff_listen: string;
  attention: { form: KvForm; ranks: number };
  kv: { dtype: KvDType; page_tokens: number; pages: number };
  max_batch: number;
  max_waiting: number;
  handoff_direction: HandoffDirection;
  /** Whose first token is generated on: prefill's, sent along, or decode's own, from a step over the last prompt token. */
  first_token: 'prefill' | 'decode';
  /** A hand-off that is silent for so long is cut off. */
  lease_ms: number;
  transfer: { ucx: UcxConfig; nixl: NixlConfig };
  threads: number;
  /** After SIGTERM, how long running requests may take to finish. */
  drain_ms: number;
  log_level: LogLevel;
}

export interface PoolConfig {
  listen: string;
  id: string;
  /** Fd-passing channel for workers on this host. */
  channel_listen: string;
  dram_bytes: number;
  nvme: NvmeConfig;
  /** After SIGTERM, how long running requests may take to finish. */
  drain_ms: number;
  log_level: LogLevel;
}

export interface NvmeConfig {
  /** Block file, or null for none. */
  path: string | null;
  bytes: number;
  queue_depth: number;
}

export interface RouteConfig {
  /** Public addresses. */
  listen: string[];
  id: string;
  prefill: string[];
  decode: string[];
  /** Directory with tokenizer.json, tokenizer_config.json, config.json of the served model. */
  model: string;
  model_name: string;
  health_interval_ms: number;
  request_timeout_ms: number;
  max_body_bytes: number;
  retries: number;
  /** After SIGTERM, how long running requests may take to finish. */
  drain_ms: number;
  log_level: LogLevel;
}

export type LogLevel = 'fatal' | 'error' | 'warn' | 'info' | 'debug' | 'trace';

export interface RoleConfigs {
  prefill: PrefillConfig;
  decode: DecodeConfig;
  pool: PoolConfig;
  route: RouteConfig;
}

export type RoleName = keyof RoleConfigs;

/** What `tpla up` starts. */
export interface UpConfig {
  /** Checkpoint, served name and log level of every service that names none. */
  model: string | null;
  model_name: string | null;
  /** Whether `model` is reparameterised first for the ranks over which decode services split the latent: quickly, or with all that `tpla reparam` does. */
  reparam: 'none' | 'quick' | 'full';
  log_level: LogLevel;
  /** By name; the rest of each entry is the role's own configuration. */
  services: Record<string, { role: RoleName } & Record<string, unknown>>;
  /** A service that takes longer to become ready ends the start. */
  start_timeout_ms: number;
  /** How long services may take to drain when the stack stops. */
  drain_ms: number;
  /** Exponential back-off between restarts of a service that keeps ending. */
  restart: { first_ms: number; max_ms: number; reset_after_ms: number };
}
