// Reduction of split sequences inside the launch: every block that computed a part of a sequence publishes it, waits for the other
// parts, and reduces its share of the output, in the order of the parts whoever came last: deterministic.
// The wait cannot deadlock: the launch is cooperative and every block publishes all its parts before it waits for any.
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

// kThreads threads, numbered `thread`, that meet at `barrier()`. scratch: combine_scratch_floats() floats of shared memory.
template <int kBlockRows, int kParticipantsMax>
constexpr int combine_scratch_floats(int threads) {
  return kBlockRows + 2 * kParticipantsMax + 4 * threads;
}

template <int kLatent, int kBlockRows, int kOverhead, int kThreads, class Barrier>
__device__ void combine_parts(const MlaDecodeArgs& args, const DecodeSchedule<kBlockRows, kOverhead>& schedule, const DecodePiece& piece,
                              float* scratch, int thread, Barrier barrier) {
  const int parts = piece.participants;
  const int row0 = schedule.row_tile * kBlockRows;
  const int rows = min(piece.rows - row0, kBlockRows);
  constexpr int kVectorsPerRow = kLatent / 4;
  const int vectors = rows * kVectorsPerRow;
  const int begin = static_cast<int>(static_cast<int64_t>(vectors) * piece.participant / parts);
  const int end = static_cast<int>(static_cast<int64_t>(vectors) * (piece.participant + 1) / parts);

  int* arrivals = args.arrivals + schedule.arrival_index(piece);
  if (thread == 0) {
    while (load_acquire(arrivals) < parts) __nanosleep(20);
  }
  barrier();

  // Weight of each part in each row of this share: scratch[row · parts + part].
  if (begin < end) {
    const int first_row = begin / kVectorsPerRow, last_row = (end - 1) / kVectorsPerRow;
    const int lane = thread % 32;
    for (int row = first_row + thread / 32; row <= last_row; row += kThreads / 32) {
      float maximum = -INFINITY;
      for (int i = lane; i < parts; i += 32) {
        maximum = fmaxf(maximum, load_l2(args.partial_sum + schedule.partial_index(piece, i) * kBlockRows + row).x);
      }
#pragma unroll
      for (int d = 16; d > 0; d /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, d));
      const float reference = maximum == -INFINITY ? 0.0f : maximum;
      float sum = 0.0f;
      for (int i = lane; i < parts; i += 32) {
        const float2 part = load_l2(args.partial_sum + schedule.partial_index(piece, i) * kBlockRows + row);
        const float weight = exp2f(part.x - reference);
        scratch[(row - first_row) * parts + i] = weight;
        sum += weight * part.y;
      }
#pragma unroll
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      for (int i = lane; i < parts; i += 32) scratch[(row - first_row) * parts + i] *= inverse;
      const bool owns_row = row * kVectorsPerRow >= begin;  // the share in which the row begins
      if (args.lse && lane == 0 && owns_row) {
        args.lse[static_cast<int64_t>(piece.q_begin) * args.heads + row0 + row] =
            sum > 0.0f ? (reference + log2f(sum)) * 0.6931471805599453f : -INFINITY;
      }
    }
    barrier();

    // Small shares: several threads to one vector, each over every groups-th part, joined in order.
    const int count = end - begin;
    int groups = 1;
    while (groups < 8 && groups * 2 * count <= kThreads && groups < parts) groups *= 2;
    float4* joined = reinterpret_cast<float4*>(scratch + (((last_row - first_row + 1) * parts + 3) & ~3));
    const int per_group = kThreads / groups;
    const int group = thread / per_group;
    for (int base = begin; base < end; base += per_group) {
      const int vector = base + thread % per_group;
      const bool active = vector < end;
      float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (active) {
        const int row = vector / kVectorsPerRow;
        const float* weights = scratch + (row - first_row) * parts;
#pragma unroll 8
        for (int i = group; i < parts; i += groups) {
          const float4* part = reinterpret_cast<const float4*>(args.partial_out) +
                               static_cast<int64_t>(schedule.partial_index(piece, i)) * kBlockRows * kVectorsPerRow;
          const float4 value = load_l2(part + vector);
          const float weight = weights[i];
          total.x += weight * value.x;
          total.y += weight * value.y;
          total.z += weight * value.z;
          total.w += weight * value.w;
        }
      }
      if (groups > 1) {
        barrier();
        joined[thread] = total;
        barrier();
        if (group == 0) {
          for (int g = 1; g < groups; ++g) {
            const float4 other = joined[g * per_group + thread];
            total.x += other.x;
            total.y += other.y;
            total.z += other.z;
            total.w += other.w;
          }
        }
      }
      if (active && group == 0) {
        __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(total.x, total.y), __floats2bfloat162_rn(total.z, total.w)};
        const int64_t row = static_cast<int64_t>(piece.q_begin) * args.heads + row0 + vector / kVectorsPerRow;
        reinterpret_cast<uint2*>(args.out)[row * kVectorsPerRow + vector % kVectorsPerRow] = *reinterpret_cast<uint2*>(pair);
      }
    }
  }

  // The last block to leave makes the counter ready for the next launch.
  barrier();
  if (thread == 0 && atomicAdd(arrivals, 1) == 2 * parts - 1) atomicExch(arrivals, 0);
}

}  // namespace tpla::cuda
