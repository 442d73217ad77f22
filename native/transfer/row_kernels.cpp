#include "transfer/row_kernels.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <string>

#include "core/error.h"
#include "transfer/kv_checksum.h"
#include "transfer/row_loops.h"

namespace tpla {

static_assert(sizeof(KeyTable::even_low) / sizeof(uint64_t) * 2 == kMaxRowWords);

namespace {

uint64_t hash(const std::byte* from, size_t words, size_t first, const std::byte*) {
  const KeyTable& keys = checksum_keys();
  uint64_t sum = 0;
  for (size_t i = 0; i < words; i++) {
    const size_t pair = (first + i) / 2;
    const bool is_even = (first + i) % 2 == 0;
    uint32_t word;
    std::memcpy(&word, from + i * 4, 4);
    sum += word * (is_even ? keys.even_low[pair] | keys.even_high[pair] << 32 : keys.odd_low[pair] | keys.odd_high[pair] << 32);
  }
  return sum;
}

uint64_t copy(std::byte* to, const std::byte* from, size_t words, size_t first, const std::byte* ahead) {
  std::memcpy(to, from, words * 4);
  return hash(from, words, first, ahead);
}

void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

constexpr RowKernels kPortable = {"portable", hash, copy, copy, fence, bf16_to_f32, f32_to_bf16, e4m3_to_f32, f32_to_e4m3};

const RowKernels* best() {
  for (const RowKernels* kernels : {row_kernels_avx512(), row_kernels_avx2()}) {
    if (kernels != nullptr) return kernels;
  }
  return &kPortable;
}

std::atomic<const RowKernels*>& chosen() {
  static std::atomic<const RowKernels*> kernels{best()};
  return kernels;
}

}  // namespace

const RowKernels* row_kernels_portable() { return &kPortable; }

const RowKernels& row_kernels() { return *chosen().load(std::memory_order_relaxed); }

void use_row_kernels(const char* name) {
  for (const RowKernels* kernels : {row_kernels_avx512(), row_kernels_avx2(), row_kernels_portable()}) {
    if (kernels == nullptr || std::strcmp(kernels->name, name) != 0) continue;
    chosen() = kernels;
    return;
  }
  throw Error("REQUEST_INVALID", std::string("no row kernels \"") + name + "\" on this CPU");
}

const KeyTable& checksum_keys() {
  static const std::unique_ptr<const KeyTable> table = [] {
    auto keys = std::make_unique<KeyTable>();
    for (uint32_t pair = 0; pair < kMaxRowWords / 2; pair++) {
      const uint64_t even = checksum_key(2 * pair);
      const uint64_t odd = checksum_key(2 * pair + 1);
      keys->even_low[pair] = even & 0xffffffffu;
      keys->even_high[pair] = even >> 32;
      keys->odd_low[pair] = odd & 0xffffffffu;
      keys->odd_high[pair] = odd >> 32;
    }
    return keys;
  }();
  return *table;
}

}  // namespace tpla
