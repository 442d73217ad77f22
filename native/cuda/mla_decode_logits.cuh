// Which tokens a decode call sees and what becomes of their logits: a policy that the decode kernels are compiled with.
//
//   PlainLogits:   all tokens of the sequence; logits are only scaled. Compiles to nothing.
//   ChunkLogits:   the same for chunks.
//   VariantLogits: softcap, sliding window, ALiBi and block mask, in any combination.
//
// The tokens that some query of a sequence may see are numbered from 0 in the order of their positions; kernels and schedule count in these
// *places* and never learn of the others. A window drops the tokens before the first query's window, a block mask those of hidden blocks, so
// neither is loaded, not even its page number.
#pragma once

#include "mla_decode_args.h"

namespace tpla::cuda {

// A run of tiles of one sequence that one block computes.
struct DecodePiece {
  int sequence;
  int row0;          // first of its rows that the block computes
  int kv_len;        // in places
  int q_begin;       // first query token
  int q_tokens;      // of this sequence
  int rows;          // q_tokens · heads
  int tile_begin;
  int tile_end;
  int participants;  // blocks that share the sequence; 1: nothing to reduce
  int participant;   // which of them this block is
};

struct PlainLogits {
  static constexpr bool kPlain = true;
  static constexpr bool kStacks = false;  // whether a sequence may have more rows than the blocks of a slot take

  template <class Args>
  __device__ PlainLogits(const Args&, const DecodePiece&) {}

  template <class Args>
  __device__ static int tokens(const Args& args, int item) { return args.kv_lens[args.sequence_of(item)]; }
  template <class Args>
  __device__ static float scale(const Args& args) { return args.softmax_scale_log2; }

  __device__ int position(int place) const { return place; }
  __device__ static constexpr int hidden_places() { return 0; }
};

// For chunks of many query tokens, so that decode does not pay for what these need of the schedule.
struct ChunkLogits : PlainLogits {
  using PlainLogits::PlainLogits;
  static constexpr bool kStacks = true;
};

class VariantLogits {
 public:
  static constexpr bool kPlain = false;
  static constexpr bool kStacks = true;

  // A query row: which positions it sees, last - span < t <= last, and its ALiBi line.
  struct Row {
    int position;
    int last;
    unsigned span;
    float slope;  // log2 units a token
  };

  template <class Args>
  __device__ VariantLogits(const Args& args, const DecodePiece& piece)
      : logits_(args.logits),
        piece_(piece),
        heads_(args.heads),
        causal_(args.causal),
        scale_(args.softmax_scale_log2),
        kv_len_(args.kv_lens[args.sequence_of(piece.sequence)]),
        list_(list_of(args, args.sequence_of(piece.sequence))),
        slopes_(args.logits.slopes ? args.logits.slopes + args.first_head(piece.sequence) : nullptr),
        origin_(visible(args, args.sequence_of(piece.sequence)).origin) {}

  template <class Args>
  __device__ static int tokens(const Args& args, int item) { return visible(args, args.sequence_of(item)).tokens; }

  // apply() leaves logits in log2 units.
  template <class Args>
  __device__ static float scale(const Args&) { return 1.0f; }

  // Position in the sequence; kNowhere behind the last place.
  __device__ int position(int place) const {
    if (place >= piece_.kv_len) return kNowhere;
    const int index = origin_ + place;
    return list_ ? list_[index / logits_.mask_block] * logits_.mask_block + index % logits_.mask_block : index;
  }

  // Places at the start that are loaded only because a box is loaded whole; what they hold may be anything.
  __device__ int hidden_places() const { return piece_.kv_len > 0 ? max(first_seen(logits_, piece_.q_tokens, kv_len_) - position(0), 0) : 0; }

  // Row of the sequence.
  __device__ Row row(int row) const {
    constexpr float kLog2E = 1.4426950408889634f;
    Row result;
    result.position = kv_len_ - piece_.q_tokens + row / heads_;
    result.last = causal_ ? result.position : kv_len_ - 1;
    result.span = result.last - result.position + logits_.window;
    result.slope = slopes_ ? slopes_[row % heads_] * kLog2E : 0.0f;
    return result;
  }

  __device__ static bool sees(const Row& row, int position) { return static_cast<unsigned>(row.last - position) < row.span; }

  // Products q · k -> logits in log2 units, -inf where the row does not see the token. position_of(i) and row_of(i): of value i.
  // all_seen: the caller knows that no value is hidden.
  template <int kCount, class PositionOf, class RowOf>
  __device__ __forceinline__ void apply(float (&logits)[kCount], PositionOf position_of, RowOf row_of, bool all_seen = false) const {
    if (logits_.softcap_out > 0.0f) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) logits[i] = softcap(logits[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) logits[i] *= scale_;
    }
    if (slopes_) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) logits[i] -= row_of(i).slope * fabsf(static_cast<float>(row_of(i).position - position_of(i)));
    }
    if (all_seen) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!sees(row_of(i), position_of(i))) logits[i] = -INFINITY;
    }
  }

  // The same for fragments with rows on the M side: two rows, and tokens in runs of 16 of which positions[r] is this thread's first.
  template <int kRuns>
  __device__ __forceinline__ void apply_to_rows(float (&logits)[kRuns * 8], const Row (&rows)[2], const int (&positions)[kRuns]) const {
    const int last = positions[kRuns - 1] + 9;  // positions ascend
    const bool all_seen = sees(rows[0], positions[0]) && sees(rows[0], last) && sees(rows[1], positions[0]) && sees(rows[1], last);
    apply(
        logits, [&](int i) { return positions[i / 8] + (i / 4) % 2 * 8 + i % 2; }, [&](int i) { return rows[i % 4 / 2]; }, all_seen);
  }

 private:
  static constexpr int kNowhere = 1 << 30;

  struct Visible {
    int origin;  // of place 0: its position or, with a block mask, its index in the concatenation of the listed blocks
    int tokens;
  };

  template <class Args>
  __device__ static const int32_t* list_of(const Args& args, int sequence) {
    return args.logits.block_list ? args.logits.block_list + static_cast<int64_t>(sequence) * args.logits.block_list_stride : nullptr;
  }

  // First position that the first query, and so any query, sees.
  __device__ static int first_seen(const LogitArgs& logits, int q_tokens, int kv_len) { return max(kv_len - q_tokens + 1 - logits.window, 0); }

  // First entry of an ascending list that is not less than `block`.
  __device__ static int lower_bound(const int32_t* list, int count, int block) {
    int low = 0;
    while (count > 0) {
      const int half = count / 2;
      if (list[low + half] < block) {
        low += half + 1;
        count -= half + 1;
      } else {
        count = half;
      }
    }
    return low;
  }

  template <class Args>
  __device__ static Visible visible(const Args& args, int sequence) {
    const int kv_len = args.kv_lens[sequence];
    const int begin = first_seen(args.logits, args.q_indptr ? args.q_indptr[sequence + 1] - args.q_indptr[sequence] : args.q_tokens, kv_len);
    const int in_boxes = -args.box_tokens;  // a power of two: the mask that rounds down to whole boxes
    const int32_t* list = list_of(args, sequence);
    if (!list) return {begin & in_boxes, kv_len - (begin & in_boxes)};

    const int block = args.logits.mask_block;
    const int blocks = (kv_len + block - 1) / block;
    int count = args.logits.block_counts[sequence];
    if (count > 0 && list[count - 1] >= blocks) count = lower_bound(list, count, blocks);
    const int first = begin > 0 ? lower_bound(list, count, begin / block) : 0;
    if (first >= count) return {0, 0};
    const int origin = first * block + (max(begin - list[first] * block, 0) & in_boxes);
    const int end = (count - 1) * block + min(block, kv_len - list[count - 1] * block);
    return {origin, end - origin};
  }

  // softcap · tanh(scale · product / softcap), in log2 units; tanh(x) = 1 - 2 / (1 + e^2x).
  __device__ float softcap(float product) const {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(product * logits_.softcap_in));
    return logits_.softcap_out * (1.0f - __fdividef(2.0f, 1.0f + power));
  }

  const LogitArgs& logits_;
  const DecodePiece& piece_;
  int heads_;
  int causal_;
  float scale_;  // softmax scale · log2(e)
  int kv_len_;   // positions of the sequence
  const int32_t* list_;
  const float* slopes_;  // of the item's heads
  int origin_;
};

// A policy for kernels that are only chosen where a block takes all rows of a sequence: what stacking needs of the schedule costs registers.
template <class Logits>
struct Unstacked : Logits {
  using Logits::Logits;
  static constexpr bool kStacks = false;
};

}  // namespace tpla::cuda
