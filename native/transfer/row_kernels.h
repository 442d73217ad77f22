#pragma once
#include <cstddef>
#include <cstdint>

namespace tpla {

// Rows are worked on four at a time, a quarter of a page's rows apart: a core then reads and writes in several DRAM pages at once, and its
// prefetchers follow each of them. One row after another takes a fifth longer, eight at a time half as long again.
inline constexpr size_t kLanes = 4;

// The same place in one row of each lane.
template <class Byte>
struct LanesOf {
  Byte* at;
  size_t stride;
  Byte* operator[](size_t lane) const { return at + lane * stride; }
};
using Lanes = LanesOf<const std::byte>;
using LanesTo = LanesOf<std::byte>;

// Inner loops of the CPU transfer path, one table per instruction set. Bytes need no alignment; counts may be zero.
struct RowKernels {
  const char* name;
  // Row hash (kv_checksum.h) of `words` 32-bit words that stand at word `first` of their row.
  uint64_t (*hash)(const std::byte* from, size_t words, size_t first);
  // The same while copying.
  uint64_t (*copy)(std::byte* to, const std::byte* from, size_t words, size_t first);
  // The same past the caches: for puts larger than they are. fence() before anyone else may look.
  uint64_t (*stream)(std::byte* to, const std::byte* from, size_t words, size_t first);
  // The three for a row of each lane, whose hashes are set. As many bytes from `ahead` on are fetched meanwhile; any address will do.
  void (*hash_lanes)(Lanes from, size_t words, size_t first, Lanes ahead, uint64_t* hashes);
  void (*copy_lanes)(LanesTo to, Lanes from, size_t words, size_t first, Lanes ahead, uint64_t* hashes);
  void (*stream_lanes)(LanesTo to, Lanes from, size_t words, size_t first, Lanes ahead, uint64_t* hashes);
  void (*fence)();

  void (*bf16_to_f32)(const std::byte* from, size_t count, float* to);
  void (*f32_to_bf16)(const float* from, size_t count, std::byte* to);
  // value = e4m3 * scale
  void (*e4m3_to_f32)(const std::byte* from, size_t count, float scale, float* to);
  // One scale group: returns the power-of-two scale of core/numeric.h.
  float (*f32_to_e4m3)(const float* from, size_t count, std::byte* to);
};

// Best first; null where this CPU lacks the instructions.
const RowKernels* row_kernels_avx512();
const RowKernels* row_kernels_avx2();
const RowKernels* row_kernels_portable();

// The best this CPU runs, or the one chosen by use_row_kernels.
const RowKernels& row_kernels();
// For tests and benchmarks; throws REQUEST_INVALID for a name this CPU cannot run.
void use_row_kernels(const char* name);

// Keys of kv_checksum.h as the vector loops want them: those of the words 2p and 2p + 1.
struct KeyTable {
  alignas(64) uint64_t even[8192];
  alignas(64) uint64_t odd[8192];
};
const KeyTable& checksum_keys();

}  // namespace tpla
