// The decode side of fused prefill+decode, Hopper: what a block's loading warp and computing warpgroups do with drawn items until none is left.
//
// An item is a run of tiles of one sequence and up to kRows of its query rows. As in the narrow decode kernel rows lie on the N side of wgmma and
// the two warpgroups take alternate tiles, but here few multiprocessors must drain the memory that all could: a tile is asked for in one to three
// TMA boxes, and whoever finishes the last part of a sequence reduces it, so that no block ever waits for another.
#pragma once

#include "sm90_column_softmax.cuh"
#include "sm90_mla_decode.cuh"
#include "sm90_pod_items.cuh"

namespace tpla::cuda {

template <int kLatent, int kRows>
struct PodDecodeShape {
  static constexpr int kLatentChunks = kLatent / 64;
  static constexpr int kChunks = kLatentChunks + 1;             // the rope chunk is the last
  static constexpr int kGroupChunks = kChunks % 3 == 0 ? 3 : kChunks;  // that arrive together
  static constexpr int kGroups = kChunks / kGroupChunks;        // of a tile
  static constexpr int kGroupBytes = kGroupChunks * kChunkBytes;
  static constexpr int kExchangeBytes = 2 * 64 * kRows * 4;     // at the end of an item, where its query was
  static constexpr int kQueryBytes = kChunks * kRows * 128 > kExchangeBytes ? kChunks * kRows * 128 : kExchangeBytes;
  static constexpr int kProbBytes = 2 * kRows * 128;            // one [rows][64 tokens] for each warpgroup
  static constexpr int kSlots = (kSharedMemoryPerBlock - kSharedAlignment - kPodControlBytes - kQueryBytes - kProbBytes) / kGroupBytes;
  static constexpr int kDataBytes = kSlots * kGroupBytes + kQueryBytes + kProbBytes;
  static_assert(kGroups * kGroupChunks == kChunks && kSlots >= 2 * kGroups, "the ring must hold a tile for each warpgroup");
  static_assert(kExchangeBytes >= kMostParts * kRows * 8, "the weights of the parts share the place of the exchange");
};

template <int kLatent, int kRows>
class PodDecode {
  using Shape = PodDecodeShape<kLatent, kRows>;
  static constexpr int kLatentChunks = Shape::kLatentChunks;
  static constexpr int kGroupChunks = Shape::kGroupChunks;
  static constexpr int kGroups = Shape::kGroups;
  static constexpr int kSlots = Shape::kSlots;
  static constexpr int kThreadRows = kRows / 4;
  static constexpr int kConsumerBarrier = 6, kConsumers = 256;

 public:
  __device__ PodDecode(const MlaDecodeArgs& args, const PodItems& items, uint8_t* data, uint8_t* control)
      : args_(args),
        items_(items),
        ring_(smem_address(data)),
        query_(data + kSlots * Shape::kGroupBytes),
        probs_(query_ + Shape::kQueryBytes),
        full_(smem_address(control)),
        empty_(full_ + kSlots * 16),
        item_full_(full_ + kSlots * 24),
        item_empty_(item_full_ + 8),
        tops_ready_(item_full_ + 16),
        pages_(reinterpret_cast<int*>(control + 256)),
        piece_(reinterpret_cast<PodPiece*>(control + 384)),
        last_(reinterpret_cast<int*>(control + 448)),
        warp_values_(reinterpret_cast<float*>(control + 512)),
        row_values_(warp_values_ + 2 * 4 * kRows) {
    static_assert(kSlots * 24 + 32 <= 256 && 512 + (2 * 4 + 4) * kRows * 4 <= kPodDecodeControlBytes && sizeof(PodPiece) <= 64);
  }

  // By one thread, before a barrier of the block.
  __device__ void init() const {
    for (int i = 0; i < kSlots; ++i) {
      mbarrier_init(full_ + i * 16, 1);
      mbarrier_init(full_ + i * 16 + 8, 1);
      mbarrier_init(empty_ + i * 8, 4);  // the warps of the warpgroup that has the tile
    }
    mbarrier_init(tops_ready_, 128);
    mbarrier_init(tops_ready_ + 8, 128);
    mbarrier_init(item_full_, 32);
    mbarrier_init(item_empty_, kConsumers + 32);
    mbarrier_init_fence();
  }

  // By one warp: draws an item while the one before is computed, so that neither its number nor its pages nor its queries have to be waited
  // for behind all the KV that is on its way.
  __device__ __forceinline__ void draw() const {
    const int lane = threadIdx.x % 32;
    for (int drawn = 0;; ++drawn) {
      mbarrier_wait(item_empty_, (drawn & 1) ^ 1);
      bool found = false;
      if (lane == 0) {  // straight into shared memory: the warp has few registers
        found = items_.find(args_, atomicAdd(items_.counter, 1), kRows, *piece_);
        const int rows = min(piece_->rows - piece_->row0, kRows);
        constexpr int kRowBytes = (kLatent + 64) * 2;
        if (!found) piece_->sequence = -1;
        else if (rows > 0) l2_prefetch(static_cast<const uint8_t*>(args_.q) + (static_cast<int64_t>(piece_->q_begin) * args_.heads + piece_->row0) * kRowBytes, rows * kRowBytes);
      }
      found = __shfl_sync(~0u, found, 0);
      __syncwarp();
      if (found) pages_[lane] = page_of(*piece_, lane);
      mbarrier_arrive(item_full_);
      if (!found) break;
    }
  }

  // By one warp.
  __device__ __forceinline__ void load(const CUtensorMap& map) const {
    const int lane = threadIdx.x % 32;
    const int boxes_per_tile = kTokenTile / args_.box_tokens;
    const uint64_t policy = args_.row_tiles == 1 ? l2_evict_first() : l2_evict_normal();  // row tiles share what they read
    int count = 0;
    for (int drawn = 0;; ++drawn) {
      mbarrier_wait(item_full_, drawn & 1);
      const PodPiece piece = *piece_;
      int page = pages_[lane];
      mbarrier_arrive(item_empty_);
      if (piece.sequence < 0) break;
      int box = 0;  // of the item; a lane holds the page of one in 32
      for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
        if (box > 0 && box % 32 == 0) page = page_of(piece, box + lane);
        int pages[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) pages[i] = __shfl_sync(~0u, page, (box + i) & 31);
        if (lane == 0) {
#pragma unroll
          for (int group = 0; group < kGroups; ++group) {
            const int number = count + group, slot = number % kSlots, use = number / kSlots;
            const uint32_t full = full_barrier(slot, use);
            mbarrier_wait(empty_ + slot * 8, (use & 1) ^ 1);
            mbarrier_arrive_expect_bytes(full, Shape::kGroupBytes);
            if (args_.box_tokens == kTokenTile) {
              tma_load_4d(group_address(slot), map, full, 0, tile * kTokenTile % args_.page_size, group * kGroupChunks, pages[0], policy);
              continue;
            }
#pragma unroll 1
            for (int c = 0; c < kGroupChunks; ++c) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                if (i >= boxes_per_tile) continue;
                const int offset = (tile * kTokenTile + i * args_.box_tokens) % args_.page_size;
                tma_load_4d(group_address(slot) + c * kChunkBytes + i * args_.box_tokens * 128, map, full, 0, offset, group * kGroupChunks + c, pages[i], policy);
              }
            }
          }
        }
        count += kGroups;
        box += boxes_per_tile;
        __syncwarp();
      }
    }
  }

  // By the 256 threads of the computing warpgroups.
  __device__ __forceinline__ void compute() const {
    const int thread = threadIdx.x - 128;
    const int group = warp_uniform(thread / 128);
    int count = 0;  // groups of chunks of earlier items
    PhasedBarrier tops_ready{tops_ready_ + group * 8};
    for (int drawn = 0;; ++drawn) {
      mbarrier_wait(item_full_, drawn & 1);
      const PodPiece piece = *piece_;
      mbarrier_arrive(item_empty_);
      if (piece.sequence < 0) break;
      compute_item(piece, thread, group, count, tops_ready);
    }
  }

 private:
  // Page of one of an item's boxes; a page past the end of the tensor map reads as zeros.
  __device__ int page_of(const PodPiece& piece, int box) const {
    const int token = piece.tile_begin * kTokenTile + box * args_.box_tokens;
    return token < piece.kv_len ? args_.block_table[static_cast<int64_t>(piece.sequence) * args_.block_table_stride + token / args_.page_size] : args_.num_pages;
  }

  __device__ uint32_t group_address(int slot) const { return ring_ + slot * Shape::kGroupBytes; }

  // A warpgroup may come to wait for a slot while the other still waits for what the slot gets before: memory answers out of order. A parity
  // would not tell the two apart, so odd and even uses of a slot have a barrier each.
  __device__ uint32_t full_barrier(int slot, int use) const { return full_ + slot * 16 + (use & 1) * 8; }

  // Row within the sequence -> tokens it sees.
  __device__ int limit(const PodPiece& piece, int row) const {
    return args_.causal ? min(piece.kv_len, piece.kv_len - (piece.q_tokens - 1 - row / args_.heads)) : piece.kv_len;
  }

  __device__ static void wait_pending(int pending) {
    if (pending == 0) wgmma_wait<0>();
    else if (pending == 1) wgmma_wait<1>();
    else wgmma_wait<2>();
  }

  __device__ __forceinline__ void compute_item(const PodPiece& piece, int thread, int group, int& count, PhasedBarrier& tops_ready) const {
    using Mma = Wgmma<kRows>;
    const int in_group = thread % 128, warp = in_group / 32, lane = in_group % 32;
    const int group_barrier = 1 + group;
    const uint32_t query_address = smem_address(query_);
    const uint32_t probs_address = smem_address(probs_) + group * kRows * 128;
    float* group_warp_values = warp_values_ + group * 4 * kRows;

    load_query<kRows, kLatent, kLatent + 64, kConsumers>(args_, piece.row0, piece, query_, thread);
    fence_async_proxy();
    named_barrier_sync(kConsumerBarrier, kConsumers);

    float out[kLatentChunks][kRows / 2];
#pragma unroll
    for (int c = 0; c < kLatentChunks; ++c)
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) out[c][i] = 0.0f;
    ColumnSoftmax<kRows> softmax;
    const int tiles = piece.tile_end - piece.tile_begin;
    const int unmasked_tokens = limit(piece, piece.row0);  // the first row sees the fewest

    for (int t = group; t < tiles; t += 2) {
      const int number = count + t * kGroups;
      const int first_slot = warp_uniform(number % kSlots);
      const int first_use = number / kSlots;
      const auto slot_of = [&](int g) { return first_slot + g >= kSlots ? first_slot + g - kSlots : first_slot + g; };
      const auto use_of = [&](int g) { return first_slot + g >= kSlots ? first_use + 1 : first_use; };

      float logits[kRows / 2];
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) logits[i] = 0.0f;
      wgmma_pin(logits);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const uint32_t keys_low = descriptor_low(group_address(slot_of(g))), query_low = descriptor_low(query_address + g * kGroupChunks * (kRows * 128));
        mbarrier_wait(full_barrier(slot_of(g), use_of(g)), use_of(g) >> 1 & 1);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kGroupChunks * 4; ++k) {
          Mma::template ss<0, 0>(logits, descriptor(keys_low + k / 4 * (kChunkBytes / 16) + k % 4 * 2), descriptor(query_low + k / 4 * (kRows * 128 / 16) + k % 4 * 2));
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(logits);

      const int token0 = (piece.tile_begin + t) * kTokenTile;
      const int token = token0 + warp * 16 + lane / 4;
      if (token0 + kTokenTile > unmasked_tokens) {
        mask_columns<kRows>(logits, token, lane, [&](int row) { return limit(piece, piece.row0 + row); });
      }

      if (named_barrier_any(group_barrier, 128, softmax.exceeded(logits, args_.softmax_scale_log2))) {
        softmax.publish_tops(logits, args_.softmax_scale_log2, group_warp_values + warp * kRows, lane);
        tops_ready.arrive_and_wait();
        float factor[kThreadRows];
        softmax.move(group_warp_values, lane, factor);
#pragma unroll
        for (int c = 0; c < kLatentChunks; ++c) scale_columns<kRows>(out[c], factor);
      }
      softmax.exponentiate(logits, args_.softmax_scale_log2);
      store_probabilities<kRows>(logits, probs_address, warp, lane);
      if (token0 + kTokenTile > piece.kv_len) {
        for (int c = 0; c < kLatentChunks; ++c) {
          zero_chunk_tail<128>(group_address(slot_of(c / kGroupChunks)) + c % kGroupChunks * kChunkBytes, piece.kv_len - token0, in_group);
        }
      }
      fence_async_proxy();
      named_barrier_sync(group_barrier, 128);

#pragma unroll
      for (int c = 0; c < kLatentChunks; ++c) wgmma_pin(out[c]);
      wgmma_fence();
      const uint32_t probs_low = descriptor_low(probs_address);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const uint32_t values_low = descriptor_low(group_address(slot_of(g)), kChunkBytes);
#pragma unroll
        for (int c = 0; c < kGroupChunks; ++c) {
          if (g * kGroupChunks + c >= kLatentChunks) continue;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            Mma::template ss<1, 0>(out[g * kGroupChunks + c], descriptor(values_low + (c * kChunkBytes + k * 2048) / 16), descriptor(probs_low + k * 2));
          }
        }
        wgmma_commit();
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        wait_pending(kGroups - 1 - g);
        if (lane == 0) mbarrier_arrive(empty_ + slot_of(g) * 8);
      }
#pragma unroll
      for (int c = 0; c < kLatentChunks; ++c) wgmma_pin(out[c]);
    }
    count += tiles * kGroups;

    if (group == 1 && tiles % 2 == 1) {  // as many barriers as the other warpgroup met in its last tile, see tops_ready in the narrow kernel
      named_barrier_sync(group_barrier, 128);
      named_barrier_sync(group_barrier, 128);
    }

    // Join the two warpgroups: sums over lanes and warps, then one common reference.
    softmax.publish_sums(group_warp_values + warp * kRows, lane);
    if (warp == 0 && lane < 4) {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) row_values_[group * kRows + softmax.row_of(i, lane)] = softmax.maximum[i];
    }
    named_barrier_sync(kConsumerBarrier, kConsumers);
    const bool is_split = piece.participants > 1;
    float factor[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int row = softmax.row_of(i, lane);
      const float top = fmaxf(row_values_[row], row_values_[kRows + row]);
      const float reference = top == -INFINITY ? 0.0f : top;
      factor[i] = exp2_approx(softmax.maximum[i] - reference);
      float total[2] = {0.0f, 0.0f};
#pragma unroll
      for (int g = 0; g < 2; ++g)
#pragma unroll
        for (int w = 0; w < 4; ++w) total[g] += warp_values_[(g * 4 + w) * kRows + row];
      softmax.maximum[i] = top;
      softmax.sum[i] = total[0] * exp2_approx(row_values_[row] - reference) + total[1] * exp2_approx(row_values_[kRows + row] - reference);
      if (!is_split) factor[i] *= softmax.sum[i] > 0.0f ? __fdividef(1.0f, softmax.sum[i]) : 0.0f;
    }

    // Two chunks at a time: each warpgroup keeps one of them and gives the other away.
    float* exchange = reinterpret_cast<float*>(query_);
    const int64_t out_row0 = static_cast<int64_t>(piece.q_begin) * args_.heads + piece.row0;
    const int part = piece.partial_index(piece.participant);
    const int thread_offset = (lane % 4) * 2 * kLatent + warp * 16 + lane / 4;
    float* partial = args_.partial_out + static_cast<int64_t>(part) * kRows * kLatent + thread_offset;
    __nv_bfloat16* final_out = static_cast<__nv_bfloat16*>(args_.out) + out_row0 * kLatent + thread_offset;
    const int rows = min(piece.rows - piece.row0, kRows);
    const int thread_rows = rows - (lane % 4) * 2;  // rows from this thread's first on
#pragma unroll
    for (int c = 0; c < kLatentChunks; c += 2) {
      const bool pair = c + 1 < kLatentChunks;  // a last chunk without a partner stays with the first warpgroup
      const int other = pair ? c + 1 : c;
      if (pair || group == 1) {
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
          exchange[(group * kRows / 2 + i) * 128 + in_group] = (group == 0 ? out[other][i] : out[c][i]) * factor[(i / 4) * 2 + i % 2];
        }
      }
      named_barrier_sync(kConsumerBarrier, kConsumers);
      if (pair || group == 0) {
        const int column = (group == 0 ? c : other) * 64;
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
          // Value i of the fragment: row (i / 4) * 8 + i % 2 relative to the thread's first, column + i % 4 / 2 * 8.
          const int offset = ((i / 4) * 8 + i % 2) * kLatent + column + (i % 4 / 2) * 8;
          const float value = fmaf(group == 0 ? out[c][i] : out[other][i], factor[(i / 4) * 2 + i % 2], exchange[((group ^ 1) * kRows / 2 + i) * 128 + in_group]);
          if ((i / 4) * 8 + i % 2 >= thread_rows) continue;
          if (is_split) partial[offset] = value;
          else final_out[offset] = __float2bfloat16(value);
        }
      }
      named_barrier_sync(kConsumerBarrier, kConsumers);
    }
    if (group == 0 && warp == 0 && lane < 4) {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const int row = softmax.row_of(i, lane);
        if (row >= rows) continue;
        if (is_split) {
          args_.partial_sum[part * kRows + row] = make_float2(softmax.maximum[i], softmax.sum[i]);
        } else if (args_.lse) {
          args_.lse[out_row0 + row] = softmax.sum[i] > 0.0f ? (softmax.maximum[i] + log2f(softmax.sum[i])) * 0.6931471805599453f : -INFINITY;
        }
      }
    }
    if (is_split) {
      named_barrier_sync(kConsumerBarrier, kConsumers);
      if (thread == 0) {
        __threadfence();  // for what all of them wrote
        int* arrivals = args_.arrivals + piece.arrival;
        const bool last = atomicAdd(arrivals, 1) == piece.participants - 1;
        __threadfence();
        if (last) *arrivals = 0;  // ready for the next launch
        *last_ = last;
      }
      named_barrier_sync(kConsumerBarrier, kConsumers);
      if (*last_) reduce_parts(piece, rows, thread);
    }
  }

  // All parts of a sequence, in their order whoever came last: deterministic.
  __device__ __forceinline__ void reduce_parts(const PodPiece& piece, int rows, int thread) const {
    float2* weights = reinterpret_cast<float2*>(query_);  // [row][part]: maximum, sum; then the part's weight
    const int parts = piece.participants, lane = thread % 32;
    for (int i = thread; i < rows * parts; i += kConsumers) weights[i] = load_l2(args_.partial_sum + piece.partial_index(i % parts) * kRows + i / parts);
    named_barrier_sync(kConsumerBarrier, kConsumers);
    const int64_t out_row0 = static_cast<int64_t>(piece.q_begin) * args_.heads + piece.row0;
    for (int row = thread / 32; row < rows; row += kConsumers / 32) {
      float2 own = lane < parts ? weights[row * parts + lane] : make_float2(-INFINITY, 0.0f);  // kMostParts is a warp's lanes
      float top = own.x;
#pragma unroll
      for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
      const float reference = top == -INFINITY ? 0.0f : top;
      const float weight = exp2f(own.x - reference);
      float total = weight * own.y;
#pragma unroll
      for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(~0u, total, d);
      if (lane < parts) weights[row * parts + lane].x = total > 0.0f ? weight / total : 0.0f;
      if (args_.lse && lane == 0) args_.lse[out_row0 + row] = total > 0.0f ? (reference + log2f(total)) * 0.6931471805599453f : -INFINITY;
    }
    named_barrier_sync(kConsumerBarrier, kConsumers);
    constexpr int kVectorsPerRow = kLatent / 4, kAtOnce = 4;
    const int vectors = rows * kVectorsPerRow;
    for (int base = thread; base < vectors; base += kAtOnce * kConsumers) {
      float4 total[kAtOnce] = {};
#pragma unroll 2
      for (int part = 0; part < parts; ++part) {
        const float4* source = reinterpret_cast<const float4*>(args_.partial_out) + static_cast<int64_t>(piece.partial_index(part)) * kRows * kVectorsPerRow;
        float4 value[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) value[u] = load_l2(source + min(base + u * kConsumers, vectors - 1));
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          const float weight = weights[min(base + u * kConsumers, vectors - 1) / kVectorsPerRow * parts + part].x;
          total[u].x = fmaf(weight, value[u].x, total[u].x);
          total[u].y = fmaf(weight, value[u].y, total[u].y);
          total[u].z = fmaf(weight, value[u].z, total[u].z);
          total[u].w = fmaf(weight, value[u].w, total[u].w);
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int vector = base + u * kConsumers;
        if (vector >= vectors) continue;
        reinterpret_cast<uint2*>(args_.out)[(out_row0 + vector / kVectorsPerRow) * kVectorsPerRow + vector % kVectorsPerRow] =
            make_uint2(pack_bf16(total[u].x, total[u].y), pack_bf16(total[u].z, total[u].w));
      }
    }
    named_barrier_sync(kConsumerBarrier, kConsumers);  // the weights lie where the next query goes
  }

  const MlaDecodeArgs& args_;
  const PodItems& items_;
  uint32_t ring_;
  uint8_t* query_;
  uint8_t* probs_;
  uint32_t full_;   // [kSlots][odd or even use]
  uint32_t empty_;  // [kSlots]
  uint32_t item_full_, item_empty_;
  uint32_t tops_ready_;  // [2 warpgroups]
  int* pages_;  // of the item's first 32 boxes
  PodPiece* piece_;
  int* last_;
  float* warp_values_;  // [2 warpgroups][4 warps][rows]
  float* row_values_;   // [2 warpgroups][{maximum, sum}][rows]
};

}  // namespace tpla::cuda
