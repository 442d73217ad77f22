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
                         const __grid_constant__ CUtensorMap k_rope_map, const __grid_constant__ CUtensorMap v_map, const __grid_constant__ PrefillArgs args) {
  extern __shared__ uint8_t shared_raw[];
  uint8_t* shared = shared_raw + ((1024 - (smem_address(shared_raw) & 1023)) & 1023);
  const PrefillShared s(shared, shared + PrefillShape::kDataBytes);
  if (threadIdx.x == 0) s.init();
  __syncthreads();

  if (threadIdx.x < 128) {
    registers_shrink<40>();
    if (threadIdx.x == 0) {
      load_prefill_tiles(args, {q_map, k_map, k_rope_map, v_map}, s);
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

PrefillTensorMaps sm90_prefill_maps(const MlaPrefill& call, const PrefillArgs& args) {
  // [head][chunk of 64 columns][token][column]; strides in values.
  const auto map_of = [&](const void* base, int64_t tokens, int64_t token_stride, int64_t head_stride, int heads, int columns, int rows) {
    return encode_tensor_map_4d(base, {64, static_cast<uint64_t>(std::max<int64_t>(tokens, 1)), static_cast<uint64_t>(columns / 64), static_cast<uint64_t>(heads)},
                                {static_cast<uint64_t>(token_stride * 2), 128, static_cast<uint64_t>(head_stride * 2)},
                                {64, static_cast<uint32_t>(rows), static_cast<uint32_t>(columns / 64), 1});
  };
  constexpr int kKeys = PrefillShape::kBlockKeys;
  const bool rope_is_shared = args.k_rope_head == 0;
  return {map_of(args.q, call.q_tokens, static_cast<int64_t>(call.heads) * kPrefillKeyDim, kPrefillKeyDim, call.heads, kPrefillKeyDim, kPrefillRows),
          map_of(args.k, call.kv_tokens, args.k_token, args.k_head, call.heads, kPrefillKeyDim - kPrefillRopeDim, kKeys),
          map_of(args.k_rope, call.kv_tokens, args.k_rope_token, rope_is_shared ? kPrefillRopeDim : args.k_rope_head, rope_is_shared ? 1 : call.heads, kPrefillRopeDim, kKeys),
          map_of(args.v, call.kv_tokens, args.v_token, args.v_head, call.heads, kPrefillValueDim, kKeys)};
}

void launch_sm90_prefill(const MlaPrefill& call, PrefillArgs args, Stream stream) {
  PrefillTensorMaps maps = sm90_prefill_maps(call, args);
  void* parameters[] = {&maps.q, &maps.k, &maps.k_rope, &maps.v, &args};
  launch_cooperative(reinterpret_cast<const void*>(&sm90_prefill_192_128), current_device().multiprocessors, PrefillShape::kThreads, kSharedBytes, parameters, stream);
}

}  // namespace tpla::cuda
