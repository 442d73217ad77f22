// Cached latents of a drawn problem as the CPU engine keeps them. Rows that no sequence holds are NaN in every dtype.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bench/attention_shape.h"
#include "bench/page_tables.h"
#include "core/kv_layout.h"

namespace tpla::bench {

struct LatentRows {
  int latent;
  int rope;
  KvType type;
  int page_tokens;
};

class CpuLatents {
 public:
  // `sets` of inputs with these lengths. Throws OUT_OF_MEMORY for more than a CPU's benchmark may take.
  CpuLatents(const LatentRows& rows, const std::vector<int32_t>& kv_lens, int sets, uint64_t seed);

  int sets() const { return tables_.sets; }
  const KvRegion& region() const { return region_; }
  // Pages of a sequence.
  const int32_t* table(int set, int sequence) const;
  // A token's latent and rope values as they are stored, in set 0.
  void read(int sequence, int t, float* values) const;

  // Number of sets that together outgrow the cache.
  static int sets_that_outgrow_the_cache(const LatentRows& rows, const std::vector<int32_t>& kv_lens);

 private:
  const KvLayout layout_;
  const size_t sequences_;
  const PageTables tables_;
  std::vector<std::byte> pages_;
  KvRegion region_;
};

}  // namespace tpla::bench
