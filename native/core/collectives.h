#pragma once
#include <cstddef>
#include <span>

namespace tpla {

// What one rank of a tensor-parallel group can ask of the others. Every rank calls the same operations in the same order.
// Shards may differ in length: `offsets` has size() + 1 entries and rank r owns [offsets[r], offsets[r + 1]).
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  virtual void barrier() = 0;
  // data[i] becomes the sum over ranks, added in rank order, so that every rank has the same bits.
  virtual void all_reduce(float* data, size_t count) = 0;
  // out[offsets[r]...] becomes rank r's shard. `shard` may be its own place in `out`.
  virtual void all_gather(const float* shard, float* out, std::span<const size_t> offsets) = 0;
  // shard becomes the sum over ranks of in[offsets[rank]...].
  virtual void reduce_scatter(const float* in, float* shard, std::span<const size_t> offsets) = 0;
};

// Rank r of n owns [begin, end) of `count` things, as evenly as whole multiples of `unit` allow.
struct Share {
  int begin = 0;
  int end = 0;
  int size() const { return end - begin; }
};
inline Share share_of(int count, int rank, int ranks, int unit = 1) {
  const int units = (count + unit - 1) / unit;
  const auto edge = [&](int r) {
    const int at = int(long(units) * r / ranks) * unit;
    return at < count ? at : count;
  };
  return {edge(rank), edge(rank + 1)};
}

}  // namespace tpla
