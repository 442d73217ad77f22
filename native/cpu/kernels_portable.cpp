#include <cstddef>
#include <cstring>
#include <utility>

#include "core/numeric.h"
#include "core/weight_view.h"

namespace tpla::cpu {
namespace {

// GCC vector extensions: four lanes map to SSE2 or NEON.
struct Simd {
  typedef float V __attribute__((vector_size(16)));
  typedef int I __attribute__((vector_size(16)));
  static constexpr int width = 4;
  static constexpr int tile_rows = 4;
  static constexpr const char* name = "portable";

  static V zero() { return V{}; }
  static V set1(float x) { return V{x, x, x, x}; }
  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof(v)); }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }
  static V min(V a, V b) { return a < b ? a : b; }
  static V zero_below(V value, V x, float limit) { return x < set1(limit) ? V{} : value; }
  static float reduce_add(V v) { return (v[0] + v[1]) + (v[2] + v[3]); }
  static V pow2(V n) { return (V)((__builtin_convertvector(n, I) + 127) << 23); }

  template <WeightDType D>
  static V load_as(const std::byte* p) {
    if constexpr (D == WeightDType::f32) {
      return load(reinterpret_cast<const float*>(p));
    } else if constexpr (D == WeightDType::f8_e4m3) {
      return V{e4m3_to_float(uint8_t(p[0])), e4m3_to_float(uint8_t(p[1])), e4m3_to_float(uint8_t(p[2])), e4m3_to_float(uint8_t(p[3]))};
    } else {
      uint16_t bits[4];
      std::memcpy(bits, p, sizeof(bits));
      if constexpr (D == WeightDType::bf16) {
        return (V)I{bits[0] << 16, bits[1] << 16, bits[2] << 16, int(uint32_t(bits[3]) << 16)};
      } else {
        return V{f16_to_float(bits[0]), f16_to_float(bits[1]), f16_to_float(bits[2]), f16_to_float(bits[3])};
      }
    }
  }

  static void transpose(V (&r)[4]) {
    const V t[4] = {r[0], r[1], r[2], r[3]};
    for (int i = 0; i < 4; ++i) r[i] = V{t[0][i], t[1][i], t[2][i], t[3][i]};
  }
};

}  // namespace
}  // namespace tpla::cpu

#include "cpu/kernels_impl.h"

namespace tpla::cpu {

const Kernels& portable_kernels() { return kKernels; }

}  // namespace tpla::cpu
