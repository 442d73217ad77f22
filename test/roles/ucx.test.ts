import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { UcxConfig } from '../../src/config/types.js';
import { findUcx } from '../../src/transfer/ucx.js';
import { generate, LOCAL_TRANSFER, promptOf, WorkerStack } from '../support/worker_stack.js';

const all = suite('roles/ucx');
const test = findUcx() === null ? all.skip : all;

const OVER_TCP: UcxConfig = { use: 'always', library: null, options: { UCX_TLS: 'tcp', UCX_LOG_LEVEL: 'fatal' } };

test('workers hand off over UCX and generate what they do over shared memory; where prefill requires it, one without is refused', async () => {
  const stack = new WorkerStack();
  try {
    const prompt = promptOf(300, 4);
    const local = await stack.start('decode', stack.decodeConfig());
    const remote = await stack.start('decode', stack.decodeConfig({
      id: 'decode-1', listen: stack.address('decode-1'), handoff_listen: 'tcp://127.0.0.1:0', transfer: { ...LOCAL_TRANSFER, ucx: OVER_TCP },
    }));
    const without = await stack.start('decode', stack.decodeConfig({ id: 'decode-2', listen: stack.address('decode-2'), handoff_listen: 'tcp://127.0.0.1:0' }));
    const prefill = await stack.start('prefill', stack.prefillConfig({ transfer: { ...LOCAL_TRANSFER, require_path: 'ucx', ucx: OVER_TCP } }));
    const expected = await generate(prefill.client, local.client, prompt);
    const found = await generate(prefill.client, remote.client, prompt);
    assert.is(expected.transfer!.path, 'shm');
    assert.is(found.transfer!.path, 'ucx');
    assert.equal(found.text, expected.text);
    assert.match(await remote.client.text('/metrics'), /tpla_decode_landed_bytes_total\{path="ucx"\} [1-9]/);
    assert.match(prefill.stderr, /"msg":"UCX 1\.[^"]*tcp/);
    const refused = await generate(prefill.client, without.client, prompt).then(() => null, (error: { code: string; message: string }) => error);
    assert.is(refused?.code, 'HANDSHAKE_REFUSED');
    assert.match(refused!.message, /the path to decode is tcp, at least ucx is required/);
  } finally {
    await stack.end();
  }
});

all.run();
