// The reference of a chunk behind cached latents: keys and values of every head, multiplied up on the CPU.
#pragma once

#include <functional>
#include <vector>

#include "bench/attention_shape.h"
#include "bench/host_reference.h"

namespace tpla::bench {

class HostChunk {
 public:
  // `q`: [queries][heads][192]; `kv_b`: [heads][256][512], keys' rows before values'; `read` writes the 576 values of a cached token.
  HostChunk(const ChunkShape& shape, std::vector<float> q, const std::vector<float>& kv_b, const std::function<void(int sequence, int t, float* token)>& read);

  // Refers to this object.
  HostAttention problem(double scale) const;

 private:
  static constexpr int kKey = kChunkHead + kChunkRope;
  size_t row(int sequence, int t, int head) const { return (size_t(offsets_[size_t(sequence)]) + size_t(t)) * size_t(shape_.heads) + size_t(head); }

  const ChunkShape& shape_;
  const std::vector<int32_t> offsets_;  // of each sequence's first token
  const std::vector<float> q_;
  // In float after sums in double: its rounding is 2^16 times finer than that of bf16 results.
  std::vector<float> keys_, values_;
};

}  // namespace tpla::bench
