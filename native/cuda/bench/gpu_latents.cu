#include "cuda/bench/gpu_latents.h"

#include "bench/random.h"
#include "cuda/bench/gpu.h"

namespace tpla::bench {

namespace {

// Grid: (tokens, sequences, sets), a warp a token.
__global__ void fill_with_latents(LatentPages pages, int64_t table_per_set, const int32_t* kv_lens, const int32_t* q_indptr, LogitRule rule, LatentFormat format, uint64_t seed) {
  pages.table += blockIdx.z * table_per_set;
  uint8_t* base = const_cast<uint8_t*>(pages.base);
  const int sequence = blockIdx.y, lane = threadIdx.x % 32, latent = format.latent, width = latent + format.rope;
  for (int t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; t < kv_lens[sequence]; t += gridDim.x * (blockDim.x / 32)) {
    if (!rule.present(sequence, kv_lens[sequence] - (q_indptr[sequence + 1] - q_indptr[sequence]), t)) continue;
    const int64_t offset = pages.offset(sequence, t);
    uint8_t* row = base + offset;
    const uint64_t first = static_cast<uint64_t>(offset);  // a token takes fewer values than bytes
    __nv_bfloat16* plain = reinterpret_cast<__nv_bfloat16*>(format.fp8 ? row + latent + scale_bytes(latent) - latent * 2 : row);
    for (int c = (format.fp8 ? latent : 0) + lane; c < width; c += 32) plain[c] = __float2bfloat16((c < latent ? format.deviation : 1.0f) * random_normal(seed, first + c));
    if (!format.fp8) continue;
    for (int group = 0; group < latent; group += kScaleGroup) {
      const int rounds = min(kScaleGroup, latent - group) / 32;
      const float size = format.deviation * exp2f(static_cast<float>((t + group / kScaleGroup) % 3 - 1));
      float values[kScaleGroup / 32], largest = 0;
      for (int i = 0; i < rounds; ++i) {
        values[i] = size * random_normal(seed, first + group + i * 32 + lane);
        largest = fmaxf(largest, fabsf(values[i]));
      }
      for (int d = 16; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
      const float scale = exp2f(ceilf(log2f(fmaxf(largest, 1e-30f) / 448.0f)));
      for (int i = 0; i < rounds; ++i) reinterpret_cast<__nv_fp8_e4m3*>(row)[group + i * 32 + lane] = __nv_fp8_e4m3(values[i] / scale);
      if (lane == 0) reinterpret_cast<float*>(row + latent)[group / kScaleGroup] = scale;
    }
  }
}

}  // namespace

cuda::KvFormat kv_format(KvType kv) {
  if (kv == KvType::f32) throw cuda::AttentionError("attention over latents on GPUs takes bf16 or fp8 KV; f32 is for the CPU");
  return kv == KvType::fp8 ? cuda::KvFormat::fp8 : cuda::KvFormat::bf16;
}

void draw_latents(const LatentPages& pages, int64_t table_entries_per_set, int sequences, int sets, const int32_t* kv_lens, const int32_t* q_indptr, const LogitRule& rule,
                  const LatentFormat& format, uint64_t seed) {
  fill_with_latents<<<dim3(64, static_cast<unsigned>(sequences), static_cast<unsigned>(sets)), 256>>>(pages, table_entries_per_set, kv_lens, q_indptr, rule, format, seed);
  gpu_check(cudaGetLastError(), "drawing latents");
}

}  // namespace tpla::bench
