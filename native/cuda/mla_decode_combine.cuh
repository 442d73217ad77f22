// Reduction of split sequences inside the launch: every block that computed a part of a sequence publishes it, waits for the other
// parts, and reduces its share of the output, in the order of the parts whoever came last: deterministic.
// The wait cannot deadlock: the launch is cooperative, so all blocks run, and every block publishes all its parts before it waits for any.
#pragma once

#include <cuda_bf16.h>

#include "mla_decode_schedule.cuh"

namespace tpla::cuda {

__device__ __forceinline__ int load_acquire(const int* pointer) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}

__device__ __forceinline__ float4 load_l2(const float4* pointer) { return __ldcg(pointer); }
__device__ __forceinline__ float2 load_l2(const float2* pointer) { return __ldcg(pointer); }

// Call by one thread after all threads that wrote the part have passed a barrier.
__device__ __forceinline__ void publish_part(int* arrivals) {
  __threadfence();
  atomicAdd(arrivals, 1);
}

// Reduces this block's share of one split sequence: kThreads threads, numbered `thread`, that meet at `barrier()`.
// scratch: shared memory, 16-byte aligned, (kBlockRows + 2 · participants + 2) · 8 + kThreads · 16 bytes.
template <int kLatent, int kThreads, int kBlockRows, int kOverhead, class Logits, class Args, class Barrier>
__device__ void combine_parts(const Args& args, const DecodeSchedule<kBlockRows, kOverhead, Logits, Args>& schedule, const DecodePiece& piece,
                              void* scratch, int thread, Barrier barrier) {
  const int parts = piece.participants;
  const int row0 = piece.row0;
  const int rows = max(0, min(piece.rows - row0, kBlockRows));
  constexpr int kVectorsPerRow = kLatent / 4;
  const int vectors = rows * kVectorsPerRow;
  const int begin = static_cast<int>(static_cast<int64_t>(vectors) * piece.participant / parts);
  const int end = static_cast<int>(static_cast<int64_t>(vectors) * (piece.participant + 1) / parts);
  const int first_row = begin / kVectorsPerRow;
  const int share_rows = begin < end ? (end - 1) / kVectorsPerRow - first_row + 1 : 0;

  int* arrivals = args.arrivals + schedule.arrival_index(piece);
  if (thread == 0) {
    while (load_acquire(arrivals) < parts) __nanosleep(20);
  }
  barrier();

  // Maximum and sum of every part in every row of the share, [row][part]; the maximum is then replaced by the part's weight.
  float2* weights = static_cast<float2*>(scratch);
  for (int i = thread; i < share_rows * parts; i += kThreads) {
    weights[i] = load_l2(args.partial_sum + schedule.partial_index(piece, i % parts) * kBlockRows + first_row + i / parts);
  }
  barrier();
  const int lane = thread % 32;
  for (int row = thread / 32; row < share_rows; row += kThreads / 32) {
    float2* of_row = weights + row * parts;
    float maximum = -INFINITY;
    for (int i = lane; i < parts; i += 32) maximum = fmaxf(maximum, of_row[i].x);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, d));
    const float reference = maximum == -INFINITY ? 0.0f : maximum;
    float sum = 0.0f;
    for (int i = lane; i < parts; i += 32) {
      of_row[i].x = exp2f(of_row[i].x - reference);
      sum += of_row[i].x * of_row[i].y;
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int i = lane; i < parts; i += 32) of_row[i].x *= inverse;
    const bool owns_row = (first_row + row) * kVectorsPerRow >= begin;  // the share in which the row begins
    if (args.lse && lane == 0 && owns_row) {
      args.lse[args.out_row(piece.sequence, piece.q_begin, row0, first_row, row)] =
          sum > 0.0f ? (reference + log2f(sum)) * 0.6931471805599453f : -INFINITY;
    }
  }
  barrier();

  const auto part_vectors = [&](int part) {
    return reinterpret_cast<const float4*>(args.partial_out) + static_cast<int64_t>(schedule.partial_index(piece, part)) * kBlockRows * kVectorsPerRow;
  };
  const auto add = [&](float4& total, int vector, int part, const float4& value) {
    const float weight = weights[(vector / kVectorsPerRow - first_row) * parts + part].x;
    total.x = fmaf(weight, value.x, total.x);
    total.y = fmaf(weight, value.y, total.y);
    total.z = fmaf(weight, value.z, total.z);
    total.w = fmaf(weight, value.w, total.w);
  };
  const auto store = [&](int vector, const float4& total) {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(total.x, total.y), __floats2bfloat162_rn(total.z, total.w)};
    const int64_t row = args.out_row(piece.sequence, piece.q_begin, row0, vector / kVectorsPerRow);
    reinterpret_cast<uint2*>(args.out)[row * kVectorsPerRow + vector % kVectorsPerRow] = *reinterpret_cast<const uint2*>(pairs);
  };

  if ((end - begin) * 2 > kThreads) {
    // Few parts, many vectors: four vectors a thread at a time keep enough loads in flight.
    for (int base = begin + thread; base < end; base += 4 * kThreads) {
      float4 total[4] = {};
#pragma unroll 2
      for (int part = 0; part < parts; ++part) {
        const float4* source = part_vectors(part);
        float4 value[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) value[u] = load_l2(source + min(base + u * kThreads, end - 1));
#pragma unroll
        for (int u = 0; u < 4; ++u) add(total[u], min(base + u * kThreads, end - 1), part, value[u]);
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (base + u * kThreads < end) store(base + u * kThreads, total[u]);
      }
    }
  } else {
    // Many parts, few vectors: several threads to a vector, each over every groups-th part, joined in order.
    const int per_group = max(end - begin, 1);
    const int groups = min(kThreads / per_group, 16);
    float4* joined = reinterpret_cast<float4*>(weights + ((share_rows * parts + 1) & ~1));
    const int group = thread / per_group;
    const int vector = begin + thread % per_group;
    float4 total = {};
    if (vector < end && group < groups) {
#pragma unroll 16
      for (int part = group; part < parts; part += groups) add(total, vector, part, load_l2(part_vectors(part) + vector));
    }
    joined[thread] = total;
    barrier();
    if (group == 0 && vector < end) {
      for (int g = 1; g < groups; ++g) {
        const float4 other = joined[g * per_group + thread];
        total.x += other.x;
        total.y += other.y;
        total.z += other.z;
        total.w += other.w;
      }
      store(vector, total);
    }
  }

  // The last block to leave makes the counter ready for the next launch.
  barrier();
  if (thread == 0 && atomicAdd(arrivals, 1) == 2 * parts - 1) atomicExch(arrivals, 0);
}

}  // namespace tpla::cuda
