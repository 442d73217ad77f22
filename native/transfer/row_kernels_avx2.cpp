#include "transfer/row_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "transfer/prefetch.h"
#include "transfer/row_loops.h"

namespace tpla {

namespace {

// Key halves times words, kept apart until the end: the high half's product counts 2^32 times.
struct Sums {
  __m256i low = _mm256_setzero_si256();
  __m256i high = _mm256_setzero_si256();

  void add(__m256i words, const KeyTable& keys, size_t pair) {
    const __m256i odd = _mm256_srli_epi64(words, 32);
    low = _mm256_add_epi64(low, _mm256_mul_epu32(words, load(keys.even_low + pair)));
    high = _mm256_add_epi64(high, _mm256_mul_epu32(words, load(keys.even_high + pair)));
    low = _mm256_add_epi64(low, _mm256_mul_epu32(odd, load(keys.odd_low + pair)));
    high = _mm256_add_epi64(high, _mm256_mul_epu32(odd, load(keys.odd_high + pair)));
  }

  uint64_t total() const {
    alignas(32) uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi64(low, _mm256_slli_epi64(high, 32)));
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }

  static __m256i load(const uint64_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
};

enum class Store { none, cached, streamed };

template <Store store>
uint64_t run(std::byte* to, const std::byte* from, size_t words, size_t first, const std::byte* ahead) {
  const KeyTable& keys = checksum_keys();
  uint64_t sum = 0;
  size_t i = 0;
  const auto scalar = [&] {
    sum += word_term(from + i * 4, first + i);
    if constexpr (store != Store::none) std::memcpy(to + i * 4, from + i * 4, 4);
    i++;
  };
  // Up to an even word, and for streaming up to an aligned address.
  while (i < words && ((first + i) % 2 != 0 || (store == Store::streamed && reinterpret_cast<uintptr_t>(to + i * 4) % 32 != 0))) scalar();
  Sums sums;
  for (; i + 8 <= words; i += 8) {
    _mm_prefetch(reinterpret_cast<const char*>(from + i * 4 + kLineAheadBytes), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(ahead + i * 4), _MM_HINT_T1);
    const __m256i data = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * 4));
    if constexpr (store == Store::cached) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * 4), data);
    if constexpr (store == Store::streamed) _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i * 4), data);
    sums.add(data, keys, (first + i) / 2);
  }
  while (i < words) scalar();
  return sum + sums.total();
}

uint64_t hash(const std::byte* from, size_t words, size_t first, const std::byte* ahead) { return run<Store::none>(nullptr, from, words, first, ahead); }
uint64_t copy(std::byte* to, const std::byte* from, size_t words, size_t first, const std::byte* ahead) {
  return run<Store::cached>(to, from, words, first, ahead);
}

// An address that never becomes aligned at an even word is copied through the caches.
uint64_t stream(std::byte* to, const std::byte* from, size_t words, size_t first, const std::byte* ahead) {
  if ((reinterpret_cast<uintptr_t>(to) / 4 + first) % 2 != 0 || reinterpret_cast<uintptr_t>(to) % 4 != 0) return copy(to, from, words, first, ahead);
  return run<Store::streamed>(to, from, words, first, ahead);
}

void fence() { _mm_sfence(); }

constexpr RowKernels kAvx2 = {"avx2", hash, copy, stream, fence, bf16_to_f32, f32_to_bf16, e4m3_to_f32, f32_to_e4m3};

}  // namespace

const RowKernels* row_kernels_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kAvx2 : nullptr; }

}  // namespace tpla
#else
namespace tpla {
const RowKernels* row_kernels_avx2() { return nullptr; }
}  // namespace tpla
#endif
