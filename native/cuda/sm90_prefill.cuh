// Un-absorbed MLA prefill of one block, head dims 192 (keys) / 128 (values), Hopper: what its loading thread and its computing warpgroups do until
// no tile is left.
//
// A tile is 128 query rows of one head. TMA loads Q, K and V; two warpgroups of 64 rows each take turns at the tensor cores ("ping-pong")
// while the other is in its softmax; within a warpgroup the logits of the next block of keys are multiplied together with the values of this one.
// Blocks draw tiles from a counter, longest first within a group of heads whose keys and values fit in L2.
#pragma once

#include "mla_prefill_schedule.cuh"
#include "sm90_primitives.cuh"
#include "row_softmax.cuh"
#include "sm90_wgmma.cuh"

namespace tpla::cuda {

struct PrefillShape {
  static constexpr int kBlockKeys = 128;
  static constexpr int kStages = 2;
  static constexpr int kBlockBytes = 128 * 128;  // 128 tokens × 64 columns
  static constexpr int kQueryBytes = kPrefillKeyDim / 64 * kBlockBytes;
  static constexpr int kKeyBytes = kPrefillKeyDim / 64 * kBlockBytes;
  static constexpr int kValueBytes = kPrefillValueDim / 64 * kBlockBytes;
  static constexpr int kDataBytes = kQueryBytes + kStages * (kKeyBytes + kValueBytes);
  static constexpr int kControlBytes = 256;
  static constexpr int kThreads = 384;  // a warpgroup that loads, two that compute
};

// Shared-memory addresses: `data` of kDataBytes, 1024-byte aligned, and `control` of kControlBytes.
struct PrefillShared {
  uint32_t query, keys, values;
  uint32_t query_full, query_empty;
  uint32_t keys_full, keys_empty, values_full, values_empty;  // [kStages] each
  uint32_t tile_full, tile_empty;
  uint32_t next_tile;

  __device__ PrefillShared(uint8_t* data, uint8_t* control)
      : query(smem_address(data)),
        keys(query + PrefillShape::kQueryBytes),
        values(keys + PrefillShape::kStages * PrefillShape::kKeyBytes),
        query_full(smem_address(control)),
        query_empty(query_full + 8),
        keys_full(query_full + 16),
        keys_empty(query_full + 32),
        values_full(query_full + 48),
        values_empty(query_full + 64),
        tile_full(query_full + 80),
        tile_empty(query_full + 88),
        next_tile(query_full + 128) {}

  // By one thread, before a barrier of the block.
  __device__ void init() const {
    mbarrier_init(query_full, 1);
    mbarrier_init(query_empty, 8);
    mbarrier_init(tile_full, 1);
    mbarrier_init(tile_empty, 8);
    for (int i = 0; i < PrefillShape::kStages; ++i) {
      mbarrier_init(keys_full + i * 8, 1);
      mbarrier_init(keys_empty + i * 8, 8);
      mbarrier_init(values_full + i * 8, 1);
      mbarrier_init(values_empty + i * 8, 8);
    }
    mbarrier_init_fence();
  }
};

struct PrefillMaps {
  const CUtensorMap& q;
  const CUtensorMap& k;       // all columns but the last 64
  const CUtensorMap& k_rope;
  const CUtensorMap& v;
};

__device__ inline int key_blocks(const PrefillTile& tile) { return (tile.keys + PrefillShape::kBlockKeys - 1) / PrefillShape::kBlockKeys; }

// By one thread.
__device__ __forceinline__ void load_prefill_tiles(const PrefillArgs& args, const PrefillMaps& maps, const PrefillShared& s) {
  using Shape = PrefillShape;
  constexpr int kOwnChunks = (kPrefillKeyDim - kPrefillRopeDim) / 64;
  const int tiles = args.tiles();
  int keys_loaded = 0, values_loaded = 0, drawn = 0;
  for (;;) {
    PrefillTile tile;
    int index;
    do {
      index = atomicAdd(&args.counter[0], 1);
    } while (index < tiles && !find_tile(args, index, tile));
    if (index < tiles) tma_prefetch_4d(maps.q, 0, tile.q_begin + tile.row0, 0, tile.head);
    mbarrier_wait(s.tile_empty, (drawn & 1) ^ 1);
    store_shared(s.next_tile, index);
    mbarrier_arrive(s.tile_full);
    if (index >= tiles) break;

    const int blocks = key_blocks(tile);
    const auto load_keys = [&](int block) {
      const int stage = keys_loaded % Shape::kStages, use = keys_loaded / Shape::kStages;
      ++keys_loaded;
      mbarrier_wait(s.keys_empty + stage * 8, (use & 1) ^ 1);
      mbarrier_arrive_expect_bytes(s.keys_full + stage * 8, Shape::kKeyBytes);
      const int token = tile.kv_begin + block * Shape::kBlockKeys;
      tma_load_4d(s.keys + stage * Shape::kKeyBytes, maps.k, s.keys_full + stage * 8, 0, token, 0, tile.head);
      tma_load_4d(s.keys + stage * Shape::kKeyBytes + kOwnChunks * Shape::kBlockBytes, maps.k_rope, s.keys_full + stage * 8, 0, token, 0, args.k_rope_head == 0 ? 0 : tile.head);
    };
    const auto load_values = [&](int block) {
      const int stage = values_loaded % Shape::kStages, use = values_loaded / Shape::kStages;
      ++values_loaded;
      mbarrier_wait(s.values_empty + stage * 8, (use & 1) ^ 1);
      mbarrier_arrive_expect_bytes(s.values_full + stage * 8, Shape::kValueBytes);
      tma_load_4d(s.values + stage * Shape::kValueBytes, maps.v, s.values_full + stage * 8, 0, tile.kv_begin + block * Shape::kBlockKeys, 0, tile.head);
    };
    // A buffer of keys is free before that of the queries.
    if (blocks > 0) load_keys(blocks - 1);
    mbarrier_wait(s.query_empty, (drawn & 1) ^ 1);
    ++drawn;
    mbarrier_arrive_expect_bytes(s.query_full, Shape::kQueryBytes);
    tma_load_4d(s.query, maps.q, s.query_full, 0, tile.q_begin + tile.row0, 0, tile.head);
    for (int block = blocks - 2; block >= 0; --block) {
      load_keys(block);
      load_values(block + 1);
    }
    if (blocks > 0) load_values(0);
  }
}

// Lane q of each four holds word q of four runs; it gets all four words of run q.
__device__ __forceinline__ uint4 transpose_in_quad(const uint32_t (&words)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  uint32_t pairs[2][2];  // of runs 0 and 2 in even lanes, 1 and 3 in odd ones
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t kept = odd ? words[2 * i + 1] : words[2 * i];
    const uint32_t got = __shfl_xor_sync(~0u, odd ? words[2 * i] : words[2 * i + 1], 1);
    pairs[i][0] = odd ? got : kept;
    pairs[i][1] = odd ? kept : got;
  }
  uint32_t got[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) got[i] = __shfl_xor_sync(~0u, high ? pairs[0][i] : pairs[1][i], 2);
  return high ? make_uint4(got[0], got[1], pairs[1][0], pairs[1][1]) : make_uint4(pairs[0][0], pairs[0][1], got[0], got[1]);
}

// By the 256 threads of the computing warpgroups.
__device__ __forceinline__ void compute_prefill_tiles(const PrefillArgs& args, const PrefillShared& s) {
  using Shape = PrefillShape;
  const int tiles = args.tiles();
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
    int index = 0;
    if (lane == 0) {  // the lane that reads is the one that gives the word back
      index = load_shared(s.next_tile);
      mbarrier_arrive(s.tile_empty);
    }
    index = warp_uniform(index);
    PrefillTile tile;
    if (index >= tiles || !find_tile(args, index, tile)) break;

    float out[kPrefillValueDim / 2];
#pragma unroll
    for (int i = 0; i < kPrefillValueDim / 2; ++i) out[i] = 0.0f;
    float logits[Shape::kBlockKeys / 2];
    uint32_t probs[Shape::kBlockKeys / 16][4];
    float factor[2];
    RowSoftmax softmax;
    const int blocks = key_blocks(tile);
    const int limits[2] = {tile.limit(thread_row), tile.limit(thread_row + 8)};
    const int unmasked_keys = tile.limit(group * 64);  // the first row sees the fewest

    const auto multiply_logits = [&](int stage) {
      uint32_t query_low = descriptor_low(query_rows);
      asm volatile("" : "+r"(query_low));  // keeps descriptors out of loop-invariant registers
      const uint32_t keys_low = descriptor_low(s.keys + stage * Shape::kKeyBytes);
#pragma unroll
      for (int i = 0; i < Shape::kBlockKeys / 2; ++i) logits[i] = 0.0f;
      wgmma_pin(logits);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kPrefillKeyDim / 16; ++k) {
        const uint32_t at = ((k / 4) * Shape::kBlockBytes + (k % 4) * 32) / 16;
        Wgmma<Shape::kBlockKeys>::ss<0, 0>(logits, descriptor(query_low + at), descriptor(keys_low + at));
      }
      wgmma_commit();
    };
    const auto multiply_values = [&](int stage) {
      const uint32_t values_low = descriptor_low(s.values + stage * Shape::kValueBytes, Shape::kBlockBytes);
#pragma unroll
      for (int k = 0; k < Shape::kBlockKeys / 16; ++k) {
        Wgmma<kPrefillValueDim>::rs<1>(out, probs[k], descriptor(values_low + k * (2048 / 16)));
      }
      wgmma_commit();
    };
    const auto mask = [&](int block) {
      const int key0 = block * Shape::kBlockKeys;
      if (key0 + Shape::kBlockKeys <= unmasked_keys) return;
#pragma unroll
      for (int i = 0; i < Shape::kBlockKeys / 2; ++i) {
        const int key = key0 + (i / 4) * 8 + (lane % 4) * 2 + i % 2;
        if (key >= limits[i % 4 / 2]) logits[i] = -INFINITY;
      }
    };
    // Rows past the end of the sequence may hold anything: 0 · NaN must not reach the sum.
    const auto clear_tail = [&](int block, int stage) {
      const int valid = tile.kv_len - block * Shape::kBlockKeys;
      if (valid >= Shape::kBlockKeys) return;
      for (int c = 0; c < 2; ++c) {
        for (int i = valid * 8 + thread; i < Shape::kBlockKeys * 8; i += 256) {  // both warpgroups read the block, each clears a part of it
          asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(s.values + stage * Shape::kValueBytes + c * Shape::kBlockBytes + i * 16), "r"(0) : "memory");
        }
      }
      fence_async_proxy();
      named_barrier_sync(kTailCleared, 256);
    };
    const auto release = [&](uint32_t barrier) {
      if (lane == 0) mbarrier_arrive(barrier);
    };

    mbarrier_wait(s.query_full, drawn & 1);
    if (blocks == 0) release(s.query_empty);
    if (blocks > 0) {
      int block = blocks - 1;
      int stage = warp_uniform(keys_used % Shape::kStages);
      mbarrier_wait(s.keys_full + stage * 8, keys_used / Shape::kStages & 1);
      multiply_logits(stage);
      wgmma_wait<0>();
      wgmma_pin(logits);
      release(s.keys_empty + stage * 8);
      if (block == 0) release(s.query_empty);
      ++keys_used;
      mask(block);
      softmax.update(logits, args.scale_log2, factor);
      softmax.exponentiate(logits, args.scale_log2);
      pack_fragment(logits, probs);
      for (; block > 0; --block) {
        const int key_stage = warp_uniform(keys_used % Shape::kStages), value_stage = warp_uniform(values_used % Shape::kStages);
        mbarrier_wait(s.keys_full + key_stage * 8, keys_used / Shape::kStages & 1);
        mbarrier_wait(s.values_full + value_stage * 8, values_used / Shape::kStages & 1);
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
        if (block == 1) release(s.query_empty);  // so that the next tile's queries come while this one's last values are multiplied
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
      stage = values_used % Shape::kStages;
      mbarrier_wait(s.values_full + stage * 8, values_used / Shape::kStages & 1);
      clear_tail(0, stage);
      wgmma_pin(out);
      wgmma_fence();
      multiply_values(stage);
      wgmma_wait<0>();
      wgmma_pin(out);
      release(s.values_empty + stage * 8);
      ++values_used;
    }

    const int rows = tile.rows();
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
    uint4* target = reinterpret_cast<uint4*>(args.out) + (static_cast<int64_t>(tile.q_begin + tile.row0 + thread_row) * args.heads + tile.head) * (kPrefillValueDim / 8) + lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < kPrefillValueDim / 8; n += 4) {  // runs of 8 columns
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = pack_bf16(out[(n + i) * 4 + h * 2], out[(n + i) * 4 + h * 2 + 1]);
        const uint4 run = transpose_in_quad(words, lane);
        if (thread_row + h * 8 < rows) target[static_cast<int64_t>(h) * 8 * args.heads * (kPrefillValueDim / 8) + n] = run;
      }
    }
  }
  if (group == 0) named_barrier_sync(kTurn, 256);  // the arrival that is still pending: leaves the barrier as it was found
  else named_barrier_sync(group_barrier, 128);     // as many barriers as the other: racecheck orders what two warps did by how many each had met
}

}  // namespace tpla::cuda
