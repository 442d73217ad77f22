/** Files written for LMCache's disaggregated prefill, read as ours: pure, one line a key that says what became of it. */
import { TplaError } from '../errors.js';
import { nearest } from './suggest.js';
import type { RoleName } from './types.js';

type Values = Record<string, unknown>;

/** What a key becomes: settings of ours, where it has any, and why. */
interface Mapped {
  set?: Values;
  line: string;
}

interface Translation {
  values: Values;
  lines: string[];
}

const ROLE_OF = { sender: 'prefill', receiver: 'decode' } as const;

/** Keys that say that a file is LMCache's. */
const MARKERS = ['enable_pd', 'pd_role', 'transfer_channel', 'nixl_backends', 'pd_buffer_size', 'pd_buffer_device'];

export function isLmcacheFile(values: Values): boolean {
  return MARKERS.some((key) => Object.hasOwn(values, key));
}

/**
 * `values` with LMCache's keys replaced by ours; keys of ours (`ownKeys`) stay and go first. Throws CONFIG_INVALID for a key that neither has,
 * and for a value that serves something else than this role.
 */
export function fromLmcache(role: RoleName, values: Values, ownKeys: readonly string[], where: string): Translation {
  const result: Translation = { values: {}, lines: [] };
  for (const [key, value] of Object.entries(values)) {
    if (ownKeys.includes(key)) continue;
    const { set = {}, line } = mapKey(role, key, value, values, ownKeys, where);
    result.values = overlay(result.values, set);
    result.lines.push(`${where}: ${key}: ${text(value)}: ${line}`);
  }
  for (const key of ownKeys) if (Object.hasOwn(values, key)) result.values = overlay(result.values, { [key]: values[key] });
  return result;
}

function mapKey(role: RoleName, key: string, value: unknown, all: Values, ownKeys: readonly string[], where: string): Mapped {
  const map = Object.hasOwn(MAPPED, key) ? MAPPED[key] : undefined;
  if (map) return map({ role, value, all, refuse: (expected) => refusal(where, key, value, expected) });
  if (Object.hasOwn(WITHOUT_MEANING, key)) return { line: `not used: ${WITHOUT_MEANING[key]}` };
  const near = nearest(key, [...Object.keys(MAPPED), ...Object.keys(WITHOUT_MEANING), ...ownKeys]);
  throw new TplaError('CONFIG_INVALID', `${where}: ${key}: unknown key; ${near === null ? 'it is neither one of tpla nor one of LMCache that tpla knows' : `did you mean "${near}"?`}`);
}

interface Key {
  role: RoleName;
  value: unknown;
  all: Values;
  refuse(expected: string): TplaError;
}

const MAPPED: Record<string, (key: Key) => Mapped> = {
  enable_pd({ value, refuse }) {
    if (value !== true) throw refuse('true: tpla serves prefill and decode apart');
    return { line: 'what this command does' };
  },
  pd_role({ role, value, refuse }) {
    if (value !== 'sender' && value !== 'receiver') throw refuse('sender or receiver');
    if (ROLE_OF[value] !== role) throw refuse(`${role === 'prefill' ? 'sender' : 'receiver'} for serve-${role}; this file is for serve-${ROLE_OF[value]}`);
    return { line: `serve-${role}` };
  },
  transfer_channel({ value, refuse }) {
    if (value === 'nixl') {
      return {
        set: { transfer: { nixl: { use: 'auto' } } },
        line: 'transfer.nixl.use: auto, which takes NIXL between hosts where it is installed, else the best of UCX and TCP; the path taken is stated, and transfer.require_path: nixl refuses others',
      };
    }
    if (value === 'py_socket') return { set: { transfer: { ucx: { use: 'never' }, nixl: { use: 'never' } } }, line: 'transfer.ucx.use and transfer.nixl.use: never, which leaves TCP between hosts' };
    throw refuse('nixl or py_socket');
  },
  pd_peer_host({ role, value, all, refuse }) {
    if (typeof value !== 'string' || value === '') throw refuse('a host');
    if (role !== 'decode') return { line: "not used: prefill is told decode's address with each request" };
    const port = firstPort(all.pd_peer_init_port);
    if (port === null) throw refuse('pd_peer_init_port beside it');
    return { set: { handoff_listen: `tcp://${value}:${port}` }, line: `handoff_listen: tcp://${value}:${port}` };
  },
  pd_peer_init_port({ role, value, refuse }) {
    if (firstPort(value) === null) throw refuse('a port, or a list of one a rank');
    if (role !== 'decode') return { line: "not used: prefill is told decode's address with each request" };
    const others = Array.isArray(value) && value.length > 1 ? '; the ranks of a worker share one channel, so the other ports are not used' : '';
    return { line: `port of handoff_listen${others}` };
  },
  pd_peer_alloc_port({ value, refuse }) {
    if (firstPort(value) === null) throw refuse('a port, or a list of one a rank');
    return { line: 'not used: pages are granted on the hand-off channel itself' };
  },
  pd_proxy_host: () => ({ line: 'not used: route opens both legs of a request and hears of its end from decode' }),
  pd_proxy_port: () => ({ line: 'not used: route opens both legs of a request and hears of its end from decode' }),
  pd_buffer_size({ value, refuse }) {
    if (!(typeof value === 'number' && value > 0)) throw refuse('a number of bytes');
    return { line: 'not used: KV lands in the pages that it is decoded from (kv.pages), there is no buffer between' };
  },
  pd_buffer_device({ value, refuse }) {
    if (typeof value !== 'string' || !/^(cpu|cuda(:\d+)?)$/.test(value)) throw refuse('cuda or cpu');
    return { line: 'not used: KV lies where the worker computes, and moves from there' };
  },
  nixl_backends({ value, refuse }) {
    if (!Array.isArray(value) || !value.every((name) => typeof name === 'string')) throw refuse('a list of names');
    if (value.length === 0) throw refuse('at least one name');
    const set = { nixl: { backends: value } };
    if (!value.includes('UCX')) return { set: { transfer: set }, line: 'transfer.nixl.backends; where there is no NIXL, none of them has a counterpart here' };
    return { set: { transfer: { ...set, ucx: { use: 'auto' } } }, line: 'transfer.nixl.backends, and where there is no NIXL transfer.ucx.use: auto' };
  },
};

const POOL = 'blocks are kept by kv-pool, see its configuration';
const OTHER_FEATURE = 'tpla has no such feature';
/** Keys of LMCache that its files carry and that set nothing here. */
const WITHOUT_MEANING: Record<string, string> = {
  chunk_size: 'blocks have kv.page_tokens tokens',
  local_cpu: POOL, max_local_cpu_size: POOL, reserve_local_cpu_size: POOL, local_disk: POOL, max_local_disk_size: POOL, gds_path: POOL, gds_buffer_size: POOL,
  cufile_buffer_size: POOL, remote_url: POOL, remote_serde: POOL, save_decode_cache: POOL, save_unfull_chunk: POOL, cache_policy: POOL, pre_caching_hash_algorithm: POOL,
  enable_nixl: 'enable_pd took its place', enable_xpyd: 'any number of workers is served', nixl_role: 'pd_role took its place',
  nixl_buffer_size: 'pd_buffer_size took its place', nixl_buffer_device: 'pd_buffer_device took its place', nixl_peer_host: 'pd_peer_host took its place',
  nixl_peer_port: 'pd_peer_init_port took its place', nixl_receiver_host: 'pd_peer_host took its place', nixl_receiver_port: 'pd_peer_init_port took its place',
  nixl_proxy_host: 'route takes its place', nixl_proxy_port: 'route takes its place', nixl_enable_gc: 'memory is counted, not collected',
  use_layerwise: 'every layer leaves while the next one computes', enable_async_loading: 'transfers never block computing', numa_mode: 'the process is placed from outside',
  enable_blending: OTHER_FEATURE, blend_recompute_ratios: OTHER_FEATURE, blend_min_tokens: OTHER_FEATURE, blend_check_layers: OTHER_FEATURE, blend_special_str: OTHER_FEATURE,
  enable_p2p: OTHER_FEATURE, p2p_host: OTHER_FEATURE, p2p_init_ports: OTHER_FEATURE, p2p_lookup_ports: OTHER_FEATURE, lookup_url: OTHER_FEATURE, distributed_url: OTHER_FEATURE,
  enable_controller: 'route knows its workers', controller_url: 'route knows its workers', controller_pull_url: 'route knows its workers', controller_reply_url: 'route knows its workers',
  lmcache_instance_id: '`id` names a worker', lmcache_worker_port: '`listen` is the address', lmcache_worker_ports: '`listen` is the address',
  internal_api_server_enabled: 'every role serves /health, /metrics and /state', internal_api_server_host: '`listen` is the address', internal_api_server_port_start: '`listen` is the address',
  error_handling: 'errors are always handled', extra_config: 'it speaks to plug-ins of LMCache', external_lookup_client: OTHER_FEATURE, py_enable_gc: 'there is no Python',
};

/** `over` laid over `base`, setting by setting. */
function overlay(base: Values, over: Values): Values {
  const result = { ...base };
  for (const [key, value] of Object.entries(over)) {
    const below = result[key];
    result[key] = isValues(below) && isValues(value) ? overlay(below, value) : value;
  }
  return result;
}

const isValues = (value: unknown): value is Values => typeof value === 'object' && value !== null && !Array.isArray(value);

/** A port as it is, as text, or first of a list; null for anything else. */
function firstPort(value: unknown): number | null {
  const first: unknown = Array.isArray(value) ? value[0] : value;
  const port = typeof first === 'string' && /^\d+$/.test(first) ? Number(first) : first;
  return typeof port === 'number' && Number.isInteger(port) && port >= 1 && port <= 65_535 ? port : null;
}

function refusal(where: string, key: string, value: unknown, expected: string): TplaError {
  return new TplaError('CONFIG_INVALID', `${where}: ${key}: ${text(value)} is not taken; expected ${expected}`);
}

const text = (value: unknown) => JSON.stringify(value) ?? String(value);
