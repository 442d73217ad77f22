#include "bench/cpu_latents.h"
#include "bench/cpu_problem.h"
#include "bench/host_chunk.h"
#include "bench/random.h"

namespace tpla::bench {

namespace {

constexpr int kQuery = kChunkHead + kChunkRope;

std::vector<float> normals(size_t count, float deviation, uint64_t seed) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = deviation * random_normal(seed, i);
  return values;
}

// A chunk as the engine's prefill computes it: un-absorbed and causal, without log-sum-exp.
class CpuChunk : public CpuProblem {
 public:
  CpuChunk(const ChunkShape& shape, uint64_t seed, bool timed)
      : shape_(shape),
        latents_(rows_of(shape), shape.kv_lens, timed ? CpuLatents::sets_that_outgrow_the_cache(rows_of(shape), shape.kv_lens) : 1, seed),
        offsets_(prefix_sums(shape.q_lens)),
        q_(normals(size_t(offsets_.back()) * size_t(shape.heads * kQuery), shape.query_scale, stream_seed(seed, 2))),
        kv_b_(normals(size_t(shape.heads) * 2 * kChunkHead * kChunkLatent, 1 / std::sqrt(float(kChunkLatent)), stream_seed(seed, 3))) {
    outputs.out.resize(size_t(offsets_.back()) * size_t(shape.heads * kChunkHead));
  }

  int sets() const override { return latents_.sets(); }

  void launch(cpu::CpuBackend& backend, int set) override {
    std::vector<PrefillSequence> sequences;
    for (size_t s = 0; s < shape_.kv_lens.size(); ++s) {
      const int64_t tokens = shape_.kv_lens[s], count = shape_.q_lens[s];
      sequences.push_back({{latents_.table(set, int(s)), tokens}, offsets_[s], count, tokens - count});
    }
    PrefillAttention attention;
    attention.kv = &latents_.region();
    attention.heads = shape_.heads;
    attention.nope = attention.v = kChunkHead;
    attention.kv_b = view_f32(kv_b_.data(), int64_t(shape_.heads) * 2 * kChunkHead, kChunkLatent, kChunkLatent);
    attention.sequences = sequences;
    attention.q = q_.data();
    attention.scale = float(kDecodeScale);
    attention.out = outputs.out.data();
    backend.attend(attention);
  }

  Check check() const override {
    const HostChunk chunk(shape_, q_, kv_b_, [this](int sequence, int t, float* token) { latents_.read(sequence, t, token); });
    return compare_with_reference(chunk.problem(double(float(kDecodeScale))), outputs);
  }

 private:
  static LatentRows rows_of(const ChunkShape& shape) { return {kChunkLatent, kChunkRope, shape.kv, shape.page_tokens}; }

  const ChunkShape& shape_;
  const CpuLatents latents_;
  const std::vector<int32_t> offsets_;  // of each sequence's first query
  const std::vector<float> q_;          // [queries][heads][192]
  const std::vector<float> kv_b_;       // [heads][256][512]
};

}  // namespace

std::unique_ptr<CpuProblem> make_cpu_chunk(const ChunkShape& shape, uint64_t seed, bool timed) { return std::make_unique<CpuChunk>(shape, seed, timed); }

}  // namespace tpla::bench
