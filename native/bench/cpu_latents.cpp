#include "bench/cpu_latents.h"

#include <unistd.h>

#include <algorithm>
#include <string>

#include "bench/random.h"
#include "core/error.h"
#include "core/kv_row.h"

namespace tpla::bench {

namespace {

constexpr int kMostBuffers = 64;
constexpr size_t kMostBytes = size_t(8) << 30;

size_t cache_bytes() {
  const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? size_t(bytes) : size_t(32) << 20;
}

KvLayout layout_of(const LatentRows& rows) {
  KvLayout layout;
  layout.form = KvForm::mla;
  layout.ranks = 1;
  layout.layers = 1;
  layout.latent = rows.latent;
  layout.rope = rows.rope;
  layout.dtype = rows.type == KvType::fp8 ? KvDType::fp8 : rows.type == KvType::bf16 ? KvDType::bf16 : KvDType::f32;
  layout.page_tokens = rows.page_tokens;
  return layout;
}

}  // namespace

CpuLatents::CpuLatents(const LatentRows& rows, const std::vector<int32_t>& kv_lens, int sets, uint64_t seed)
    : layout_(layout_of(rows)), sequences_(kv_lens.size()), tables_(draw_page_tables(kv_lens, rows.page_tokens, sets, stream_seed(seed, 0))), region_(layout_, tables_.pages) {
  const size_t bytes = layout_.page_bytes(0) * size_t(tables_.pages);
  if (bytes > kMostBytes) throw Error("OUT_OF_MEMORY", "this shape takes " + std::to_string(bytes >> 20) + " MiB of KV; on the CPU it may take " + std::to_string(kMostBytes >> 20));
  pages_.assign(bytes, std::byte{0xff});
  region_.base[0] = pages_.data();
  std::vector<float> values(size_t(rows.latent + rows.rope));
  for (int set = 0; set < tables_.sets; ++set) {
    for (size_t s = 0; s < kv_lens.size(); ++s) {
      for (int t = 0; t < kv_lens[s]; ++t) {
        const int page = table(set, int(s))[t / rows.page_tokens];
        const uint64_t first = (uint64_t(page) * uint64_t(rows.page_tokens) + uint64_t(t % rows.page_tokens)) * values.size();
        for (size_t c = 0; c < values.size(); ++c) values[c] = random_normal(stream_seed(seed, 1), first + c);
        encode_row(layout_.row(0), values.data(), values.data() + rows.latent, region_.row(0, 0, page, t % rows.page_tokens));
      }
    }
  }
}

const int32_t* CpuLatents::table(int set, int sequence) const {
  return tables_.table.data() + (size_t(set) * sequences_ + size_t(sequence)) * size_t(tables_.stride);
}

void CpuLatents::read(int sequence, int t, float* values) const {
  const int page_tokens = layout_.page_tokens;
  decode_row(layout_.row(0), region_.row(0, 0, table(0, sequence)[t / page_tokens], t % page_tokens), values);
}

int CpuLatents::sets_that_outgrow_the_cache(const LatentRows& rows, const std::vector<int32_t>& kv_lens) {
  const size_t bytes = std::max<size_t>(1, layout_of(rows).page_bytes(0) * size_t(pages_needed(kv_lens, rows.page_tokens)));
  const size_t wanted = std::clamp<size_t>((2 * cache_bytes() + bytes - 1) / bytes, 1, kMostBuffers);
  return int(std::min(wanted, std::max<size_t>(1, kMostBytes / 2 / bytes)));
}

}  // namespace tpla::bench
