/**
 * Conversions between fp32 and the stored number formats, round to nearest even. For headers, tests and small tensors; the
 * addon converts the large ones.
 */

const scratchFloat = new Float32Array(1);
const scratchBits = new Uint32Array(scratchFloat.buffer);

export function toBf16(values: Float32Array): Uint16Array {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  const out = new Uint16Array(values.length);
  for (let i = 0; i < out.length; i++) {
    const x = bits[i]!;
    out[i] = (x & 0x7fffffff) > 0x7f800000 ? (x >>> 16) | 0x40 : (x + 0x7fff + ((x >>> 16) & 1)) >>> 16;
  }
  return out;
}

export function fromBf16(values: Uint16Array): Float32Array {
  const out = new Float32Array(values.length);
  const bits = new Uint32Array(out.buffer);
  for (let i = 0; i < out.length; i++) bits[i] = values[i]! << 16;
  return out;
}

export function toF16(values: Float32Array): Uint16Array {
  return Uint16Array.from(values, (x) => minifloat(x, 5, 10, false));
}

/** OCP e4m3 (`fn`): no infinities, largest value 448, larger ones saturate. */
export function toE4m3(values: Float32Array): Uint8Array {
  return Uint8Array.from(values, (x) => minifloat(x, 4, 3, true));
}

/** Encodes |x| by rounding to a multiple of the spacing of its binade; rounding up over a binade's end carries into the exponent. */
function minifloat(x: number, exponentBits: number, mantissaBits: number, finiteOnly: boolean): number {
  scratchFloat[0] = x;
  const sign = (scratchBits[0]! >>> 31) << (exponentBits + mantissaBits);
  const magnitude = Math.abs(x);
  const bias = 2 ** (exponentBits - 1) - 1;
  const largest = finiteOnly ? 2 ** (exponentBits + mantissaBits) - 2 : (2 ** exponentBits - 1) * 2 ** mantissaBits;
  if (Number.isNaN(x)) return sign | (finiteOnly ? largest + 1 : largest | 1);
  if (magnitude === Infinity) return sign | largest;
  const exponent = Math.max(magnitude === 0 ? -Infinity : Math.floor(Math.log2(magnitude)), 1 - bias);
  const steps = roundHalfEven(magnitude / 2 ** (exponent - mantissaBits));
  const code = (exponent + bias - 1) * 2 ** mantissaBits + steps;
  return sign | Math.min(code, largest);
}

function roundHalfEven(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}

/** Largest finite e4m3 value. */
const E4M3_MAX = 448;

/** Row-major matrix to fp8 with one fp32 scale per block, value = code × scale, as DeepSeek publishes them (`weight_scale_inv`). */
export function quantizeBlocks(values: Float32Array, rows: number, columns: number, [blockRows, blockColumns]: [number, number]): { codes: Uint8Array; scales: Float32Array } {
  const perRow = Math.ceil(columns / blockColumns);
  const scales = new Float32Array(Math.ceil(rows / blockRows) * perRow);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      const block = Math.floor(i / blockRows) * perRow + Math.floor(j / blockColumns);
      scales[block] = Math.max(scales[block]!, Math.abs(values[i * columns + j]!));
    }
  }
  for (let block = 0; block < scales.length; block++) scales[block] = scales[block] === 0 ? 1 : scales[block]! / E4M3_MAX;
  const codes = new Uint8Array(rows * columns);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      codes[i * columns + j] = minifloat(values[i * columns + j]! / scales[Math.floor(i / blockRows) * perRow + Math.floor(j / blockColumns)]!, 4, 3, true);
    }
  }
  return { codes, scales };
}
