#include "transfer/row_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "transfer/row_lanes.h"

namespace tpla {

namespace {

struct Avx2 {
  using Vector = __m256i;
  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
  static void store(void* at, Vector value) { _mm256_storeu_si256(static_cast<__m256i*>(at), value); }
  static void stream(void* at, Vector value) { _mm256_stream_si256(static_cast<__m256i*>(at), value); }
  static Vector add(Vector a, Vector b) { return _mm256_add_epi64(a, b); }
  // Of the low halves.
  static Vector multiply(Vector a, Vector b) { return _mm256_mul_epu32(a, b); }
  static Vector high_half(Vector value) { return _mm256_srli_epi64(value, 32); }
  static Vector low_half_up(Vector value) { return _mm256_slli_epi64(value, 32); }
  static uint64_t sum(Vector value) {
    alignas(32) uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), value);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }
};

void fence() { _mm_sfence(); }

constexpr RowKernels kAvx2 = {"avx2", hash<Avx2>, copy<Avx2>, stream<Avx2>, hash_lanes<Avx2>, copy_lanes<Avx2>, stream_lanes<Avx2>,
                              fence, bf16_to_f32, f32_to_bf16, e4m3_to_f32, f32_to_e4m3};

}  // namespace

const RowKernels* row_kernels_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kAvx2 : nullptr; }

}  // namespace tpla
#else
namespace tpla {
const RowKernels* row_kernels_avx2() { return nullptr; }
}  // namespace tpla
#endif
