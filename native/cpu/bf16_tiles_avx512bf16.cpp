#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#include "cpu/bf16_tiles.h"

namespace tpla::cpu {
namespace {

// The tiles of AMX multiplied with the AVX-512 bf16 dot product: a pair of x against 16 pairs of w.
class BlockProduct {
 public:
  void run(const TileProduct& p, int64_t row, int rows, int64_t column, int columns, float* sums) {
    for (int r = 0; r < rows; ++r) {
      // 8 rows of one x tile against both column tiles: 16 accumulators.
      for (int half = 0; half < 2; ++half) {
        eight_rows(p, p.x + (row + r) * p.x_row_tile + half * 8 * kTileDepth, p.w + column * p.w_column_tile, columns == 2 ? p.w_column_tile : 0,
                   sums + (r * 16 + half * 8) * 32);
      }
    }
  }

 private:
  static void eight_rows(const TileProduct& p, const uint16_t* x, const uint16_t* w, int64_t next_column, float* sums) {
    __m512 acc[8][2];
    for (auto& row : acc) row[0] = row[1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p.k_tiles; ++k) {
      const uint16_t* xt = x + k * p.x_parts * kTileElements;
      const uint16_t* wt = w + k * p.w_parts * kTileElements;
      for (int wp = 0; wp < p.w_parts; ++wp) {
        for (int xp = 0; xp + wp < p.x_parts; ++xp) pairs(acc, xt + xp * kTileElements, wt + wp * kTileElements, next_column);
      }
    }
    for (int i = 0; i < 8; ++i) {
      _mm512_store_ps(sums + i * 32, acc[i][0]);
      _mm512_store_ps(sums + i * 32 + 16, acc[i][1]);
    }
  }

  static void pairs(__m512 (&acc)[8][2], const uint16_t* x, const uint16_t* w, int64_t next_column) {
    for (int pair = 0; pair < 16; ++pair) {
      const __m512bh first = (__m512bh)_mm512_load_si512(w + pair * 32);
      const __m512bh second = (__m512bh)_mm512_load_si512(w + next_column + pair * 32);
      for (int i = 0; i < 8; ++i) {
        int bits;
        std::memcpy(&bits, x + i * kTileDepth + pair * 2, 4);
        const __m512bh in = (__m512bh)_mm512_set1_epi32(bits);
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], in, first);
        acc[i][1] = _mm512_dpbf16_ps(acc[i][1], in, second);
      }
    }
  }
};

}  // namespace
}  // namespace tpla::cpu

#include "cpu/bf16_tiles_impl.h"

namespace tpla::cpu {

namespace {

int64_t product_loop(int64_t rounds) {
  __m512 acc[16];
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_set1_ps(float(i));
  __m512i ones = _mm512_set1_epi16(0x3f80);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < 16; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)ones, (__m512bh)ones);
    __asm__ volatile("" : "+v"(ones));
  }
  __m512 total = acc[0];
  for (int i = 1; i < 16; ++i) total = _mm512_add_ps(total, acc[i]);
  return _mm512_cvtss_f32(total) != 0 ? rounds * 16 * 32 * 2 : 0;
}

}  // namespace

const TileKernels& avx512bf16_tiles() {
  static constexpr TileKernels kernels = {"avx512_bf16", pack_x, pack_w, pack_transposed<true>, pack_transposed<false>, multiply, product_loop};
  return kernels;
}

}  // namespace tpla::cpu
#endif
