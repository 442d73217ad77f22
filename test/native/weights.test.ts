import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { native as loadNative } from '../../src/native/loader.js';
import type { TensorEntry, WeightDType } from '../../src/native/types.js';

const native = loadNative();
const dir = mkdtempSync(join(tmpdir(), 'tpla-weights-'));
test.after(() => rmSync(dir, { recursive: true, force: true }));

function file(name: string, bytes: Uint8Array): string {
  const path = join(dir, name);
  writeFileSync(path, bytes);
  return path;
}

function entry(name: string, dtype: WeightDType, shape: number[], begin: number, end: number): TensorEntry {
  return { name, file: 0, dtype, shape, begin, end };
}

function codeOf(run: () => unknown): string | undefined {
  try {
    run();
  } catch (error) {
    return (error as { code?: string }).code;
  }
  return undefined;
}

/** e4m3fn by its definition. */
function e4m3(bits: number): number {
  const sign = bits & 0x80 ? -1 : 1;
  const exponent = (bits >> 3) & 15;
  const mantissa = bits & 7;
  if (exponent === 15 && mantissa === 7) return NaN;
  return sign * (exponent === 0 ? (mantissa / 8) * 2 ** -6 : (1 + mantissa / 8) * 2 ** (exponent - 7));
}

function f16(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const mantissa = bits & 1023;
  if (exponent === 31) return mantissa ? NaN : sign * Infinity;
  return sign * (exponent === 0 ? (mantissa / 1024) * 2 ** -14 : (1 + mantissa / 1024) * 2 ** (exponent - 15));
}

test('every fp16 and fp8 bit pattern reads as its definition says', () => {
  const halves = new Uint16Array(65536).map((_, i) => i);
  const bytes = new Uint8Array(256).map((_, i) => i);
  const path = file('patterns', Buffer.concat([Buffer.from(halves.buffer), bytes]));
  const weights = new native.Weights([path], [entry('half', 'F16', [65536], 0, 131072), entry('byte', 'F8_E4M3', [256], 131072, 131328)]);
  assert.is(weights.bytes, 131328);
  const half = weights.read('half');
  for (let i = 0; i < 65536; i++) assert.ok(Object.is(half[i], f16(i)) || (Number.isNaN(half[i]) && Number.isNaN(f16(i))), `f16 ${i}`);
  const byte = weights.read('byte');
  for (let i = 0; i < 256; i++) assert.ok(Object.is(byte[i], e4m3(i)) || (Number.isNaN(byte[i]) && Number.isNaN(e4m3(i))), `e4m3 ${i}`);
  weights.close();
});

test('bf16 and fp32 read exactly, from unaligned offsets too', () => {
  const values = Float32Array.from([1.5, -3.25e-20, 2 ** 100, 0]);
  const bf16 = Uint16Array.from([...new Uint32Array(values.buffer)].map((bits) => bits >>> 16));
  const path = file('plain', Buffer.concat([Buffer.from([0xff]), Buffer.from(values.buffer), Buffer.from(bf16.buffer)]));
  const weights = new native.Weights([path], [entry('single', 'F32', [2, 2], 1, 17), entry('brain', 'BF16', [4], 17, 25)]);
  assert.equal(weights.read('single'), values);
  assert.equal(weights.read('brain'), new Float32Array(new Uint32Array([...bf16].map((bits) => bits << 16)).buffer));
});

test('block scales apply per block, ragged edges included', () => {
  const rows = 5;
  const cols = 7;
  const bits = new Uint8Array(rows * cols).map((_, i) => (i * 37) % 0x7f);
  const scales = Float32Array.from([0.5, 3, 0.25, 1.5, 2, 7]);
  const path = file('scaled', Buffer.concat([bits, Buffer.from(scales.buffer)]));
  const weights = new native.Weights([path], [entry('w', 'F8_E4M3', [rows, cols], 0, 35), entry('w_scale_inv', 'F32', [2, 3], 35, 59)]);
  const read = weights.read('w', { name: 'w_scale_inv', block: [4, 3] });
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < cols; j++) {
      assert.is(read[i * cols + j], Math.fround(e4m3(bits[i * cols + j]!) * scales[Math.floor(i / 4) * 3 + Math.floor(j / 3)]!));
    }
  }
  assert.is(codeOf(() => weights.read('w', { name: 'w_scale_inv', block: [2, 3] })), 'CHECKPOINT_INVALID');
});

test('what cannot be mapped or read is refused by name', () => {
  const path = file('short', new Uint8Array(16));
  assert.is(codeOf(() => new native.Weights([join(dir, 'absent')], [])), 'IO_FAILED');
  assert.is(codeOf(() => new native.Weights([file('empty', new Uint8Array(0))], [])), 'IO_FAILED');
  assert.is(codeOf(() => new native.Weights([path], [entry('w', 'F32', [8], 0, 32)])), 'CHECKPOINT_INVALID');
  assert.is(codeOf(() => new native.Weights([path], [entry('w', 'F32', [3], 0, 16)])), 'CHECKPOINT_INVALID');
  assert.is(codeOf(() => new native.Weights([path], [entry('w', 'F32', [2 ** 40, 2 ** 40, 2 ** 40], 0, 16)])), 'CHECKPOINT_INVALID');
  assert.is(codeOf(() => new native.Weights([path], [{ ...entry('w', 'F32', [4], 0, 16), file: 1 }])), 'CHECKPOINT_INVALID');
  assert.is(codeOf(() => new native.Weights([path], [{ ...entry('w', 'F32', [4], 0, 16), dtype: 'I8' as WeightDType }])), 'MODEL_UNSUPPORTED');
  assert.is(codeOf(() => new native.Weights([path], 7 as never)), 'REQUEST_INVALID');
  const weights = new native.Weights([path], [entry('w', 'F32', [4], 0, 16)]);
  assert.is(codeOf(() => weights.read('v')), 'CHECKPOINT_INVALID');
  weights.close();
  assert.is(codeOf(() => weights.read('w')), 'REQUEST_INVALID');
  truncateSync(path, 8);
  assert.is(codeOf(() => new native.Weights([path], [entry('w', 'F32', [4], 0, 16)])), 'CHECKPOINT_INVALID');
});

test.run();
