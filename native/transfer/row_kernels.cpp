#include "transfer/row_kernels.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <string>

#include "core/error.h"
#include "transfer/kv_checksum.h"
#include "transfer/row_loops.h"

namespace tpla {

static_assert(sizeof(KeyTable::even) / sizeof(uint64_t) * 2 == kMaxRowWords);

namespace {

uint64_t hash(const std::byte* from, size_t words, size_t first) {
  const KeyTable& keys = checksum_keys();
  uint64_t sum = 0;
  for (size_t i = 0; i < words; i++) {
    const size_t at = first + i;
    uint32_t word;
    std::memcpy(&word, from + i * 4, 4);
    sum += word * (at % 2 == 0 ? keys.even[at / 2] : keys.odd[at / 2]);
  }
  return sum;
}

uint64_t copy(std::byte* to, const std::byte* from, size_t words, size_t first) {
  std::memcpy(to, from, words * 4);
  return hash(from, words, first);
}

void hash_lanes(Lanes from, size_t words, size_t first, Lanes, uint64_t* hashes) {
  for (size_t lane = 0; lane < kLanes; lane++) hashes[lane] = hash(from[lane], words, first);
}

void copy_lanes(LanesTo to, Lanes from, size_t words, size_t first, Lanes, uint64_t* hashes) {
  for (size_t lane = 0; lane < kLanes; lane++) hashes[lane] = copy(to[lane], from[lane], words, first);
}

void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

constexpr RowKernels kPortable = {"portable", hash, copy, copy, hash_lanes, copy_lanes, copy_lanes, fence, bf16_to_f32, f32_to_bf16, e4m3_to_f32, f32_to_e4m3};

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
      keys->even[pair] = checksum_key(2 * pair);
      keys->odd[pair] = checksum_key(2 * pair + 1);
    }
    return keys;
  }();
  return *table;
}

}  // namespace tpla
