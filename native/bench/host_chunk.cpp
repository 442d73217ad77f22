#include "bench/host_chunk.h"

#include <algorithm>
#include <utility>

#include "bench/page_tables.h"
#include "cpu/cpu_features.h"
#include "cpu/thread_team.h"

namespace tpla::bench {

HostChunk::HostChunk(const ChunkShape& shape, std::vector<float> q, const std::vector<float>& kv_b, const std::function<void(int, int, float*)>& read)
    : shape_(shape), offsets_(prefix_sums(shape.kv_lens)), q_(std::move(q)) {
  const size_t rows = size_t(offsets_.back()) * size_t(shape.heads);
  keys_.resize(rows * kKey);
  values_.resize(rows * kChunkHead);
  cpu::ThreadTeam team(cpu::usable_cores());
  for (size_t s = 0; s < shape.kv_lens.size(); ++s) {
    team.run_ranges(shape.kv_lens[s], 1, [&](int64_t begin, int64_t end, int) {
      std::vector<float> token(kChunkLatent + kChunkRope);
      for (int t = int(begin); t < int(end); ++t) {
        read(int(s), t, token.data());
        for (int head = 0; head < shape.heads; ++head) {
          float* key = keys_.data() + row(int(s), t, head) * kKey;
          float* value = values_.data() + row(int(s), t, head) * kChunkHead;
          const float* weights = kv_b.data() + size_t(head) * 2 * kChunkHead * kChunkLatent;
          for (int c = 0; c < 2 * kChunkHead; ++c, weights += kChunkLatent) {
            double sum = 0;
            for (int i = 0; i < kChunkLatent; ++i) sum += double(weights[i]) * double(token[size_t(i)]);
            (c < kChunkHead ? key[c] : value[c - kChunkHead]) = float(sum);
          }
          std::copy_n(token.data() + kChunkLatent, kChunkRope, key + kChunkHead);
        }
      }
    });
  }
}

HostAttention HostChunk::problem(double scale) const {
  HostAttention problem;
  problem.q_lens = shape_.q_lens;
  problem.kv_lens = shape_.kv_lens;
  problem.heads = shape_.heads;
  problem.key_dim = kKey;
  problem.value_dim = kChunkHead;
  problem.causal = shape_.causal;
  problem.scale = scale;
  problem.q = q_.data();
  problem.key = [this](int sequence, int t, int head) { return keys_.data() + row(sequence, t, head) * kKey; };
  problem.value = [this](int sequence, int t, int head) { return values_.data() + row(sequence, t, head) * kChunkHead; };
  return problem;
}

}  // namespace tpla::bench
