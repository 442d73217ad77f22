// Packing into bf16 tiles, and the order in which tiles are multiplied. Compiled once per instruction set with internal linkage; the
// including file defines BlockProduct, which multiplies up to 2 x 2 tiles over all of k.

#include <immintrin.h>

#include "cpu/bf16_tiles.h"

namespace tpla::cpu {
namespace {

// Lane i of `low` before lane i of `high`: 32 consecutive values.
__m512i to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
__m512 from_bf16_low(__m512i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16)); }
__m512 from_bf16_high(__m512i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16)); }

// Masks of the first `count` of two vectors of 16.
struct Masks {
  __mmask16 low, high;
};
Masks first_of(int64_t count) {
  const int64_t low = count < 16 ? count : 16;
  const int64_t high = count > 16 ? (count < 32 ? count - 16 : 16) : 0;
  return {__mmask16((1u << low) - 1), __mmask16((1u << high) - 1)};
}

// Splits 32 values into bf16 vectors.
template <int Parts>
void split(__m512 low, __m512 high, __m512i (&out)[Parts]) {
  out[0] = to_bf16(low, high);
  for (int part = 1; part < Parts; ++part) {
    low = _mm512_sub_ps(low, from_bf16_low(out[part - 1]));
    high = _mm512_sub_ps(high, from_bf16_high(out[part - 1]));
    out[part] = to_bf16(low, high);
  }
}

template <WeightDType D>
__m512 load16(const std::byte* p, __mmask16 mask) {
  if constexpr (D == WeightDType::f32) {
    return _mm512_maskz_loadu_ps(mask, p);
  } else if constexpr (D == WeightDType::bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
  } else if constexpr (D == WeightDType::f16) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
  } else {
    // e4m3 shifted into fp16's fields is the value times 2^-8, subnormals included.
    const __m256i bits = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(mask, p));
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x80)), 8);
    const __m256i value = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign);
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_mask_mov_epi16(value, nan, _mm256_set1_epi16(0x7e00))), _mm512_set1_ps(256.0f));
  }
}

template <WeightDType D>
constexpr size_t kStored = D == WeightDType::f32 ? 4 : D == WeightDType::f8_e4m3 ? 1 : 2;

template <int Parts>
void pack_x_as(const float* x, int64_t ldx, int64_t rows, int64_t k, uint16_t* tiles) {
  const int64_t k_tiles = (k + kTileDepth - 1) / kTileDepth;
  for (int64_t row_tile = 0; row_tile * kTileRows < rows; ++row_tile) {
    for (int64_t kt = 0; kt < k_tiles; ++kt) {
      uint16_t* out = tiles + (row_tile * k_tiles + kt) * Parts * kTileElements;
      const Masks masks = first_of(k - kt * kTileDepth);
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t row = row_tile * kTileRows + r;
        __m512i split_row[Parts] = {};
        if (row < rows) {
          const float* at = x + row * ldx + kt * kTileDepth;
          split(_mm512_maskz_loadu_ps(masks.low, at), _mm512_maskz_loadu_ps(masks.high, at + 16), split_row);
        }
        for (int part = 0; part < Parts; ++part) _mm512_store_si512(out + part * kTileElements + r * kTileDepth, split_row[part]);
      }
    }
  }
}

void pack_x(const float* x, int64_t ldx, int64_t rows, int64_t k, int parts, uint16_t* tiles) {
  switch (parts) {
    case 1: return pack_x_as<1>(x, ldx, rows, k, tiles);
    case 2: return pack_x_as<2>(x, ldx, rows, k, tiles);
    default: return pack_x_as<3>(x, ldx, rows, k, tiles);
  }
}

// Rows of 16 pairs become columns of pairs: a transposition of 32-bit elements.
void transpose_pairs(__m512i (&rows)[16]) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(rows[i]);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 low_a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x44);
    const __m512 high_a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xee);
    const __m512 low_b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x44);
    const __m512 high_b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xee);
    rows[c] = _mm512_castps_si512(_mm512_shuffle_f32x4(low_a, low_b, 0x88));
    rows[4 + c] = _mm512_castps_si512(_mm512_shuffle_f32x4(low_a, low_b, 0xdd));
    rows[8 + c] = _mm512_castps_si512(_mm512_shuffle_f32x4(high_a, high_b, 0x88));
    rows[12 + c] = _mm512_castps_si512(_mm512_shuffle_f32x4(high_a, high_b, 0xdd));
  }
}

template <WeightDType D, int Parts>
void pack_w_as(const WeightView& w, int64_t row0, int64_t n, int64_t col0, int64_t k, uint16_t* tiles) {
  const int64_t k_tiles = (k + kTileDepth - 1) / kTileDepth;
  for (int64_t column_tile = 0; column_tile * 16 < n; ++column_tile) {
    const int64_t columns = n - column_tile * 16 < 16 ? n - column_tile * 16 : 16;
    for (int64_t kt = 0; kt < k_tiles; ++kt) {
      uint16_t* out = tiles + (column_tile * k_tiles + kt) * Parts * kTileElements;
      const int64_t depth = k - kt * kTileDepth;
      [[maybe_unused]] const Masks masks = first_of(depth);
      __m512i rows[Parts][16];
      for (int r = 0; r < 16; ++r) {
        __m512i split_row[Parts] = {};
        if (r < columns) {
          const std::byte* at = w.data + size_t((row0 + column_tile * 16 + r) * w.ld + col0 + kt * kTileDepth) * kStored<D>;
          if constexpr (D == WeightDType::bf16) {
            split_row[0] = depth >= kTileDepth ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << depth) - 1), at);
          } else {
            split(load16<D>(at, masks.low), load16<D>(at + 16 * kStored<D>, masks.high), split_row);
          }
        }
        for (int part = 0; part < Parts; ++part) rows[part][r] = split_row[part];
      }
      for (int part = 0; part < Parts; ++part) {
        transpose_pairs(rows[part]);
        for (int p = 0; p < 16; ++p) _mm512_store_si512(out + part * kTileElements + p * 32, rows[part][p]);
      }
    }
  }
}

template <WeightDType D>
void pack_w_parts(const WeightView& w, int64_t row0, int64_t n, int64_t col0, int64_t k, int parts, uint16_t* tiles) {
  if (parts == 1) return pack_w_as<D, 1>(w, row0, n, col0, k, tiles);
  if constexpr (exact_parts(D) > 1) {
    if (parts == 2) return pack_w_as<D, 2>(w, row0, n, col0, k, tiles);
  }
  if constexpr (exact_parts(D) > 2) return pack_w_as<D, 3>(w, row0, n, col0, k, tiles);
}

void pack_w(const WeightView& w, int64_t row0, int64_t n, int64_t col0, int64_t k, int parts, uint16_t* tiles) {
  switch (w.dtype) {
    case WeightDType::f32: return pack_w_parts<WeightDType::f32>(w, row0, n, col0, k, parts, tiles);
    case WeightDType::bf16: return pack_w_parts<WeightDType::bf16>(w, row0, n, col0, k, parts, tiles);
    case WeightDType::f16: return pack_w_parts<WeightDType::f16>(w, row0, n, col0, k, parts, tiles);
    case WeightDType::f8_e4m3: return pack_w_parts<WeightDType::f8_e4m3>(w, row0, n, col0, k, parts, tiles);
  }
}

// 32 rows of 16 fp32 values as 16 rows of pairs: lane c of row p holds rows 2p and 2p + 1 of column c.
template <int Parts>
void load_pairs(const float* at, int64_t ld, int64_t rows, __mmask16 columns, __m512i (&pairs)[Parts][16]) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  for (int p = 0; p < 16; ++p) {
    const __m512 even = 2 * p < rows ? _mm512_maskz_loadu_ps(columns, at + 2 * p * ld) : _mm512_setzero_ps();
    const __m512 odd = 2 * p + 1 < rows ? _mm512_maskz_loadu_ps(columns, at + (2 * p + 1) * ld) : _mm512_setzero_ps();
    __m512i parts[Parts];
    split(even, odd, parts);
    for (int part = 0; part < Parts; ++part) pairs[part][p] = _mm512_permutexvar_epi16(interleave, parts[part]);
  }
}

// [k, columns] into tiles of x (pairs transposed again) or of w.
template <int Parts, bool IsX>
void pack_transposed_as(const float* from, int64_t ld, int64_t columns, int64_t k, uint16_t* tiles) {
  const int64_t k_tiles = (k + kTileDepth - 1) / kTileDepth;
  for (int64_t tile = 0; tile * 16 < columns; ++tile) {
    const __mmask16 mask = first_of(columns - tile * 16).low;
    for (int64_t kt = 0; kt < k_tiles; ++kt) {
      uint16_t* out = tiles + (tile * k_tiles + kt) * Parts * kTileElements;
      __m512i pairs[Parts][16];
      load_pairs<Parts>(from + kt * kTileDepth * ld + tile * 16, ld, k - kt * kTileDepth, mask, pairs);
      for (int part = 0; part < Parts; ++part) {
        if constexpr (IsX) transpose_pairs(pairs[part]);
        for (int p = 0; p < 16; ++p) _mm512_store_si512(out + part * kTileElements + p * 32, pairs[part][p]);
      }
    }
  }
}

template <bool IsX>
void pack_transposed(const float* from, int64_t ld, int64_t columns, int64_t k, int parts, uint16_t* tiles) {
  switch (parts) {
    case 1: return pack_transposed_as<1, IsX>(from, ld, columns, k, tiles);
    case 2: return pack_transposed_as<2, IsX>(from, ld, columns, k, tiles);
    default: return pack_transposed_as<3, IsX>(from, ld, columns, k, tiles);
  }
}

// Adds a finished block of 32 x 32 sums to c.
void merge_block(const TileProduct& p, const float* sums, int64_t row, int64_t column) {
  const Masks masks = first_of(p.n - column);
  const int64_t rows = p.m - row < 32 ? p.m - row : 32;
  const __m512 scale = _mm512_set1_ps(p.scale);
  for (int64_t r = 0; r < rows; ++r) {
    float* c = p.c + (row + r) * p.ldc + column;
    __m512 low = _mm512_mul_ps(scale, _mm512_load_ps(sums + r * 32));
    __m512 high = _mm512_mul_ps(scale, _mm512_load_ps(sums + r * 32 + 16));
    if (p.accumulate) {
      low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(masks.low, c));
      high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(masks.high, c + 16));
    }
    _mm512_mask_storeu_ps(c, masks.low, low);
    _mm512_mask_storeu_ps(c + 16, masks.high, high);
  }
}

void multiply(const TileProduct& p) {
  BlockProduct block;
  alignas(64) float sums[32 * 32];
  // A pair of column tiles stays in the first-level cache while all rows pass.
  for (int64_t column = 0; column < p.n; column += 32) {
    for (int64_t row = 0; row < p.m; row += 32) {
      block.run(p, row / kTileRows, p.m - row > kTileRows ? 2 : 1, column / 16, p.n - column > 16 ? 2 : 1, sums);
      merge_block(p, sums, row, column);
    }
  }
}

}  // namespace
}  // namespace tpla::cpu
