// Fused prefill+decode (POD), Hopper: one launch, one persistent block a multiprocessor. A block begins with prefill tiles or with decode items, by
// the multiprocessor it finds itself on, and goes on with the other kind when its own is used up. Decode items need few multiprocessors to draw the
// full memory bandwidth; the others keep the tensor cores busy meanwhile.
#include <cuda_runtime.h>

#include "pod_kernel.h"
#include "sm90_pod_decode.cuh"
#include "sm90_pod_split.cuh"
#include "sm90_prefill.cuh"

namespace tpla::cuda {
namespace {

template <int kLatent, int kRows>
constexpr int pod_data_bytes() {
  return PodDecodeShape<kLatent, kRows>::kDataBytes > PrefillShape::kDataBytes ? PodDecodeShape<kLatent, kRows>::kDataBytes : PrefillShape::kDataBytes;
}

template <int kLatent, int kRows>
__global__ void __launch_bounds__(PrefillShape::kThreads, 1)
    sm90_pod(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap k_rope_map,
             const __grid_constant__ CUtensorMap v_map,
             const __grid_constant__ CUtensorMap kv_map, const __grid_constant__ PrefillArgs prefill_args, const __grid_constant__ MlaDecodeArgs decode_args,
             const __grid_constant__ PodCosts costs) {
  extern __shared__ uint8_t shared_raw[];
  uint8_t* shared = shared_raw + ((1024 - (smem_address(shared_raw) & 1023)) & 1023);
  uint8_t* control = shared + pod_data_bytes<kLatent, kRows>();
  uint16_t* first = reinterpret_cast<uint16_t*>(control + kPodDecodeControlBytes + 256);
  int* counters = prefill_args.counter;  // [0] prefill tiles drawn, [1] decode items drawn, [2] blocks that are through

  const PrefillShared prefill(shared, control + kPodDecodeControlBytes);
  PodItems items;
  const PodDecode<kLatent, kRows> decode(decode_args, items, shared, control);
  if (threadIdx.x == 0) {
    prefill.init();
    decode.init();
  }
  __shared__ int scratch[PrefillShape::kThreads / 32];
  const int decode_tiles = cut_decode(decode_args, counters + 1, first, scratch, items);  // its barriers also publish the mbarriers
  const bool decode_first = begins_with_decode(prefill_args, decode_tiles * decode_args.row_tiles, costs, scratch);

  // The two kinds use the same shared memory one after the other.
  constexpr int kSwitchBarrier = 7, kSwitching = 256 + 64;
  if (threadIdx.x < 128) {
    registers_shrink<56>();
    if (threadIdx.x < 64) {
      const bool loader = threadIdx.x < 32;
      for (int phase = 0; phase < 2; ++phase) {
        if (decode_first == (phase == 0)) {
          if (loader) decode.load(kv_map);
          else decode.draw();
        } else {
          if (threadIdx.x == 0) load_prefill_tiles(prefill_args, {q_map, k_map, k_rope_map, v_map}, prefill);
          __syncwarp();
        }
        if (phase == 0) named_barrier_sync(kSwitchBarrier, kSwitching);
      }
      if (threadIdx.x == 0 && atomicAdd(&counters[2], 1) == gridDim.x - 1) counters[0] = counters[1] = counters[2] = 0;
    }
  } else {
    registers_grow<224>();
    for (int phase = 0; phase < 2; ++phase) {
      if (decode_first == (phase == 0)) decode.compute();
      else compute_prefill_tiles(prefill_args, prefill);
      if (phase == 0) {
        fence_async_proxy();
        named_barrier_sync(kSwitchBarrier, kSwitching);
      }
    }
  }
}

template <int kLatent, int kRows>
PodKernel describe() {
  using Shape = PodDecodeShape<kLatent, kRows>;
  return {reinterpret_cast<const void*>(&sm90_pod<kLatent, kRows>), kRows, kSharedAlignment + pod_data_bytes<kLatent, kRows>() + kPodControlBytes, Shape::kGroupChunks};
}

template <int kLatent>
PodKernel choose_rows(int rows) {
  return rows <= 16 ? describe<kLatent, 16>() : describe<kLatent, 32>();
}

}  // namespace

PodKernel sm90_pod_kernel(int latent, int rows) {
  switch (latent) {
    case 128: return choose_rows<128>(rows);
    case 256: return choose_rows<256>(rows);
    case 320: return choose_rows<320>(rows);
    case 512: return choose_rows<512>(rows);
    default: return {};
  }
}

}  // namespace tpla::cuda
