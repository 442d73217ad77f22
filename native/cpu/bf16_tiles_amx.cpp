#if defined(__x86_64__)
// GCC 12 warns about its own intrinsics, which leave a register undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/bf16_tiles.h"

namespace tpla::cpu {
namespace {

// All eight tiles are 16 rows of 64 bytes. Static, because the compiler believes that loading it reads 8 bytes only and would drop the
// stores of a local one.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

// Tile registers: 0-3 sums of 2 x 2 tiles, 4-5 x, 6-7 w.
class BlockProduct {
 public:
  BlockProduct() { _tile_loadconfig(&kTileConfig); }
  // Leaves no tile state behind that the kernel would have to save.
  ~BlockProduct() { _tile_release(); }

  // sums[32][32] of row tiles `row`, `row` + 1 and column tiles `column`, `column` + 1, or of the first of either alone.
  void run(const TileProduct& p, int64_t row, int rows, int64_t column, int columns, float* sums) {
    const uint16_t* x0 = p.x + row * p.x_row_tile;
    const uint16_t* w0 = p.w + column * p.w_column_tile;
    const uint16_t* x1 = rows == 2 ? x0 + p.x_row_tile : x0;
    const uint16_t* w1 = columns == 2 ? w0 + p.w_column_tile : w0;
    const int64_t x_step = int64_t(p.x_parts) * kTileElements;
    const int64_t w_step = int64_t(p.w_parts) * kTileElements;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < p.k_tiles; ++k) {
      for (int wp = 0; wp < p.w_parts; ++wp) {
        _tile_loadd(6, w0 + k * w_step + wp * kTileElements, 64);
        _tile_loadd(7, w1 + k * w_step + wp * kTileElements, 64);
        for (int xp = 0; xp + wp < p.x_parts; ++xp) {
          _tile_loadd(4, x0 + k * x_step + xp * kTileElements, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          if (rows == 1) continue;
          _tile_loadd(5, x1 + k * x_step + xp * kTileElements, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * 32, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
  }
};

}  // namespace
}  // namespace tpla::cpu

#include "cpu/bf16_tiles_impl.h"

namespace tpla::cpu {

namespace {

int64_t product_loop(int64_t rounds) {
  const BlockProduct configured;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t r = 0; r < rounds; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return rounds * 4 * 16 * 16 * 32 * 2;
}

}  // namespace

const TileKernels& amx_tiles() {
  static constexpr TileKernels kernels = {"amx", pack_x, pack_w, pack_transposed<true>, pack_transposed<false>, multiply, product_loop};
  return kernels;
}

}  // namespace tpla::cpu
#endif
