// Un-absorbed MLA prefill, head dims 192 (keys) / 128 (values), Hopper: persistent blocks that draw tiles until none is left.
#include <cuda_runtime.h>

#include <algorithm>

#include "mla_prefill_kernel.h"
#include "sm90_prefill.cuh"

namespace tpla::cuda {
namespace {

constexpr int kSharedBytes = 1024 + PrefillShape::kDataBytes + PrefillShape::kControlBytes;
static_assert(kSharedBytes <= 227 * 1024);

__global__ void __launch_bounds__(PrefillShape::kThreads, 1)
    sm90_prefill_192_128(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                         const __grid_constant__ CUtensorMap v_map, const __grid_constant__ PrefillArgs args) {
  extern __shared__ uint8_t shared_raw[];
  uint8_t* shared = shared_raw + ((1024 - (smem_address(shared_raw) & 1023)) & 1023);
  const PrefillShared s(shared, shared + PrefillShape::kDataBytes);
  if (threadIdx.x == 0) s.init();
  __syncthreads();

  if (threadIdx.x < 128) {
    registers_shrink<40>();
    if (threadIdx.x == 0) {
      load_prefill_tiles(args, {q_map, k_map, v_map}, s);
      // The last block to finish drawing resets the counter.
      if (atomicAdd(&args.counter[1], 1) == gridDim.x - 1) {
        args.counter[0] = 0;
        args.counter[1] = 0;
      }
    }
  } else {
    registers_grow<232>();
    compute_prefill_tiles(args, s);
  }
}

}  // namespace

PrefillTensorMaps sm90_prefill_maps(const MlaPrefill& call) {
  const auto map_of = [&](const void* base, int64_t tokens, int dim, int rows) {
    const uint64_t head_bytes = dim * 2, token_bytes = head_bytes * call.heads;
    return encode_tensor_map_4d(base, {64, static_cast<uint64_t>(std::max<int64_t>(tokens, 1)), static_cast<uint64_t>(dim / 64), static_cast<uint64_t>(call.heads)},
                                {token_bytes, 128, head_bytes}, {64, static_cast<uint32_t>(rows), static_cast<uint32_t>(dim / 64), 1});
  };
  return {map_of(call.q, call.q_tokens, kPrefillKeyDim, kPrefillRows), map_of(call.k, call.kv_tokens, kPrefillKeyDim, PrefillShape::kBlockKeys),
          map_of(call.v, call.kv_tokens, kPrefillValueDim, PrefillShape::kBlockKeys)};
}

void launch_sm90_prefill(const MlaPrefill& call, PrefillArgs args, Stream stream) {
  PrefillTensorMaps maps = sm90_prefill_maps(call);
  void* parameters[] = {&maps.q, &maps.k, &maps.v, &args};
  launch_cooperative(reinterpret_cast<const void*>(&sm90_prefill_192_128), current_device().multiprocessors, PrefillShape::kThreads, kSharedBytes, parameters, stream);
}

}  // namespace tpla::cuda
