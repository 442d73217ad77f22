import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { workersFromConfig } from '../../src/fleet/discovery.js';

test('decode first, each with its role', () => {
  assert.equal(workersFromConfig({ prefill: ['unix:/a'], decode: ['tcp://[::1]:7100', 'http://h:1/'] }), [
    { role: 'decode', address: 'tcp://[::1]:7100' }, { role: 'decode', address: 'tcp://h:1' }, { role: 'prefill', address: 'unix:/a' },
  ]);
});

test('an empty list and an address that stands twice are refused by their place', () => {
  assert.throws(() => workersFromConfig({ prefill: [], decode: ['unix:/a'] }), /prefill: names no worker/);
  assert.throws(() => workersFromConfig({ prefill: ['unix:/b', 'http://h:1/'], decode: ['tcp://h:1'] }), /prefill\[1\]: tcp:\/\/h:1 stands already at decode\[0\]/);
});

test.run();
