#pragma once
#include <cstddef>
#include <cstdint>

#include "core/weight_view.h"

namespace tpla::cpu {

// Matrix products on bf16 hardware with fp32 accumulation. An fp32 value v is given in up to three parts, p0 = bf16(v),
// p1 = bf16(v - p0), p2 = bf16(v - p0 - p1), which carry 8, 16 and all 24 bits of its mantissa. Of the products of parts i of x and j of w
// those with i + j < parts of x are added up, so that three parts of x give what fp32 arithmetic gives, two parts about 2^-17.
//
// Operands lie in tiles of 16 x 32 values, 1 KiB each, padded with zeros:
//   x: [row tile][k tile][part][16 rows][32 k]
//   w: [column tile][k tile][part][16 k pairs][16 columns][2]
inline constexpr int kTileRows = 16;
inline constexpr int kTileDepth = 32;
inline constexpr int kTileElements = kTileRows * kTileDepth;

struct TileProduct {
  int64_t m, n;        // rows of x, columns of w
  const uint16_t* x;   // first of `k_tiles` tiles of the first row tile
  int64_t x_row_tile;  // elements from one row tile to the next
  int x_parts;
  const uint16_t* w;
  int64_t w_column_tile;
  int w_parts;
  int64_t k_tiles;
  float scale;  // c = scale * product, or c += where `accumulate`
  bool accumulate;
  float* c;
  int64_t ldc;
};

struct TileKernels {
  const char* name;
  // x[rows, k] into ceil(rows / 16) complete row tiles.
  void (*pack_x)(const float* x, int64_t ldx, int64_t rows, int64_t k, int parts, uint16_t* tiles);
  // Rows [row0, row0 + n) of W, columns [col0, col0 + k), without block scales.
  void (*pack_w)(const WeightView& w, int64_t row0, int64_t n, int64_t col0, int64_t k, int parts, uint16_t* tiles);
  // The same from transposed fp32 storage: x as [k, rows], W as [k, n].
  void (*pack_x_transposed)(const float* x, int64_t ldx, int64_t rows, int64_t k, int parts, uint16_t* tiles);
  void (*pack_w_transposed)(const float* w, int64_t ldw, int64_t n, int64_t k, int parts, uint16_t* tiles);
  void (*multiply)(const TileProduct& product);
  // For measuring the machine: nothing but tile products, returning how many operations were made.
  int64_t (*product_loop)(int64_t rounds);
};

#if defined(__x86_64__)
const TileKernels& avx512bf16_tiles();
const TileKernels& amx_tiles();
#endif

inline constexpr int kMostParts = 3;

// Parts in which a stored value is exact.
constexpr int exact_parts(WeightDType dtype) { return dtype == WeightDType::f32 ? 3 : dtype == WeightDType::f16 ? 2 : 1; }

}  // namespace tpla::cpu
