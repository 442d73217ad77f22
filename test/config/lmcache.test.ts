import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { loadRoleConfig } from '../../src/config/load.js';
import { tpla } from '../support/cli.js';

const test = suite('config/lmcache');
const directory = mkdtempSync(join(tmpdir(), 'tpla-lmcache-'));
test.after(() => rmSync(directory, { recursive: true }));

// As LMCache's documentation has them for one prefiller and one decoder.
const PREFILLER = `local_cpu: False
enable_pd: True
transfer_channel: "nixl"
pd_role: "sender"
pd_proxy_host: "localhost"
pd_proxy_port: 7500
pd_buffer_size: 1073741824
pd_buffer_device: "cuda"
`;
const DECODER = `local_cpu: False
enable_pd: True
transfer_channel: "nixl"
pd_role: "receiver"
pd_peer_host: "localhost"
pd_peer_init_port: [7300, 7301]
pd_peer_alloc_port: [7400, 7401]
pd_buffer_size: 2147483648
pd_buffer_device: "cpu"
nixl_backends: [UCX]
`;

let files = 0;
function file(text: string): string {
  const path = join(directory, `${files++}.yaml`);
  writeFileSync(path, text);
  return path;
}

const flags = { listen: 'unix:/run/tpla/worker.sock', model: '/models/tiny' };
function load(role: 'prefill' | 'decode', text: string) {
  const lines: string[] = [];
  const path = file(text);
  const config = loadRoleConfig(role, { file: path, flags, env: {}, note: (line) => lines.push(line.slice(path.length + 2)) });
  return { config, lines };
}
function refusal(role: 'prefill' | 'decode', text: string): string {
  try {
    load(role, text);
  } catch (error) {
    assert.is((error as { code: string }).code, 'CONFIG_INVALID');
    return (error as Error).message;
  }
  throw new Error('expected a refusal');
}

test("a decoder's file as it is: each key has its line", () => {
  const { config, lines } = load('decode', DECODER);
  assert.is((config as { handoff_listen: string }).handoff_listen, 'tcp://localhost:7300');
  assert.equal(config.transfer, { ucx: { use: 'auto', library: null, options: {} }, nixl: { use: 'auto', library: null, backends: ['UCX'], options: {} } });
  assert.is(lines.length, DECODER.trim().split('\n').length);
  assert.equal(lines.map((line) => line.split(':')[0]), DECODER.trim().split('\n').map((line) => line.split(':')[0]));
  assert.ok(lines.includes('pd_peer_host: "localhost": handoff_listen: tcp://localhost:7300'));
  assert.match(lines.find((line) => line.startsWith('pd_peer_init_port'))!, /\[7300,7301\].*the other ports are not used/);
  assert.match(lines.find((line) => line.startsWith('local_cpu'))!, /not used: blocks are kept by kv-pool/);
});

test("a prefiller's file as it is; ports may be plain numbers or text; keys of ours stand beside LMCache's", () => {
  assert.is(load('prefill', PREFILLER).lines.length, 8);
  const { config } = load('decode', `${DECODER.replace('[7300, 7301]', '"7311"')}max_batch: 3\nlease_ms: 700\n`);
  assert.is((config as { handoff_listen: string }).handoff_listen, 'tcp://localhost:7311');
  assert.is((config as { max_batch: number }).max_batch, 3);
  const sockets = load('prefill', PREFILLER.replace('nixl', 'py_socket')).config.transfer;
  assert.equal([sockets.ucx.use, sockets.nixl.use], ['never', 'never']);
  const { transfer } = load('prefill', `${PREFILLER}nixl_backends: [Mooncake, UCX]\ntransfer: { require_path: nixl, nixl: { use: always } }\n`).config;
  assert.equal(transfer, { require_path: 'nixl', ucx: { use: 'auto', library: null, options: {} }, nixl: { use: 'always', library: null, backends: ['Mooncake', 'UCX'], options: {} } });
});

test('what is wrong is one clear error', () => {
  assert.match(refusal('decode', PREFILLER), /pd_role: "sender" is not taken; expected receiver for serve-decode; this file is for serve-prefill/);
  assert.match(refusal('prefill', PREFILLER.replace('enable_pd: True', 'enable_pd: False')), /enable_pd: false is not taken; expected true/);
  assert.match(refusal('prefill', PREFILLER.replace('nixl', 'hccl')), /transfer_channel: "hccl" is not taken; expected nixl or py_socket/);
  assert.match(refusal('decode', DECODER.replace('[7300, 7301]', '[]')), /pd_peer_host: "localhost" is not taken; expected pd_peer_init_port beside it/);
  assert.match(refusal('prefill', PREFILLER.replace('"cuda"', '"tpu"')), /pd_buffer_device: "tpu" is not taken; expected cuda or cpu/);
  assert.match(refusal('prefill', `${PREFILLER}pd_bufer_size: 1\n`), /pd_bufer_size: unknown key; did you mean "pd_buffer_size"\?/);
  assert.match(refusal('prefill', `${PREFILLER}colour: red\n`), /colour: unknown key; it is neither one of tpla nor one of LMCache/);
});

test('the command prints the lines to standard error and the configuration to standard output', async () => {
  const { status, stdout, stderr } = await tpla(['serve-decode', '-c', file(DECODER), '--listen', flags.listen, '--model', flags.model, '--print-config']);
  assert.is(status, 0, stderr);
  assert.match(stdout, /handoff_listen: tcp:\/\/localhost:7300/);
  assert.match(stderr, /pd_buffer_size: 2147483648: not used: KV lands in the pages/);
});

test.run();
