// Reduction of split sequences inside the launch: every block that computed a part of a sequence publishes it, waits for the other
// parts, and reduces its share of the output, in the order of the parts whoever came last: deterministic.
// The wait cannot deadlock: the launch is cooperative, so all blocks run, and every block publishes all its parts before it waits for any.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "arithmetic.cuh"
#include "mla_decode_schedule.cuh"

namespace tpla::cuda {

__device__ __forceinline__ int load_acquire(const int* pointer) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}

template <class Vector>
__device__ __forceinline__ Vector load_l2(const Vector* pointer) { return __ldcg(pointer); }

// Call by one thread after all threads that wrote the part have passed a barrier: the fence covers what they wrote before it.
__device__ __forceinline__ void publish_part(int* arrivals) {
  __threadfence();
  atomicAdd(arrivals, 1);
}

// Sixteen bytes of a row of a part, in fp32 or f16.
template <class Value>
struct PartVector {
  static constexpr int kValues = 16 / sizeof(Value);
  float values[kValues] = {};

  __device__ void add(float weight, const uint4& bits) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Value) == 4) {
        values[i] = fmaf(weight, __uint_as_float(words[i]), values[i]);
      } else {
        const float2 two = __half22float2(reinterpret_cast<const __half2&>(words[i]));
        values[2 * i] = fmaf(weight, two.x, values[2 * i]);
        values[2 * i + 1] = fmaf(weight, two.y, values[2 * i + 1]);
      }
    }
  }
  __device__ void add(const PartVector& other) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] += other.values[i];
  }
  // As bf16, to vector `vector` of the output.
  __device__ void store(void* out, int64_t vector) const {
    uint32_t* to = static_cast<uint32_t*>(out) + vector * (kValues / 2);
    if constexpr (kValues == 4) *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]));
    else *reinterpret_cast<uint4*>(to) = make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
  }
};

// A row of a part in f16 has a power of two taken out, so that the range of fp32 fits: log2 of it, for a row whose largest magnitude is `top`.
// partial_sum then holds the row's maximum + exponent and its sum · 2^-exponent.
__device__ __forceinline__ int part_exponent(float top) { return max((__float_as_int(top) >> 23) - 127, -40) - 13; }
__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Reduces this block's share of one split sequence, whose parts are of type PartValue: kThreads threads, numbered `thread`, that meet at `barrier()`.
// scratch: shared memory, 16-byte aligned, (kBlockRows + 2 · participants + 2) · 8 + kThreads · (64 / sizeof(PartValue)) bytes.
template <int kLatent, int kThreads, class PartValue = float, int kBlockRows, int kOverhead, class Logits, class Args, class Barrier>
__device__ void combine_parts(const Args& args, const DecodeSchedule<kBlockRows, kOverhead, Logits, Args>& schedule, const DecodePiece& piece,
                              void* scratch, int thread, Barrier barrier) {
  using Vector = PartVector<PartValue>;
  constexpr int kVectorsPerRow = kLatent / Vector::kValues;
  constexpr int kAtOnce = 16;
  const int parts = piece.participants;
  const int rows = max(0, min(piece.rows - piece.row0, kBlockRows));
  const unsigned vectors = rows * kVectorsPerRow;
  static_assert(static_cast<int64_t>(kBlockRows) * kVectorsPerRow * 1024 < 1ll << 32);  // more parts than any GPU holds blocks
  const int begin = vectors * piece.participant / parts;
  const int end = vectors * (piece.participant + 1) / parts;
  const int first_row = begin / kVectorsPerRow;
  const int share_rows = begin < end ? (end - 1) / kVectorsPerRow - first_row + 1 : 0;

  int* arrivals = args.arrivals + schedule.arrival_index(piece);
  if (thread == 0) {
    while (load_acquire(arrivals) < parts) __nanosleep(20);
  }
  barrier();

  // A thread has kAtOnce loads in flight. Several threads take a vector where there are few, each every teams-th part; their sums are joined in
  // order. The first loads are under way while the weights are computed.
  const int team_threads = min(max(end - begin, 1), kThreads);
  const int teams = min(kThreads / team_threads, 16);
  const int team = thread / team_threads;
  // Parts lie kPartVectors · stride apart, but the first, which is in place 1.
  constexpr int kPartVectors = kBlockRows * kVectorsPerRow;
  const int stride = 2 * args.row_tiles;
  const int first_place = schedule.partial_index(piece, 0) - 1;
  const uint4* source = reinterpret_cast<const uint4*>(args.partial_out) + static_cast<int64_t>(first_place + team * stride) * kPartVectors + begin + thread % team_threads;
  const int64_t step = static_cast<int64_t>(teams * stride) * kPartVectors;
  const bool takes_part = team < teams && begin < end;
  uint4 values[kAtOnce];
  const auto load = [&](int first_part, const uint4* from) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int part = first_part + u * teams;
      if (part < parts) values[u] = load_l2(u == 0 && part == 0 ? from + kPartVectors : from);
      from += step;
    }
  };
  // Where there are few parts, of kAtOnce / kFewParts vectors.
  constexpr int kFewParts = 4;
  const bool few_parts = parts <= kFewParts && teams == 1;
  const auto load_few = [&](const uint4* from, int vector) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int part = u % kFewParts, ahead = u / kFewParts * team_threads;
      if (part < parts && vector + ahead < end) values[u] = load_l2(from + ahead + part * step + (part == 0 ? kPartVectors : 0));
    }
  };
  const int first_vector = begin + thread % team_threads;
  if (takes_part) {
    if (few_parts) load_few(source, first_vector);
    else load(team, source);
  }

  // Maximum and sum of every part in every row of the share, [row][part]; the maximum is then replaced by the part's weight.
  float2* weights = static_cast<float2*>(scratch);
#pragma unroll 1
  for (int i = thread; i < share_rows * parts; i += kThreads) {
    const int row = i / parts, part = i - row * parts;
    weights[i] = load_l2(args.partial_sum + (first_place + part * stride + (part == 0)) * kBlockRows + first_row + row);
  }
  barrier();
  const int lane = thread % 32;
#pragma unroll 1
  for (int row = thread / 32; row < share_rows; row += kThreads / 32) {
    float2* of_row = weights + row * parts;
    float maximum = -INFINITY;
#pragma unroll 1
    for (int i = lane; i < parts; i += 32) maximum = fmaxf(maximum, of_row[i].x);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, d));
    const float reference = maximum == -INFINITY ? 0.0f : maximum;
    float sum = 0.0f;
#pragma unroll 1
    for (int i = lane; i < parts; i += 32) {
      of_row[i].x = exp2f(of_row[i].x - reference);
      sum += of_row[i].x * of_row[i].y;
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll 1
    for (int i = lane; i < parts; i += 32) of_row[i].x *= inverse;
    const bool owns_row = (first_row + row) * kVectorsPerRow >= begin;  // the share in which the row begins
    if (args.lse && lane == 0 && owns_row) {
      args.lse[args.out_row(piece.sequence, piece.q_begin, piece.row0, first_row, row)] =
          sum > 0.0f ? (reference + log2f(sum)) * 0.6931471805599453f : -INFINITY;
    }
  }
  barrier();

  const auto store = [&](int vector, const Vector& total) {
    const int64_t row = args.out_row(piece.sequence, piece.q_begin, piece.row0, vector / kVectorsPerRow);
    total.store(args.out, row * kVectorsPerRow + vector % kVectorsPerRow);
  };
#pragma unroll 1
  for (int base = begin; base < end && few_parts && takes_part; base += kAtOnce / kFewParts * team_threads) {
    const int vector = first_vector + base - begin;
    if (base != begin) load_few(source + (base - begin), vector);
#pragma unroll
    for (int u = 0; u < kAtOnce; u += kFewParts) {
      const int one = vector + u / kFewParts * team_threads;
      if (one >= end) break;
      const float2* of_row = weights + (one / kVectorsPerRow - first_row) * parts;
      Vector total;
#pragma unroll
      for (int part = 0; part < kFewParts; ++part) {
        if (part < parts) total.add(of_row[part].x, values[u + part]);
      }
      store(one, total);
    }
  }
  Vector* joined = reinterpret_cast<Vector*>(weights + ((share_rows * parts + 1) & ~1));
#pragma unroll 1
  for (int base = begin; base < end && !few_parts; base += team_threads) {
    const int vector = base + thread % team_threads;
    const float2* of_row = weights + (vector / kVectorsPerRow - first_row) * parts;
    Vector total;
    if (takes_part && vector < end) {
      const uint4* from = source + (base - begin);
      if (base != begin) load(team, from);
#pragma unroll 1
      for (int first = team;;) {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          const int part = first + u * teams;
          if (part >= parts) break;
          total.add(of_row[part].x, values[u]);
        }
        first += kAtOnce * teams;
        if (first >= parts) break;
        from += kAtOnce * step;
        load(first, from);
      }
    }
    if (teams > 1) {  // then this is the only round
      joined[thread] = total;
      barrier();
#pragma unroll 1
      for (int t = 1; t < teams && team == 0; ++t) total.add(joined[t * team_threads + thread]);
    }
    if (team == 0 && vector < end) store(vector, total);
  }

  // The last block to leave makes the counter ready for the next launch.
  barrier();
  if (thread == 0) atomicInc(reinterpret_cast<unsigned*>(arrivals), 2 * parts - 1);
}

}  // namespace tpla::cuda
