import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { layerGroups } from '../../src/transfer/layer_groups.js';

const test = suite('layer groups');
const MB = 1e6;

test('between GPUs groups shrink, with little to verify at the end', () => {
  assert.equal(layerGroups('cuda-fd', 61, 527 * MB), [[0, 46], [46, 58], [58, 61]]);
  assert.equal(layerGroups('same-gpu', 27, 70 * MB), [[0, 22], [22, 27]]);
});

test('what is small goes at once', () => {
  assert.equal(layerGroups('cuda-ipc', 61, 39 * MB), [[0, 61]]);
  assert.equal(layerGroups('cuda-ipc', 4, 5000 * MB), [[0, 4]]);
});

test('groups are even into or out of host memory over PCIe', () => {
  assert.equal(layerGroups('pinned', 61, 527 * MB), [[0, 15], [15, 31], [31, 46], [46, 61]]);
  assert.equal(layerGroups('pinned', 2, 527 * MB), [[0, 1], [1, 2]]);
});

test('where CPUs or links between hosts move it there is one push', () => {
  for (const path of ['shm', 'tcp', 'ucx', 'nixl'] as const) assert.equal(layerGroups(path, 61, 527 * MB), [[0, 61]]);
});

test('every layer is in one group, in order, none empty', () => {
  for (const path of ['cuda-fd', 'pinned'] as const) {
    for (let layers = 1; layers <= 130; layers++) {
      for (const bytes of [1, 50, 200, 1000, 100_000]) {
        const groups = layerGroups(path, layers, bytes * MB);
        assert.equal(groups.flatMap(([begin, end]) => Array.from({ length: end - begin }, (_, i) => begin + i)), Array.from({ length: layers }, (_, i) => i));
        assert.ok(groups.every(([begin, end]) => begin < end));
        if (path === 'cuda-fd') for (let i = 1; i < groups.length; i++) assert.ok(groups[i]![1] - groups[i]![0] < groups[i - 1]![1] - groups[i - 1]![0]);
      }
    }
  }
});

test.run();
