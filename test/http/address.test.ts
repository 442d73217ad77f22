import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { formatAddress, parseAddress } from '../../src/http/address.js';

test('what is read is written the same', () => {
  for (const text of ['unix:/run/tpla/a.sock', 'tcp://127.0.0.1:80', 'tcp://[::1]:65535', 'tcp://host.example:0']) assert.is(formatAddress(parseAddress(text)), text);
  assert.is(formatAddress(parseAddress('http://host:80/')), 'tcp://host:80');
});

test('everything else is refused with the text itself', () => {
  for (const text of ['', 'host:80', 'tcp://host', 'tcp://host:65536', 'tcp://:80', 'tcp://host:80/path', '/run/a.sock', 'unix:']) {
    assert.throws(() => parseAddress(text), (error: { code: string; message: string }) => error.code === 'USAGE' && error.message.includes(`"${text}"`), text);
  }
});

test('a socket path longer than the kernel takes', () => {
  assert.is(parseAddress(`unix:/${'x'.repeat(106)}`).kind, 'unix');
  assert.throws(() => parseAddress(`unix:/${'x'.repeat(107)}`), /108 bytes, the kernel takes 107/);
});

test.run();
