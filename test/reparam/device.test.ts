import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { TplaError } from '../../src/errors.js';
import type { ProbeResult } from '../../src/native/types.js';
import { native } from '../../src/native/loader.js';
import { fitTarget } from '../../src/reparam/device.js';

const test = suite('reparam/device');

const gpu = (index: number, capability: string) => ({ index, name: `GPU ${index}`, capability, memoryBytes: 8e10, multiprocessors: 100, peers: [] });
function machine(compiled: boolean, devices: ProbeResult['cuda']['devices'], reason: string | null = null): () => ProbeResult {
  return () => ({ version: '0', cpu: { model: '', cores: 1, features: [], kernel: '', blas: null }, cuda: { compiled, driver: null, reason, devices }, libraries: [] });
}

function refusal(probe: () => ProbeResult): string {
  try {
    fitTarget('cuda', 0, probe);
  } catch (error) {
    assert.instance(error, TplaError);
    assert.is((error as TplaError).code, 'GPU_UNAVAILABLE');
    return (error as TplaError).message;
  }
  throw new Error('a GPU was found');
}

test('auto takes the first GPU that can be used, else the CPU', () => {
  assert.equal(fitTarget('auto', 3, machine(true, [gpu(0, '7.5'), gpu(1, '9.0')])), { device: 'cuda', index: 1 });
  assert.equal(fitTarget('auto', 3, machine(true, [gpu(0, '10.0')])), { device: 'cuda', index: 0 });
  assert.equal(fitTarget('auto', 3, machine(true, [gpu(0, '7.5')])), { device: 'cpu', threads: 3 });
  assert.equal(fitTarget('auto', 3, machine(true, [])), { device: 'cpu', threads: 3 });
  assert.equal(fitTarget('auto', 3, machine(false, [gpu(0, '9.0')])), { device: 'cpu', threads: 3 });
});

test('the CPU is not asked about GPUs', () => {
  assert.equal(fitTarget('cpu', 5, () => assert.unreachable() as never), { device: 'cpu', threads: 5 });
});

test('cuda without a GPU says what is missing and what to do', () => {
  assert.match(refusal(machine(false, [gpu(0, '9.0')])), /built without CUDA; TPLA_CUDA=on npm run build:native/);
  assert.match(refusal(machine(true, [], 'libcuda.so.1 is not there')), /no GPU can be used \(libcuda\.so\.1 is not there\)\. --device cpu/);
  assert.match(refusal(machine(true, [gpu(0, '7.5')])), /GPU 0 has compute capability 7\.5, at least 8\.0 is needed/);
});

test('the addon names what it computes with, and refuses what it has not', () => {
  assert.match(native().reparamDevice({ device: 'cpu', threads: 2 }), /, 2 threads$/);
  assert.throws(() => native().reparamDevice({ device: 'cuda', index: 63 }), (error: { code: string }) => error.code === 'GPU_UNAVAILABLE');
});

test.run();
