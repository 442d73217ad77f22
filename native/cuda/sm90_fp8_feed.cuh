// A warpgroup that widens tokens of fp8 KV to bf16, each once, for warpgroups that multiply: where KV is bf16, TMA brings the same chunks.
// Each of its four warps has a run of 16 tokens of every tile, which it fetches ahead by bulk copies into a ring of its own.
//
// Shape: kLatent, kRows, Token (Fp8Token), kChunks and kStages of the ring of widened tiles, kRuns and kRunBytes of each warp's.
#pragma once

#include <type_traits>

#include "sm90_fp8_widen.cuh"

namespace tpla::cuda {

constexpr int kWideningWarps = 4;
static_assert(kWideningWarps * kRunTokens == kTokenTile);

__device__ __forceinline__ uint32_t pack_factor(float factor) { return pack_bf16(factor, factor); }

__device__ __forceinline__ void store_shared(uint32_t address, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// 16 bytes of shared memory at a multiple of kAlignment.
template <int kAlignment>
__device__ __forceinline__ uint4 load_shared_16(const uint8_t* shared) {
  if constexpr (kAlignment % 16 == 0) {
    return *reinterpret_cast<const uint4*>(shared);
  } else if constexpr (kAlignment % 8 == 0) {
    const uint2 a = reinterpret_cast<const uint2*>(shared)[0], b = reinterpret_cast<const uint2*>(shared)[1];
    return make_uint4(a.x, a.y, b.x, b.y);
  } else {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(shared);
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Where a lane's 16 bytes lie in four tokens of 128 bytes each, [row][place], such that what it stores of e4m3 values, which become two
// units of a chunk, meets no bank conflicts.
struct WideningLane {
  int row, place;

  __device__ explicit WideningLane(int lane) : row(lane / 4 % 2 + lane / 16 * 2), place(lane % 4 + lane / 8 % 2 * 4) {}

  // In shared memory, of the first of those two; `run` is the first row of this warp's tokens in the first chunk of the two.
  __device__ uint32_t target(uint32_t run) const { return run + place / 4 * kChunkBytes + row * 128 + ((place % 4 * 2 ^ row) << 4); }
  // The same of a unit of rope, which is one unit of a chunk.
  __device__ uint32_t rope_target(uint32_t run, int unit) const { return run + row * 128 + ((unit ^ row) << 4); }
};

// The same place, 4i tokens on.
__device__ __forceinline__ uint32_t further_rows(uint32_t target, int i) { return (target + i * 512) ^ (i % 2 * 64); }

// What the columns of a run's 16 tokens are multiplied with, a bf16 pair for each token and group of 128 columns. A lane has one token and every
// second group.
template <int kGroups>
class WideningFactors {
 public:
  static constexpr int kOfLane = (kGroups + 1) / 2;

  // Scales of the lane's token and groups; by a whole warp.
  __device__ void set(const float (&scales)[kOfLane]) {
    bool large = false;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      large |= scales[i] > kLargestScale;
      first_[i] = pack_factor(fminf(scales[i], kLargestScale) * kWidenFactor);
    }
    large_ = __any_sync(~0u, large);
    if (!large_) return;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) second_[i] = pack_factor(fmaxf(scales[i] / kLargestScale, 1.0f));
  }
  // Which token and group those are.
  __device__ static int token() { return threadIdx.x % 32 / 2; }
  __device__ static int group(int i) { return i * 2 + threadIdx.x % 2; }

  __device__ bool large() const { return large_; }
  __device__ uint32_t first(int token, int group) const { return of(first_, token, group); }
  __device__ uint32_t second(int token, int group) const { return of(second_, token, group); }

 private:
  __device__ static uint32_t of(const uint32_t (&values)[kOfLane], int token, int group) {
    return __shfl_sync(~0u, kOfLane == 1 || group < 2 ? values[0] : values[kOfLane - 1], token * 2 + group % 2);
  }

  uint32_t first_[kOfLane], second_[kOfLane];
  bool large_;
};

// 16 values of a lane, into two units. By a whole warp; lanes whose columns are no latent do not store.
template <bool kLarge, int kGroups>
__device__ __forceinline__ void widen(const uint4& raw, const WideningFactors<kGroups>& factors, int token, int group, uint32_t address, bool stores = true) {
  const uint32_t factor = factors.first(token, group);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  uint32_t wide[8];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    wide[2 * w] = multiply_bf16x2(widen_e4m3<kFirstPair>(words[w]), factor);
    wide[2 * w + 1] = multiply_bf16x2(widen_e4m3<kSecondPair>(words[w]), factor);
  }
  if constexpr (kLarge) {
    const uint32_t rest = factors.second(token, group);
#pragma unroll
    for (int w = 0; w < 8; ++w) wide[w] = multiply_bf16x2(wide[w], rest);
  }
  if (!stores) return;
  store_shared(address, make_uint4(wide[0], wide[1], wide[2], wide[3]));
  store_shared(address ^ 16, make_uint4(wide[4], wide[5], wide[6], wide[7]));
}

// Where one warp's tokens of the tiles of a piece begin; past the end of the sequence, where its last ones do: nobody looks at those. A lane
// holds one tile of 32: those of the 16 tiles that were passed last are replaced by the 16 that come next.
template <int kTokenBytes, class Logits>
class RunWalk {
 public:
  static constexpr int kKnown = 16;  // tiles beyond the current one, at least

  __device__ RunWalk(const MlaDecodeArgs& args, const DecodePiece& piece, int warp) : args_(args), piece_(piece), warp_(warp) { held_ = find(threadIdx.x % 32); }

  // Before tiles up to t are asked for; in ascending order, by a whole warp.
  __device__ void advance(int t) {
    const int lane = threadIdx.x % 32;
    if (t > kKnown && t % kKnown == 0 && lane / kKnown == t / kKnown % 2) held_ = find(t + lane % kKnown);
  }
  // Of the t-th tile of the piece, at most 16 before what advance() had last, in one lane: null in the others.
  __device__ const uint8_t* own(int t) const { return threadIdx.x % 32 == t % 32 ? held_ : nullptr; }

 private:
  __device__ const uint8_t* find(int t) const {
    const int place = min((piece_.tile_begin + t) * kTokenTile + warp_ * kRunTokens, (piece_.kv_len - 1) / kRunTokens * kRunTokens);
    const int token = Logits(args_, piece_).position(place);
    const int index = token / args_.page_size;
    const int page = args_.block_table[static_cast<int64_t>(piece_.sequence) * args_.block_table_stride + index];
    return static_cast<const uint8_t*>(args_.kv) + page * args_.page_stride + static_cast<int64_t>(token - index * args_.page_size) * kTokenBytes;
  }

  const MlaDecodeArgs& args_;
  const DecodePiece& piece_;
  int warp_;
  const uint8_t* held_;
};

// Ring of widened tiles, in chunks: first rope, then the latent. Tile number n of a block is use n / kStages of stage n % kStages. A tile is
// full in parts of a group of 128 columns each, the first with rope. Uses of a stage take turns at two `full` barriers, see ChunkRing.
template <class Shape>
struct WidenedRing {
  static constexpr int kParts = Shape::Token::kGroups;
  static constexpr int kFull = 2 * Shape::kStages * kParts, kBarriers = kFull + Shape::kStages;

  uint32_t data;
  uint32_t barriers;

  __device__ uint32_t chunk(int stage, int position) const { return data + (stage * Shape::kChunks + position) * kChunkBytes; }
  __device__ uint32_t full(int stage, int part, int use) const { return barriers + ((stage * kParts + part) * 2 + (use & 1)) * 8; }
  __device__ uint32_t empty(int stage) const { return barriers + (kFull + stage) * 8; }
  __device__ void wait_full(int stage, int part, int use) const { mbarrier_wait(full(stage, part, use), use >> 1 & 1); }
  __device__ void release(int stage) const { mbarrier_arrive(empty(stage)); }  // by one thread of each warp that has read the tile
};

// The ring's barriers, then those of the widening warps' runs. By a whole warp.
template <class Shape>
__device__ __forceinline__ void init_barriers(uint32_t barriers, int readers) {
  using Ring = WidenedRing<Shape>;
  for (int i = threadIdx.x % 32; i < Ring::kBarriers + Shape::kRuns * kWideningWarps; i += 32) {
    mbarrier_init(barriers + i * 8, i < Ring::kFull ? kWideningWarps : i < Ring::kBarriers ? readers : 1);
  }
  mbarrier_init_fence();
}

// One widening warp: its tokens of all tiles, which it also brings.
template <class Shape, class Logits, class Schedule>
__device__ __forceinline__ void feed_widened(const MlaDecodeArgs& args, const Schedule& schedule, DecodeShare share, const WidenedRing<Shape>& ring, uint8_t* runs, uint64_t* barriers, int warp) {
  using Token = typename Shape::Token;
  using Factors = WideningFactors<Token::kGroups>;
  constexpr int kBytes = Shape::kRunBytes, kQuads = kRunTokens / 4;
  const int lane = threadIdx.x % 32;
  const WideningLane place(lane);
  const uint8_t* const own_runs = runs + warp * (Shape::kRuns * kBytes);
  const uint32_t filled = smem_address(barriers + warp * Shape::kRuns);

  int stage = 0, use = 0;  // of the ring
  int slot = 0, round = 0;  // of the warp's own ring of runs
  DecodePiece piece;
  while (schedule.next(share, piece)) {
    const int tiles = piece.tile_end - piece.tile_begin;
    if (tiles == 0) continue;
    const int hidden_places = Logits(args, piece).hidden_places();
    RunWalk<Token::kBytes, Logits> walk(args, piece, warp);
    const auto bring = [&](int t, int to) {
      if (t >= tiles) return;
      if (const uint8_t* source = walk.own(t)) {
        mbarrier_arrive_expect_bytes(filled + to * 8, kBytes);
        tma_load_bytes(smem_address(own_runs + to * kBytes), source, kBytes, filled + to * 8);
      }
    };
    for (int t = 0; t < Shape::kRuns; ++t) bring(t, (slot + t) % Shape::kRuns);
    if (warp == 0 && lane == 0) prefetch_next_query<Shape::kRows, Shape::kLatent>(args, schedule, share);
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      walk.advance(t + Shape::kRuns);
      const uint8_t* run = own_runs + slot * kBytes;
      const uint8_t* tokens = run + place.row * Token::kBytes + place.place * 16;
      const uint32_t chunks = ring.chunk(stage, 0) + warp * kRunTokens * 128;
      mbarrier_wait(filled + slot * 8, round & 1);
      // Tokens past the end of the sequence and those that a window hides may be anything, and 0 · NaN is NaN: they become zeros.
      const int own_place = (piece.tile_begin + t) * kTokenTile + warp * kRunTokens + Factors::token();
      const bool present = own_place < piece.kv_len && (Logits::kPlain || own_place >= hidden_places);
      Factors factors;
      float scales[Factors::kOfLane];
#pragma unroll
      for (int i = 0; i < Factors::kOfLane; ++i) {
        const int group = Factors::group(i);
        scales[i] = present && group < Token::kGroups ? *reinterpret_cast<const float*>(run + Factors::token() * Token::kBytes + Token::kScaleOffset + group * 4) : 0.0f;
      }
      uint4 raw[kQuads];
      const auto load = [&](int offset) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) raw[i] = load_shared_16<Token::kBytes>(tokens + i * 4 * Token::kBytes + offset);
      };
      load(Token::kRopeOffset);
      factors.set(scales);
      mbarrier_wait(ring.empty(stage), (use & 1) ^ 1);
      {
        // Where the latent ends inside a chunk, that chunk holds the first rope columns too.
        constexpr int kEndUnit = Shape::kLatent % 64 / 8;
        const bool shares = kEndUnit > 0 && place.place < 8 - kEndUnit;
        const int unit = shares ? place.place + kEndUnit : place.place;
        const uint32_t target = place.rope_target(chunks + (shares ? (Shape::kChunks - 1) * kChunkBytes : 0), unit);
#pragma unroll
        for (int i = 0; i < kQuads; ++i) store_shared(further_rows(target, i), raw[i]);
      }
      const auto widen_all = [&](auto is_large) {
        const uint32_t target = place.target(chunks + kChunkBytes);
#pragma unroll
        for (int g = 0; g < Token::kGroups; ++g) {
          const bool is_latent = Shape::kLatent % 128 == 0 || g * 128 + place.place * 16 < Shape::kLatent;
          load(g * 128);
#pragma unroll
          for (int i = 0; i < kQuads; ++i) {
            widen<decltype(is_large)::value>(raw[i], factors, place.row + 4 * i, g, further_rows(target + g * 2 * kChunkBytes, i), is_latent);
          }
          fence_async_proxy();
          __syncwarp();
          if (lane == 0) mbarrier_arrive(ring.full(stage, g, use));
        }
      };
      if (factors.large()) widen_all(std::true_type{});
      else widen_all(std::false_type{});
      bring(t + Shape::kRuns, slot);  // where this tile's lay
      if (++stage == Shape::kStages) stage = 0, ++use;
      if (++slot == Shape::kRuns) slot = 0, ++round;
    }
  }
}

}  // namespace tpla::cuda
