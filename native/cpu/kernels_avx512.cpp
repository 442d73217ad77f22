#if defined(__x86_64__)
// GCC 12 warns about its own intrinsics, which leave a register undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <cstddef>
#include <immintrin.h>
#include <utility>

#include "core/weight_view.h"

namespace tpla::cpu {
namespace {

// AVX-512 F, BW, DQ and VL: server cores since Skylake, and Zen 4.
struct Simd {
  using V = __m512;
  static constexpr int width = 16;
  static constexpr int tile_rows = 12;
  static constexpr const char* name = "avx512";

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static V zero_below(V value, V x, float limit) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(limit), _CMP_NLT_UQ), value); }
  static float reduce_add(V v) { return _mm512_reduce_add_ps(v); }
  static V pow2(V n) { return _mm512_scalef_ps(set1(1.0f), n); }

  template <WeightDType D>
  static V load_as(const std::byte* p) {
    if constexpr (D == WeightDType::f32) {
      return _mm512_loadu_ps(p);
    } else if constexpr (D == WeightDType::bf16) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
    } else if constexpr (D == WeightDType::f16) {
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    } else {
      // e4m3 shifted into fp16's fields is the value times 2^-8, subnormals included.
      const __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi16(0x7f));
      const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x80)), 8);
      const __m256i value = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign);
      const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
      const __m256i half = _mm256_mask_mov_epi16(value, nan, _mm256_set1_epi16(0x7e00));
      return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
    }
  }

  static void transpose(V (&r)[16]) {
    V t[16];
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
    // r[4i + c] now holds columns c, c + 4, c + 8, c + 12 of rows 4i..4i+3, one per 128-bit lane.
    for (int c = 0; c < 4; ++c) {
      const V low_a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x44);
      const V high_a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xee);
      const V low_b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x44);
      const V high_b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xee);
      t[c] = _mm512_shuffle_f32x4(low_a, low_b, 0x88);
      t[4 + c] = _mm512_shuffle_f32x4(low_a, low_b, 0xdd);
      t[8 + c] = _mm512_shuffle_f32x4(high_a, high_b, 0x88);
      t[12 + c] = _mm512_shuffle_f32x4(high_a, high_b, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
};

}  // namespace
}  // namespace tpla::cpu

#include "cpu/kernels_impl.h"

namespace tpla::cpu {

const Kernels& avx512_kernels() { return kKernels; }

}  // namespace tpla::cpu
#endif
