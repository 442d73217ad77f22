import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { fromBf16, toBf16, toE4m3, toF16 } from '../../src/model/dtype.js';

const test = suite('model/dtype');

/** Decodes by the definition of the formats: sign, exponent, fraction. */
function decode(code: number, exponentBits: number, mantissaBits: number): number {
  const sign = code >>> (exponentBits + mantissaBits) ? -1 : 1;
  const exponent = (code >>> mantissaBits) & (2 ** exponentBits - 1);
  const fraction = (code & (2 ** mantissaBits - 1)) / 2 ** mantissaBits;
  const bias = 2 ** (exponentBits - 1) - 1;
  return sign * (exponent === 0 ? fraction * 2 ** (1 - bias) : (1 + fraction) * 2 ** (exponent - bias));
}

test('every finite code of e4m3, fp16 and bf16 survives a round trip', () => {
  for (let code = 0; code < 256; code++) if ((code & 0x7f) !== 0x7f) assert.is(toE4m3(new Float32Array([decode(code, 4, 3)]))[0], code);
  for (let code = 0; code < 65536; code++) if ((code & 0x7c00) !== 0x7c00) assert.is(toF16(new Float32Array([decode(code, 5, 10)]))[0], code);
  const all = Uint16Array.from({ length: 65536 }, (_, i) => i).filter((code) => (code & 0x7f80) !== 0x7f80);
  assert.equal(toBf16(fromBf16(all)), all);
});

test('halfway goes to even, and over a binade', () => {
  assert.is(toE4m3(new Float32Array([1 + 1 / 16]))[0], 0x38);
  assert.is(toE4m3(new Float32Array([1 + 3 / 16]))[0], 0x3a);
  assert.is(toE4m3(new Float32Array([1.97]))[0], 0x40);
  assert.is(toE4m3(new Float32Array([2 ** -10]))[0], 0);
  assert.is(toF16(new Float32Array([1 + 2 ** -11]))[0], 0x3c00);
  assert.is(toBf16(new Float32Array([1 + 3 * 2 ** -8]))[0], 0x3f82);
});

test('e4m3 saturates at 448, fp16 overflows to infinity', () => {
  assert.is(toE4m3(new Float32Array([1e9]))[0], 0x7e);
  assert.is(toE4m3(new Float32Array([-460]))[0], 0xfe);
  assert.is(toF16(new Float32Array([65520]))[0], 0x7c00);
  assert.is(toE4m3(new Float32Array([NaN]))[0]! & 0x7f, 0x7f);
});

test.run();
