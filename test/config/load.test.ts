import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { loadRoleConfig, ROLE_SCHEMAS, type ConfigSources } from '../../src/config/load.js';
import { settingsOf } from '../../src/config/settings.js';
import type { RoleName } from '../../src/config/types.js';
import { TplaError } from '../../src/errors.js';

const test = suite('config/load');
const dir = mkdtempSync(join(tmpdir(), 'tpla-config-'));
test.after(() => rmSync(dir, { recursive: true }));

const CONFIGS = fileURLToPath(new URL('../../configs/', import.meta.url));

function file(text: string): string {
  const path = join(dir, 'role.yaml');
  writeFileSync(path, text);
  return path;
}

function refusal(role: RoleName, sources: ConfigSources): string {
  try {
    loadRoleConfig(role, { env: {}, ...sources });
  } catch (error) {
    assert.instance(error, TplaError);
    assert.is((error as TplaError).code, 'CONFIG_INVALID');
    return (error as TplaError).message;
  }
  throw new Error('the configuration was accepted');
}

const MINIMAL = 'listen: unix:/run/tpla/decode-7.sock\nmodel: demo\n';

test('the shipped files are valid, and say what they mean to', () => {
  const model = resolve(CONFIGS, '../models/demo');
  assert.is(loadRoleConfig('prefill', { file: join(CONFIGS, 'prefill.yaml'), env: {} }).model, model);
  assert.equal(loadRoleConfig('decode', { file: join(CONFIGS, 'decode.yaml'), env: {} }).attention, { form: 'tpla', ranks: 2 });
  assert.is(loadRoleConfig('pool', { file: join(CONFIGS, 'pool.yaml'), env: {} }).dram_bytes, 4 * 2 ** 30);
  assert.is(loadRoleConfig('route', { file: join(CONFIGS, 'route.yaml'), env: {} }).max_body_bytes, 16 * 2 ** 20);
});

test('defaults fill in what is left out, in the order of the schema', () => {
  assert.equal(JSON.stringify(loadRoleConfig('decode', { file: file(MINIMAL), env: {} })), JSON.stringify({
    listen: 'unix:/run/tpla/decode-7.sock',
    id: 'decode-0',
    model: join(dir, 'demo'),
    model_name: 'demo',
    pool: null,
    handoff_listen: 'unix:/run/tpla/decode-7.handoff.sock',
    attention: { form: 'mla', ranks: 1 },
    kv: { dtype: 'bf16', page_tokens: 64, pages: 4096 },
    max_batch: 64,
    max_waiting: 256,
    handoff_direction: 'push',
    first_token: 'prefill',
    lease_ms: 10000,
    transfer: { ucx: { use: 'auto', library: null, options: {} }, nixl: { use: 'never', library: null, backends: ['UCX'], options: {} } },
    threads: 0,
    drain_ms: 30000,
    log_level: 'info',
  }));
});

test('flags over environment over file over defaults', () => {
  const sources = { file: file(`${MINIMAL}kv: { dtype: f32, pages: 10 }\nmax_batch: 3\nlease_ms: 500\n`) };
  const config = loadRoleConfig('decode', {
    ...sources,
    env: { TPLA_KV_PAGES: '20', TPLA_MAX_BATCH: '4', TPLA_POOL: 'unix:/run/pool.sock' },
    flags: { 'kv-pages': '30', pool: 'none', attention: 'dcp', ranks: '4' },
  });
  assert.equal(config.kv, { dtype: 'f32', page_tokens: 64, pages: 30 });
  assert.is(config.max_batch, 4);
  assert.is(config.lease_ms, 500);
  assert.is(config.pool, null);
  assert.equal(config.attention, { form: 'dcp', ranks: 4 });
});

test('relative paths: from the file in a file, from the working directory elsewhere', () => {
  mkdirSync(join(dir, 'sub'), { recursive: true });
  const path = join(dir, 'sub', 'a.yaml');
  writeFileSync(path, 'listen: tcp://127.0.0.1:0\nmodel: ../weights\n');
  assert.is(loadRoleConfig('prefill', { file: path, env: {} }).model, join(dir, 'weights'));
  assert.is(loadRoleConfig('prefill', { file: path, env: { TPLA_MODEL: 'weights' } }).model, resolve('weights'));
});

test('lists: repeated flags, or commas', () => {
  const base = { model: 'm', decode: ['unix:/d0', 'unix:/d1'] };
  const byFlag = loadRoleConfig('route', { env: {}, flags: { ...base, prefill: ['unix:/p0,unix:/p1', 'unix:/p2'] } });
  assert.equal(byFlag.prefill, ['unix:/p0', 'unix:/p1', 'unix:/p2']);
  assert.equal(byFlag.decode, ['unix:/d0', 'unix:/d1']);
  const byEnv = loadRoleConfig('route', { env: { TPLA_PREFILL: 'unix:/p0, unix:/p1', TPLA_DECODE: 'unix:/d0', TPLA_MODEL: 'm' } });
  assert.equal(byEnv.prefill, ['unix:/p0', 'unix:/p1']);
});

test('every error at once, each with path, value, what is allowed and where it came from', () => {
  const path = file(`listen: decode.sock
kv: { dtype: fp16, page_tokens: 50, pages: 0, pagse: 3 }
attention: { form: tpla, ranks: 2.5 }
max_batch: lots
lease_ms: [1]
ranks: 2
colour: red
`);
  assert.is(refusal('decode', { file: path, flags: { 'max-waiting': '-1' }, env: { TPLA_THREADS: 'all', TPLA_KV_PAGE: '3' } }), `${path} has 14 errors:
  model: missing: checkpoint directory (config.json, *.safetensors, tokenizer.json)
  ranks: unknown key; did you mean "attention.ranks"?
  colour: unknown key; allowed: listen, id, model, model_name, pool, handoff_listen, attention, kv, max_batch, max_waiting, handoff_direction, first_token, lease_ms, transfer, threads, drain_ms, log_level
  listen: address "decode.sock" is neither unix:/path nor tcp://host:port
  attention.ranks: 2.5 is not a whole number
  kv.pagse: unknown key; did you mean "pages"?
  kv.dtype: "fp16" is not one of f32, bf16, fp8
  kv.page_tokens: 50 is not a multiple of 16
  kv.pages: 0 is too small; at least 1 is allowed
  max_batch: "lots" is not a whole number
  max_waiting: -1 is too small; at least 0 is allowed (from --max-waiting)
  lease_ms: [1] is not a whole number
  threads: "all" is not a whole number (from environment TPLA_THREADS)
  environment TPLA_KV_PAGE: unknown variable; did you mean TPLA_KV_PAGES?`);
});

test('a single error is a single line', () => {
  const path = file('listen: unix:/x\ndram_bytes: 4 gigs\n');
  assert.is(refusal('pool', { file: path }), `${path}: dram_bytes: "4 gigs" is no size of at least 1048576 bytes; write a number or a text such as 512MiB, 2GiB, 10GB`);
  const list = file('model: m\nprefill: [unix:/p, tcp://host]\ndecode: []\n');
  assert.match(refusal('route', { file: list }), /prefill\[1\]: address "tcp:\/\/host" is neither/);
  assert.match(refusal('route', { file: list }), 'decode: [] is too short; at least 1 entry is needed');
});

test('a file that is not there, not YAML, or no mapping', () => {
  assert.match(refusal('pool', { file: join(dir, 'none.yaml') }), /cannot read the configuration file .*none\.yaml: ENOENT/);
  assert.match(refusal('pool', { file: file('listen: [unix:/x\nid: a') }), /line 2, column/);
  assert.match(refusal('pool', { file: file('- a\n- b\n') }), 'expected a mapping of keys to values, found a list');
});

test('the second socket has a default only beside a Unix one, and has to fit', () => {
  assert.is(loadRoleConfig('pool', { env: {}, flags: { listen: 'unix:/run/p.sock' } }).channel_listen, 'unix:/run/p.channel.sock');
  assert.match(refusal('decode', { flags: { listen: 'tcp://127.0.0.1:0', model: 'm' } }), 'handoff_listen: missing: it has no default where `listen` is no Unix socket');
  assert.match(refusal('decode', { flags: { listen: `unix:/${'d'.repeat(100)}`, model: 'm' } }), /handoff_listen: socket path is \d+ bytes/);
});

test('flags are unique within a role and mean the same key in every role', () => {
  const meaning = new Map<string, string>();
  for (const role of Object.keys(ROLE_SCHEMAS) as RoleName[]) {
    const settings = settingsOf(ROLE_SCHEMAS[role]);
    assert.is(new Set(settings.map(({ flag }) => flag)).size, settings.length, role);
    for (const { flag, path } of settings) {
      const before = meaning.get(flag) ?? path.join('.');
      assert.is(path.join('.'), before, `--${flag}`);
      meaning.set(flag, before);
    }
  }
});

test.run();
