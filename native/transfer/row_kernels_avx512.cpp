#include "transfer/row_kernels.h"

#if defined(__x86_64__)
// GCC 12 takes the header's deliberately undefined vectors for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "transfer/row_lanes.h"

namespace tpla {

namespace {

struct Avx512 {
  using Vector = __m512i;
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector load(const void* at) { return _mm512_loadu_si512(at); }
  static void store(void* at, Vector value) { _mm512_storeu_si512(at, value); }
  static void stream(void* at, Vector value) { _mm512_stream_si512(static_cast<__m512i*>(at), value); }
  static Vector add(Vector a, Vector b) { return _mm512_add_epi64(a, b); }
  // Of the low halves.
  static Vector multiply(Vector a, Vector b) { return _mm512_mul_epu32(a, b); }
  static Vector high_half(Vector value) { return _mm512_srli_epi64(value, 32); }
  static Vector low_half_up(Vector value) { return _mm512_slli_epi64(value, 32); }
  static uint64_t sum(Vector value) { return static_cast<uint64_t>(_mm512_reduce_add_epi64(value)); }
};

void fence() { _mm_sfence(); }

constexpr RowKernels kAvx512 = {"avx512", hash<Avx512>, copy<Avx512>, stream<Avx512>, hash_lanes<Avx512>, copy_lanes<Avx512>, stream_lanes<Avx512>,
                                fence, bf16_to_f32, f32_to_bf16, e4m3_to_f32, f32_to_e4m3};

}  // namespace

const RowKernels* row_kernels_avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? &kAvx512 : nullptr; }

}  // namespace tpla
#else
namespace tpla {
const RowKernels* row_kernels_avx512() { return nullptr; }
}  // namespace tpla
#endif
