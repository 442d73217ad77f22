// Un-absorbed MLA prefill, head dims 192 (keys) / 128 (values), Hopper.
//
// Persistent blocks of 128 query rows of one head. A TMA warp loads Q, K and V; two warpgroups of 64 rows each take turns at
// the tensor cores ("ping-pong") while the other is in its softmax; within a warpgroup the logits of the next block of keys
// are multiplied together with the values of this one. Blocks draw tiles from a counter, longest first within a group of heads whose
// keys and values fit in L2.
#include <cuda_runtime.h>

#include <algorithm>

#include "attention.h"
#include "device.h"
#include "sm90_primitives.cuh"
#include "sm90_softmax.cuh"
#include "sm90_wgmma.cuh"

namespace tpla::cuda {
namespace {

constexpr int kKeyDim = 192;
constexpr int kValueDim = 128;
constexpr int kBlockRows = 128;
constexpr int kBlockKeys = 128;
constexpr int kStages = 2;
constexpr int kThreads = 384;
constexpr int kBlockBytes = 128 * 128;  // 128 tokens × 64 columns
constexpr int kQueryBytes = 3 * kBlockBytes;
constexpr int kKeyBytes = 3 * kBlockBytes;
constexpr int kValueBytes = 2 * kBlockBytes;
constexpr int kSharedBytes = 1024 + kQueryBytes + kStages * (kKeyBytes + kValueBytes) + 256;
static_assert(kSharedBytes <= 227 * 1024);

struct PrefillArgs {
  const int32_t* q_indptr;
  const int32_t* kv_indptr;
  __nv_bfloat16* out;
  float* lse;
  float scale_log2;
  int batch;
  int heads;
  int heads_per_group;  // whose keys and values of the longest sequence share L2
  int row_blocks;       // of the longest sequence
  int causal;
  int* counter;  // [0] tiles drawn, [1] blocks that are through; both zero between launches
};

struct PrefillTile {
  int head;
  int q_begin;  // of the sequence
  int q_len;
  int kv_begin;
  int kv_len;
  int row0;        // within the sequence
  int key_blocks;  // that any row of the tile sees
};

// Group of heads, then row blocks from the last, then sequences, then heads of the group. False: no such rows.
__device__ bool find_tile(const PrefillArgs& args, int index, PrefillTile& tile) {
  const int per_group = args.row_blocks * args.batch * args.heads_per_group;
  const int group = index / per_group;
  int rest = index - group * per_group;
  const int head_in_group = rest % args.heads_per_group;
  rest /= args.heads_per_group;
  const int sequence = rest % args.batch;
  const int row_block = args.row_blocks - 1 - rest / args.batch;
  tile.head = group * args.heads_per_group + head_in_group;
  if (tile.head >= args.heads) return false;
  tile.q_begin = args.q_indptr[sequence];
  tile.q_len = args.q_indptr[sequence + 1] - tile.q_begin;
  tile.kv_begin = args.kv_indptr[sequence];
  tile.kv_len = args.kv_indptr[sequence + 1] - tile.kv_begin;
  tile.row0 = row_block * kBlockRows;
  if (tile.row0 >= tile.q_len) return false;
  const int last_row = min(tile.row0 + kBlockRows, tile.q_len) - 1;
  const int keys = args.causal ? min(tile.kv_len, tile.kv_len - tile.q_len + last_row + 1) : tile.kv_len;
  tile.key_blocks = max(0, (keys + kBlockKeys - 1) / kBlockKeys);
  return true;
}

struct PrefillShared {
  uint32_t query, keys, values;
  uint32_t query_full, query_empty;
  uint32_t keys_full, keys_empty, values_full, values_empty;  // [kStages] each
  uint32_t tile_full, tile_empty;
};

__global__ void __launch_bounds__(kThreads, 1)
    sm90_prefill_192_128(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                         const __grid_constant__ CUtensorMap v_map, const __grid_constant__ PrefillArgs args) {
  extern __shared__ uint8_t shared_raw[];
  uint8_t* shared = shared_raw + ((1024 - (smem_address(shared_raw) & 1023)) & 1023);
  uint8_t* control = shared + kQueryBytes + kStages * (kKeyBytes + kValueBytes);
  volatile int* next_tile = reinterpret_cast<volatile int*>(control + 128);
  const uint32_t base = smem_address(shared), barriers = smem_address(control);
  const PrefillShared s{base, base + kQueryBytes, base + kQueryBytes + kStages * kKeyBytes, barriers, barriers + 8,
                        barriers + 16, barriers + 32, barriers + 48, barriers + 64, barriers + 80, barriers + 88};
  if (threadIdx.x == 0) {
    mbarrier_init(s.query_full, 1);
    mbarrier_init(s.query_empty, 8);
    mbarrier_init(s.tile_full, 1);
    mbarrier_init(s.tile_empty, 8);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(s.keys_full + i * 8, 1);
      mbarrier_init(s.keys_empty + i * 8, 8);
      mbarrier_init(s.values_full + i * 8, 1);
      mbarrier_init(s.values_empty + i * 8, 8);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  const int groups = (args.heads + args.heads_per_group - 1) / args.heads_per_group;
  const int tiles = groups * args.heads_per_group * args.row_blocks * args.batch;

  if (threadIdx.x < 128) {
    registers_shrink<24>();
    if (threadIdx.x == 0) {
      int keys_loaded = 0, values_loaded = 0, drawn = 0;
      for (;;) {
        PrefillTile tile;
        int index;
        do {
          index = atomicAdd(&args.counter[0], 1);
        } while (index < tiles && !find_tile(args, index, tile));
        mbarrier_wait(s.tile_empty, (drawn & 1) ^ 1);
        *next_tile = index;
        mbarrier_arrive(s.tile_full);
        if (index >= tiles) break;

        mbarrier_wait(s.query_empty, (drawn & 1) ^ 1);
        ++drawn;
        mbarrier_arrive_expect_bytes(s.query_full, kQueryBytes);
        tma_load_4d(s.query, q_map, s.query_full, 0, tile.q_begin + tile.row0, 0, tile.head);
        const auto load_keys = [&](int block) {
          const int stage = keys_loaded % kStages, use = keys_loaded / kStages;
          ++keys_loaded;
          mbarrier_wait(s.keys_empty + stage * 8, (use & 1) ^ 1);
          mbarrier_arrive_expect_bytes(s.keys_full + stage * 8, kKeyBytes);
          tma_load_4d(s.keys + stage * kKeyBytes, k_map, s.keys_full + stage * 8, 0, tile.kv_begin + block * kBlockKeys, 0, tile.head);
        };
        const auto load_values = [&](int block) {
          const int stage = values_loaded % kStages, use = values_loaded / kStages;
          ++values_loaded;
          mbarrier_wait(s.values_empty + stage * 8, (use & 1) ^ 1);
          mbarrier_arrive_expect_bytes(s.values_full + stage * 8, kValueBytes);
          tma_load_4d(s.values + stage * kValueBytes, v_map, s.values_full + stage * 8, 0, tile.kv_begin + block * kBlockKeys, 0, tile.head);
        };
        for (int block = tile.key_blocks - 1; block >= 0; --block) {
          load_keys(block);
          if (block < tile.key_blocks - 1) load_values(block + 1);
        }
        if (tile.key_blocks > 0) load_values(0);
      }
      // The last block to finish drawing resets the counter.
      if (atomicAdd(&args.counter[1], 1) == gridDim.x - 1) {
        args.counter[0] = 0;
        args.counter[1] = 0;
      }
    }
  } else {
    registers_grow<240>();
    const int thread = threadIdx.x - 128;
    const int group = warp_uniform(thread / 128), in_group = thread % 128;
    const int warp = in_group / 32, lane = in_group % 32;
    const int group_barrier = 1 + group;
    constexpr int kTurn = 3, kTailCleared = 5;  // kTurn + warpgroup: its turn at the tensor cores
    const int thread_row = group * 64 + warp * 16 + lane / 4;
    const uint32_t query_rows = s.query + group * 64 * 128;
    int keys_used = 0, values_used = 0;
    if (group == 1) named_barrier_arrive(kTurn, 256);

    for (int drawn = 0;; ++drawn) {
      mbarrier_wait(s.tile_full, drawn & 1);
      const int index = *next_tile;
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.tile_empty);
      PrefillTile tile;
      if (index >= tiles || !find_tile(args, index, tile)) break;

      float out[kValueDim / 2];
#pragma unroll
      for (int i = 0; i < kValueDim / 2; ++i) out[i] = 0.0f;
      float logits[kBlockKeys / 2];
      uint32_t probs[kBlockKeys / 16][4];
      float factor[2];
      RowSoftmax softmax;
      const int offset = args.causal ? tile.kv_len - tile.q_len + 1 : 0;
      const int limits[2] = {args.causal ? min(tile.kv_len, offset + tile.row0 + thread_row) : tile.kv_len,
                             args.causal ? min(tile.kv_len, offset + tile.row0 + thread_row + 8) : tile.kv_len};
      const int unmasked_keys = args.causal ? min(tile.kv_len, offset + tile.row0 + group * 64) : tile.kv_len;

      const auto multiply_logits = [&](int stage) {
        uint32_t query_low = descriptor_low(query_rows);
        asm volatile("" : "+r"(query_low));  // keeps descriptors out of loop-invariant registers
        const uint32_t keys_low = descriptor_low(s.keys + stage * kKeyBytes);
#pragma unroll
        for (int i = 0; i < kBlockKeys / 2; ++i) logits[i] = 0.0f;
        wgmma_pin(logits);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kKeyDim / 16; ++k) {
          const uint32_t at = ((k / 4) * kBlockBytes + (k % 4) * 32) / 16;
          Wgmma<kBlockKeys>::ss<0, 0>(logits, descriptor(query_low + at), descriptor(keys_low + at));
        }
        wgmma_commit();
      };
      const auto multiply_values = [&](int stage) {
        const uint32_t values_low = descriptor_low(s.values + stage * kValueBytes, kBlockBytes);
#pragma unroll
        for (int k = 0; k < kBlockKeys / 16; ++k) {
          Wgmma<kValueDim>::rs<1>(out, probs[k], descriptor(values_low + k * (2048 / 16)));
        }
        wgmma_commit();
      };
      const auto mask = [&](int block) {
        const int key0 = block * kBlockKeys;
        if (key0 + kBlockKeys <= unmasked_keys) return;
#pragma unroll
        for (int i = 0; i < kBlockKeys / 2; ++i) {
          const int key = key0 + (i / 4) * 8 + (lane % 4) * 2 + i % 2;
          if (key >= limits[i % 4 / 2]) logits[i] = -INFINITY;
        }
      };
      // Rows past the end of the sequence may hold anything: 0 · NaN must not reach the sum.
      const auto clear_tail = [&](int block, int stage) {
        const int valid = tile.kv_len - block * kBlockKeys;
        if (valid >= kBlockKeys) return;
        for (int c = 0; c < 2; ++c) {
          for (int i = valid * 8 + thread; i < kBlockKeys * 8; i += 256) {  // both warpgroups read the block, each clears a part of it
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(s.values + stage * kValueBytes + c * kBlockBytes + i * 16), "r"(0) : "memory");
          }
        }
        fence_async_proxy();
        named_barrier_sync(kTailCleared, 256);
      };
      const auto release = [&](uint32_t barrier) {
        if (lane == 0) mbarrier_arrive(barrier);
      };

      mbarrier_wait(s.query_full, drawn & 1);
      if (tile.key_blocks > 0) {
        int block = tile.key_blocks - 1;
        int stage = warp_uniform(keys_used % kStages);
        mbarrier_wait(s.keys_full + stage * 8, keys_used / kStages & 1);
        multiply_logits(stage);
        wgmma_wait<0>();
        wgmma_pin(logits);
        release(s.keys_empty + stage * 8);
        ++keys_used;
        mask(block);
        softmax.update(logits, args.scale_log2, factor);
        softmax.exponentiate(logits, args.scale_log2);
        pack_fragment(logits, probs);
        for (; block > 0; --block) {
          const int key_stage = warp_uniform(keys_used % kStages), value_stage = warp_uniform(values_used % kStages);
          mbarrier_wait(s.keys_full + key_stage * 8, keys_used / kStages & 1);
          mbarrier_wait(s.values_full + value_stage * 8, values_used / kStages & 1);
          clear_tail(block, value_stage);
          named_barrier_sync(kTurn + group, 256);
          multiply_logits(key_stage);
          wgmma_pin(out);
          wgmma_fence();
          multiply_values(value_stage);
          named_barrier_arrive(kTurn + (group ^ 1), 256);
          wgmma_wait<1>();
          wgmma_pin(logits);
          release(s.keys_empty + key_stage * 8);
          ++keys_used;
          mask(block - 1);
          const bool moved = softmax.update(logits, args.scale_log2, factor);
          softmax.exponentiate(logits, args.scale_log2);
          wgmma_wait<0>();
          wgmma_pin(out);
          release(s.values_empty + value_stage * 8);
          ++values_used;
          if (moved) scale_rows(out, factor);
          pack_fragment(logits, probs);
        }
        stage = values_used % kStages;
        mbarrier_wait(s.values_full + stage * 8, values_used / kStages & 1);
        clear_tail(0, stage);
        wgmma_pin(out);
        wgmma_fence();
        multiply_values(stage);
        wgmma_wait<0>();
        wgmma_pin(out);
        release(s.values_empty + stage * 8);
        ++values_used;
      }

      // Through this warpgroup's rows of the query buffer (2 of its 3 column blocks), so that rows leave in 16-byte pieces.
      const int rows = min(tile.q_len - tile.row0, kBlockRows);
      float inverse[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = softmax.row_sum(h);
        inverse[h] = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
        const int row = thread_row + h * 8;
        if (args.lse && lane % 4 == 0 && row < rows) {
          args.lse[static_cast<int64_t>(tile.q_begin + tile.row0 + row) * args.heads + tile.head] =
              sum > 0.0f ? (softmax.maximum[h] + log2f(sum)) * 0.6931471805599453f : -INFINITY;
        }
      }
      scale_rows(out, inverse);
      named_barrier_sync(group_barrier, 128);
#pragma unroll
      for (int k = 0; k < kValueDim / 16; ++k) {
        const int row = warp * 16 + lane % 16, unit = (2 * k + lane / 16) % 8;
        const uint32_t address = query_rows + (k / 4) * kBlockBytes + row * 128 + ((unit ^ (row & 7)) << 4);
        stmatrix_x4(address, pack_bf16(out[8 * k], out[8 * k + 1]), pack_bf16(out[8 * k + 2], out[8 * k + 3]), pack_bf16(out[8 * k + 4], out[8 * k + 5]),
                    pack_bf16(out[8 * k + 6], out[8 * k + 7]));
      }
      named_barrier_sync(group_barrier, 128);
      uint4* target = reinterpret_cast<uint4*>(args.out) + (static_cast<int64_t>(tile.q_begin + tile.row0 + group * 64) * args.heads + tile.head) * (kValueDim / 8);
#pragma unroll
      for (int i = in_group; i < 64 * 16; i += 128) {
        const int row = i / 16, unit = i % 16;
        uint4 value;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                     : "r"(query_rows + (unit / 8) * kBlockBytes + row * 128 + (((unit % 8) ^ (row & 7)) << 4))
                     : "memory");
        if (group * 64 + row < rows) target[static_cast<int64_t>(row) * args.heads * (kValueDim / 8) + unit] = value;
      }
      fence_async_proxy();
      __syncwarp();
      release(s.query_empty);
    }
  }
}

}  // namespace

size_t mla_prefill_workspace_bytes(const MlaPrefill&) { return 256; }

void mla_prefill(const MlaPrefill& call, Stream stream) {
  const auto expect = [](bool ok, const std::string& message) {
    if (!ok) throw AttentionError("MLA prefill: " + message);
  };
  const Device& device = current_device();
  expect(device.major == 9, "needs compute capability 9.0; this GPU is " + std::to_string(device.major) + "." + std::to_string(device.minor));
  expect(call.key_dim == kKeyDim && call.value_dim == kValueDim,
         "head dims must be 192 (keys) and 128 (values); got " + std::to_string(call.key_dim) + " and " + std::to_string(call.value_dim));
  expect(call.workspace_bytes >= mla_prefill_workspace_bytes(call), "workspace too small");
  expect(call.softmax_scale > 0.0f, "softmax_scale must be positive");
  if (call.batch == 0 || call.q_tokens == 0) return;

  const auto map_of = [&](const void* base, int64_t tokens, int dim, int rows) {
    const uint64_t head_bytes = dim * 2, token_bytes = head_bytes * call.heads;
    return encode_tensor_map_4d(base, {64, static_cast<uint64_t>(std::max<int64_t>(tokens, 1)), static_cast<uint64_t>(dim / 64), static_cast<uint64_t>(call.heads)},
                                {token_bytes, 128, head_bytes}, {64, static_cast<uint32_t>(rows), static_cast<uint32_t>(dim / 64), 1});
  };
  CUtensorMap q_map = map_of(call.q, call.q_tokens, kKeyDim, kBlockRows);
  CUtensorMap k_map = map_of(call.k, call.kv_tokens, kKeyDim, kBlockKeys);
  CUtensorMap v_map = map_of(call.v, call.kv_tokens, kValueDim, kBlockKeys);

  PrefillArgs args{};
  args.q_indptr = call.q_indptr;
  args.kv_indptr = call.kv_indptr;
  args.out = static_cast<__nv_bfloat16*>(call.out);
  args.lse = call.lse;
  args.scale_log2 = static_cast<float>(call.softmax_scale * 1.4426950408889634);
  args.batch = call.batch;
  args.heads = call.heads;
  args.row_blocks = (call.max_q_tokens + kBlockRows - 1) / kBlockRows;
  constexpr int64_t kL2Share = 24 << 20;
  const int64_t head_bytes = static_cast<int64_t>(std::max(call.max_kv_tokens, 1)) * (kKeyDim + kValueDim) * 2;
  args.heads_per_group = static_cast<int>(std::clamp<int64_t>(kL2Share / head_bytes, 1, call.heads));
  args.causal = call.causal;
  args.counter = static_cast<int*>(call.workspace);
  void* parameters[] = {&q_map, &k_map, &v_map, &args};
  launch_cooperative(reinterpret_cast<const void*>(&sm90_prefill_192_128), device.multiprocessors, kThreads, kSharedBytes, parameters, stream);
}

}  // namespace tpla::cuda
