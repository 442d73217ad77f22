// Cached latents of a drawn problem: where tokens lie, how they are stored, and how they are drawn.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <vector>

#include "bench/attention_shape.h"
#include "bench/logit_rule.h"
#include "cuda/attention.h"

namespace tpla::bench {

constexpr int kScaleGroup = 128;  // latent values under one scale in the fp8 layout

__host__ __device__ constexpr int scale_bytes(int latent) { return (latent + kScaleGroup - 1) / kScaleGroup * 4; }

// Throws cuda::AttentionError for f32.
cuda::KvFormat kv_format(KvType kv);

// Where a token lies.
struct LatentPages {
  const uint8_t* base;
  const int32_t* table;  // [sequences][stride]
  int stride;
  int page_tokens;
  int64_t page_bytes;
  int token_bytes;

  __host__ __device__ int64_t offset(int sequence, int t) const {
    return static_cast<int64_t>(table[static_cast<int64_t>(sequence) * stride + t / page_tokens]) * page_bytes + static_cast<int64_t>(t % page_tokens) * token_bytes;
  }
};

struct StoredToken {
  const uint8_t* row;  // null: no query sees it, and it may not exist
  int latent;
  bool fp8;

  __host__ __device__ double operator[](int c) const {
    if (!row) return 0;
    if (!fp8) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[c]);
    if (c < latent) {
      const float scale = reinterpret_cast<const float*>(row + latent)[c / kScaleGroup];
      return static_cast<double>(float(reinterpret_cast<const __nv_fp8_e4m3*>(row)[c])) * scale;
    }
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row + latent + scale_bytes(latent))[c - latent]);
  }
  __device__ double value(int c) const { return (*this)[c]; }
};

struct LatentFormat {
  int latent;
  int rope;
  bool fp8;
  float deviation;  // of latent values; rope values have 1
};

// Tokens of every sequence and set that `rule` lets a query see. fp8: the least power of two that brings a group into range; groups differ in size,
// so that no scale can stand in for another. `kv_lens` and `q_indptr` are on the device.
void draw_latents(const LatentPages& pages, int64_t table_entries_per_set, int sequences, int sets, const int32_t* kv_lens, const int32_t* q_indptr, const LogitRule& rule,
                  const LatentFormat& format, uint64_t seed);

}  // namespace tpla::bench
