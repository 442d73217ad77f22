// Parts that the Hopper MLA decode kernels share: the ring of KV chunks that TMA fills, and the load of the query rows.
//
// A tile of 64 tokens is cut into chunks of 64 columns (8 KiB, rows of 128 B, 128-byte swizzle): first the rope chunk, then the
// latent chunks in order. One chunk serves as K (K-major) for the logits and as V (MN-major) for the output.
#pragma once

#include "mla_decode_schedule.cuh"
#include "sm80_primitives.cuh"
#include "sm90_primitives.cuh"
#include "sm90_wgmma.cuh"

namespace tpla::cuda {

constexpr int kChunkBytes = kTokenTile * 128;

// Columns of a token in chunks of 64. Where the latent ends inside a chunk (288: 64 shared and 224 own columns), that chunk holds the first
// rope columns too, and the last one is loaded half, behind zeros: its lower half is never multiplied.
template <int kLatent>
struct TokenChunks {
  static constexpr int kValues = (kLatent + 63) / 64;  // that hold latent columns
  static constexpr int kAll = kValues + 1;
  static constexpr int kMissing = kAll * 64 - (kLatent + 64);  // columns of the last chunk
  static constexpr int kFirstStep = kMissing / 16;             // k-step of the last chunk
  static_assert(kLatent + 64 > kValues * 64 && kMissing % 32 == 0);
};
constexpr int kSharedMemoryPerBlock = 227 * 1024;
constexpr int kSharedAlignment = 1024;

// Where the tokens of a tile lie: one TMA box per run of tokens that is sure to be in one page. Held by a warp, one box a lane.
struct TileBoxes {
  int pages[4];
  int offsets[4];  // first token within the page
};

// Most pages are a power of two, and to divide takes 100 cycles that the first load waits for.
__device__ __forceinline__ int page_of(int token, int page_size) {
  return (page_size & (page_size - 1)) == 0 ? token >> (31 - __clz(page_size)) : token / page_size;
}

template <class Logits = PlainLogits>
class PageWalk {
 public:
  // `passing`: L2 should rather keep anything else.
  __device__ PageWalk(const MlaDecodeArgs& args, const DecodePiece& piece, bool passing)
      : args_(args), piece_(piece), passing_(passing), boxes_per_tile_(args.box_tokens == kTokenTile ? 1 : 2 * args.box_tokens == kTokenTile ? 2 : 4) {}
  // Row tiles share what they read.
  __device__ PageWalk(const MlaDecodeArgs& args, const DecodePiece& piece) : PageWalk(args, piece, args.row_tiles * args.stacked == 1) {}

  // Tiles in ascending order, each once, by a whole warp.
  __device__ TileBoxes boxes(int tile) {
    const int lane = threadIdx.x % 32;
    if (next_ == 0) {
      const int place = (tile + lane / boxes_per_tile_) * kTokenTile + lane % boxes_per_tile_ * args_.box_tokens;
      const int token = Logits(args_, piece_).position(place);
      const int index = page_of(token, args_.page_size);
      offset_ = token - index * args_.page_size;
      // A page past the end of the tensor map reads as zeros.
      page_ = place < piece_.kv_len ? args_.block_table[static_cast<int64_t>(piece_.sequence) * args_.block_table_stride + index] : args_.num_pages;
    }
    TileBoxes result;
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      result.pages[box] = __shfl_sync(~0u, page_, (next_ + box) & 31);
      result.offsets[box] = __shfl_sync(~0u, offset_, (next_ + box) & 31);
    }
    next_ = (next_ + boxes_per_tile_) & 31;
    return result;
  }

  // 64 tokens of one chunk of columns, of which the first `missing` become zeros and the others move up.
  __device__ void load(const CUtensorMap& map, const TileBoxes& boxes, int column, uint32_t chunk, uint32_t barrier, int missing = 0) const {
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      if (box < boxes_per_tile_) {
        const uint32_t destination = chunk + box * args_.box_tokens * 128;
        if (passing_) tma_load_4d(destination, map, barrier, -missing, boxes.offsets[box], column, boxes.pages[box], l2_evict_first());
        else tma_load_4d(destination, map, barrier, -missing, boxes.offsets[box], column, boxes.pages[box]);
      }
    }
  }

  // Asks L2 for what load() of the same boxes and column will read.
  __device__ void prefetch(const CUtensorMap& map, const TileBoxes& boxes, int column) const {
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      if (box < boxes_per_tile_) tma_prefetch_4d(map, 0, boxes.offsets[box], column, boxes.pages[box]);
    }
  }

 private:
  static constexpr int kBoxes = kTokenTile / 16;

  const MlaDecodeArgs& args_;
  const DecodePiece& piece_;
  bool passing_;
  int boxes_per_tile_;
  int next_ = 0;
  int page_ = 0, offset_ = 0;
};

// Ring of kSlots chunks. Chunk number n of a block is use n / kSlots of slot n % kSlots.
//
// Uses take turns at two `full` barriers. A wait names a phase only by its parity, so with one barrier a warpgroup that waits for use u
// takes the end of use u - 2 for it while use u - 1 is still on its way; where warpgroups take alternate tiles, u - 1 may be the other's,
// and loads need not arrive in order. With two, the phase before would be use u - 4: use u - 2 was consumed before use u - 1 was asked
// for, and that was asked for before the last tile this warpgroup has seen.
template <int kChunks, int kSlots, int kMissing = 0>
struct ChunkRing {
  static constexpr int kBarriers = 3 * kSlots;

  uint32_t data;
  uint32_t barriers;  // [kBarriers] mbarriers: full [kSlots][2], then empty [kSlots]

  __device__ uint32_t chunk(int slot) const { return data + slot * kChunkBytes; }
  __device__ uint32_t full(int slot, int use) const { return barriers + (slot * 2 + (use & 1)) * 8; }
  __device__ uint32_t empty(int slot) const { return barriers + (2 * kSlots + slot) * 8; }
  __device__ void wait_full(int slot, int use) const { mbarrier_wait(full(slot, use), use >> 1 & 1); }
  __device__ void release(int slot) const { mbarrier_arrive(empty(slot)); }  // by one thread of each warp that has read the slot

  // By a whole warp.
  __device__ void init(int consumer_arrivals) const {
    for (int i = threadIdx.x % 32; i < kBarriers; i += 32) mbarrier_init(barriers + i * 8, i < 2 * kSlots ? 1 : consumer_arrivals);
    mbarrier_init_fence();
  }

  // One warp feeds all tiles of a piece; one of its threads calls begun() when the first is under way. `count` numbers the block's chunks
  // from 0 across pieces. Position 0 of a tile is the rope chunk, the last column; the latent chunks follow. Each has a lane, because one
  // thread takes some 450 cycles from a load to the next.
  template <class Logits = PlainLogits, class Begun>
  __device__ void feed(const CUtensorMap& map, const MlaDecodeArgs& args, const DecodePiece& piece, int& count, Begun begun) const {
    static_assert(kChunks <= 32);
    const int position = threadIdx.x % 32;
    PageWalk<Logits> walk(args, piece);
    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      const TileBoxes boxes = walk.boxes(tile);
      const int slot = (count + position) % kSlots, use = (count + position) / kSlots;
      bool waits = position < kChunks;
      while (__any_sync(~0u, waits)) {
        if (waits && mbarrier_passed(empty(slot), (use & 1) ^ 1)) {
          mbarrier_arrive_expect_bytes(full(slot, use), kChunkBytes);
          walk.load(map, boxes, position == 0 ? kChunks - 1 : position - 1, chunk(slot), full(slot, use), position == 0 ? kMissing : 0);
          waits = false;
        }
        __syncwarp();
      }
      if (position == 0 && tile == piece.tile_begin) begun();
      count += kChunks;
      __syncwarp();
    }
  }

  // The same by one thread: 4 to 12 % faster for 64 rows of latents below 512.
  template <class Logits = PlainLogits, class Begun>
  __device__ void feed_by_one(const CUtensorMap& map, const MlaDecodeArgs& args, const DecodePiece& piece, int& count, Begun begun) const {
    PageWalk<Logits> walk(args, piece);
    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      const TileBoxes boxes = walk.boxes(tile);
      if (threadIdx.x % 32 == 0) {
#pragma unroll 1
        for (int position = 0; position < kChunks; ++position) {
          const int slot = (count + position) % kSlots, use = (count + position) / kSlots;
          mbarrier_wait(empty(slot), (use & 1) ^ 1);
          mbarrier_arrive_expect_bytes(full(slot, use), kChunkBytes);
          walk.load(map, boxes, position == 0 ? kChunks - 1 : position - 1, chunk(slot), full(slot, use), position == 0 ? kMissing : 0);
        }
        if (tile == piece.tile_begin) begun();
      }
      count += kChunks;
      __syncwarp();
    }
  }
};

// The first kColumns columns of the query rows of this row tile -> shared memory, [chunk of 64 columns][row][64], 128-byte swizzle;
// absent rows are zero. All loads are in flight together: under load each takes as long as all that the memory has been asked for before.
template <int kBlockRows, int kLatent, int kColumns, int kThreads>
__device__ __forceinline__ void load_query(const MlaDecodeArgs& args, int row0, const DecodePiece& piece, uint8_t* destination, int thread) {
  constexpr int kUnits = kColumns / 8, kRowUnits = (kLatent + 64) / 8, kTotal = kBlockRows * kUnits;
  const uint4* source = reinterpret_cast<const uint4*>(args.q) + (static_cast<int64_t>(piece.q_begin) * args.heads + row0) * kRowUnits;
  const auto place = [](int row, int unit) {
    constexpr int kMissing = TokenChunks<kLatent>::kMissing / 8;
    if (kMissing && unit / 8 == TokenChunks<kLatent>::kValues) unit += kMissing;
    return (unit / 8) * (kBlockRows * 128) + row * 128 + (((unit % 8) ^ (row & 7)) << 4);
  };
#pragma unroll 2
  for (int i = thread; i < kTotal; i += kThreads) {
    const int row = i / kUnits, unit = i % kUnits;
    copy_async_16(smem_address(destination) + place(row, unit), source + row * kRowUnits + unit, row0 + row < piece.rows);
  }
  copy_async_commit();
  copy_async_wait<0>();
  if (args.latent_scale) {
#pragma unroll 1
    for (int i = thread; i < kTotal; i += kThreads) {
      const int row = i / kUnits, unit = i % kUnits;
      if (unit >= kLatent / 8) continue;
      const float scale = args.latent_scale[(row0 + row) % args.heads];
      uint4* unit_values = reinterpret_cast<uint4*>(destination + place(row, unit));
      uint4 values = *unit_values;
      uint32_t* words = reinterpret_cast<uint32_t*>(&values);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = pack_bf16(__uint_as_float(words[w] << 16) * scale, __uint_as_float(words[w] & 0xFFFF0000u) * scale);
      }
      *unit_values = values;
    }
  }
}

// Asks L2 for the block table, of which each block takes a part: nobody's first page number should wait for memory. One warp.
__device__ __forceinline__ void prefetch_block_table(const MlaDecodeArgs& args) {
  constexpr int kLine = 128, kMostRounds = 4;
  const int64_t bytes = static_cast<int64_t>(args.batch) * args.block_table_stride * 4;
#pragma unroll 1
  for (int round = 0; round < kMostRounds; ++round) {
    const int64_t offset = (static_cast<int64_t>((round * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * 32 + threadIdx.x % 32) * kLine;
    if (offset < bytes) l2_prefetch_line(reinterpret_cast<const uint8_t*>(args.block_table) + offset);
  }
}

// Asks L2 for the query rows of the next piece, if there is one: when its turn comes, they would wait behind all the KV that is on its
// way. One thread.
template <int kBlockRows, int kLatent, class Schedule>
__device__ __forceinline__ void prefetch_next_query(const MlaDecodeArgs& args, const Schedule& schedule, DecodeShare share) {
  DecodePiece piece;
  if (share.parts > 0 || !schedule.next(share, piece)) return;  // aligned: one piece
  const int row0 = piece.row0;
  const int rows = min(piece.rows - row0, kBlockRows);
  constexpr int kRowBytes = (kLatent + 64) * 2;
  if (rows > 0) l2_prefetch(static_cast<const uint8_t*>(args.q) + (static_cast<int64_t>(piece.q_begin) * args.heads + row0) * kRowBytes, rows * kRowBytes);
}

// The last chunk's columns of this thread's rows, `row` and row + 8 of the sequence, as A operands of its k-steps.
template <int kLatent>
__device__ __forceinline__ void load_rope_query(const MlaDecodeArgs& args, const DecodePiece& piece, int row, uint32_t (&fragment)[4][4]) {
  const int lane = threadIdx.x % 32;
  const uint32_t* source = reinterpret_cast<const uint32_t*>(args.q) + (static_cast<int64_t>(piece.q_begin) * args.heads + row) * ((kLatent + 64) / 2) + TokenChunks<kLatent>::kValues * 32 + lane % 4;
  constexpr int kFirstStep = TokenChunks<kLatent>::kFirstStep;
#pragma unroll
  for (int k = kFirstStep; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int down = i % 2 * 8;
      fragment[k][i] = row + down < piece.rows ? __ldg(source + down * ((kLatent + 64) / 2) + (k - kFirstStep) * 8 + i / 2 * 4) : 0;
    }
}

// Zeroes the tokens [begin, end) of one chunk, so that 0 · garbage cannot become NaN. kThreads threads.
template <int kThreads>
__device__ __forceinline__ void zero_chunk(uint32_t chunk, int begin, int end, int thread) {
#pragma unroll 1
  for (int i = begin * 8 + thread; i < end * 8; i += kThreads) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(chunk + i * 16), "r"(0) : "memory");
  }
}

template <int kThreads>
__device__ __forceinline__ void zero_chunk_tail(uint32_t chunk, int valid, int thread) {
  zero_chunk<kThreads>(chunk, valid, kTokenTile, thread);
}

}  // namespace tpla::cuda
