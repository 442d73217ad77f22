// Writes into paged KV: RMSNorm, rope and (optionally) fp8 conversion fused into the append; gather of tokens between pools.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "attention.h"
#include "device.h"

namespace tpla::cuda {
namespace {

constexpr int kRope = 64;
constexpr int kMaxLatent = 512;
constexpr int kScaleBlock = 128;  // values that share one fp32 scale in the fp8 layout
constexpr int kWarpsPerBlock = 4;
constexpr float kE4m3Max = 448.0f;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(~0u, value, d);
  return value;
}

// One warp a token. Lane l holds latent values 8l..8l+7 of every 256.
__global__ void __launch_bounds__(kWarpsPerBlock * 32) append_kernel(const __grid_constant__ KvAppend call) {
  const int token = blockIdx.x * kWarpsPerBlock + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (token >= call.tokens) return;
  const int64_t slot = call.slots[token];
  if (slot < 0) return;
  uint8_t* row = static_cast<uint8_t*>(call.kv) + slot / call.page_size * call.page_stride + slot % call.page_size * kv_token_bytes(call.format, call.slice_width);

  const __nv_bfloat16* latent = static_cast<const __nv_bfloat16*>(call.latent) + token * call.latent_stride;
  float values[2][8];
  float squares = 0.0f;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int column = part * 256 + lane * 8;
    if (column >= call.latent_width) continue;
    const uint4 raw = *reinterpret_cast<const uint4*>(latent + column);
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = __bfloat1622float2(pairs[i]);
      values[part][2 * i] = both.x;
      values[part][2 * i + 1] = both.y;
      squares += both.x * both.x + both.y * both.y;
    }
  }
  const float inverse_rms = call.norm ? rsqrtf(warp_sum(squares) / call.latent_width + call.eps) : 1.0f;

#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int column = part * 256 + lane * 8;
    const bool in_latent = column < call.latent_width;
    if (in_latent) {
#pragma unroll
      for (int i = 0; i < 8; ++i) values[part][i] *= inverse_rms * (call.norm_weight ? call.norm_weight[column + i] : 1.0f);
    }
    const int in_slice = column - call.slice_begin;
    const bool kept = in_latent && in_slice >= 0 && in_slice < call.slice_width;
    if (call.format == KvFormat::bf16) {
      if (!kept) continue;
      uint4 packed;
      __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(values[part][2 * i], values[part][2 * i + 1]);
      *reinterpret_cast<uint4*>(row + in_slice * 2) = packed;
    } else {
      // 16 lanes share a scale: the least power of two that brings their largest value into the range of e4m3.
      float largest = 0.0f;
      if (in_latent) {
#pragma unroll
        for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(values[part][i]));
      }
#pragma unroll
      for (int d = 8; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
      if (!kept) continue;
      const float scale = exp2f(ceilf(log2f(fmaxf(largest, 1e-20f) / kE4m3Max)));
      const float inverse = 1.0f / scale;
      uint2 packed;
      __nv_fp8x2_storage_t* pairs = reinterpret_cast<__nv_fp8x2_storage_t*>(&packed);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = __nv_cvt_float2_to_fp8x2(make_float2(values[part][2 * i] * inverse, values[part][2 * i + 1] * inverse), __NV_SATFINITE, __NV_E4M3);
      }
      reinterpret_cast<uint32_t*>(row + in_slice)[0] = packed.x;  // rows of some widths are aligned to 4 bytes only
      reinterpret_cast<uint32_t*>(row + in_slice)[1] = packed.y;
      if (in_slice % kScaleBlock == 0) *reinterpret_cast<float*>(row + call.slice_width + in_slice / kScaleBlock * 4) = scale;
    }
  }

  // Rope: lane i holds the pair i of 32. Interleaved pairs are (2i, 2i + 1), halves are (i, i + 32).
  const __nv_bfloat16* rope = static_cast<const __nv_bfloat16*>(call.rope) + token * call.rope_stride;
  const int first = call.interleaved ? 2 * lane : lane, second = call.interleaved ? 2 * lane + 1 : lane + 32;
  const float a = __bfloat162float(rope[first]), b = __bfloat162float(rope[second]);
  const float* angle = call.cos_sin + static_cast<int64_t>(call.positions[token]) * kRope;
  const float cosine = angle[lane], sine = angle[32 + lane];
  __nv_bfloat16* target = reinterpret_cast<__nv_bfloat16*>(row + kv_token_bytes(call.format, call.slice_width) - kRope * 2);
  target[first] = __float2bfloat16(a * cosine - b * sine);
  target[second] = __float2bfloat16(b * cosine + a * sine);
}

// Eight-byte words of token rows; every layout is a multiple of 4 bytes, those of the bf16 and 656-byte forms of 8 or 16.
template <class Word>
__global__ void gather_kernel(const __grid_constant__ KvGather call) {
  const int words = call.token_bytes / static_cast<int>(sizeof(Word));
  const int64_t total = static_cast<int64_t>(call.tokens) * words;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t token = i / words;
    const int64_t from = call.from_slots[token], to = call.to_slots[token];
    const uint8_t* source = static_cast<const uint8_t*>(call.from) + from / call.page_size * call.from_page_stride + from % call.page_size * call.token_bytes;
    uint8_t* target = static_cast<uint8_t*>(call.to) + to / call.page_size * call.to_page_stride + to % call.page_size * call.token_bytes;
    reinterpret_cast<Word*>(target)[i % words] = reinterpret_cast<const Word*>(source)[i % words];
  }
}

}  // namespace

void kv_append(const KvAppend& call, Stream stream) {
  const auto expect = [](bool ok, const std::string& message) {
    if (!ok) throw AttentionError("KV append: " + message);
  };
  expect(call.latent_width > 0 && call.latent_width <= kMaxLatent && call.latent_width % 128 == 0,
         "latent width must be a multiple of 128 up to 512; got " + std::to_string(call.latent_width));
  expect(call.slice_begin >= 0 && call.slice_begin % 64 == 0 && call.slice_width > 0 && call.slice_width % 64 == 0 && call.slice_begin + call.slice_width <= call.latent_width,
         "slice must lie in the latent and begin and end at multiples of 64; got " + std::to_string(call.slice_begin) + " + " + std::to_string(call.slice_width));
  expect(call.format == KvFormat::bf16 || (call.slice_begin % kScaleBlock == 0 && call.slice_width % kScaleBlock == 0),
         "an fp8 slice must begin and end at multiples of 128, the columns of one scale");
  if (call.tokens == 0) return;
  KvAppend filled = call;
  if (filled.page_stride == 0) filled.page_stride = static_cast<int64_t>(call.page_size) * kv_token_bytes(call.format, call.slice_width);
  void* parameters[] = {&filled};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(&append_kernel), dim3((call.tokens + kWarpsPerBlock - 1) / kWarpsPerBlock), dim3(kWarpsPerBlock * 32), parameters, 0, stream),
        "cudaLaunchKernel");
}

void kv_gather(const KvGather& call, Stream stream) {
  if (call.token_bytes <= 0 || call.token_bytes % 4) throw AttentionError("KV gather: token_bytes must be a positive multiple of 4; got " + std::to_string(call.token_bytes));
  if (call.tokens == 0) return;
  KvGather filled = call;
  if (filled.from_page_stride == 0) filled.from_page_stride = static_cast<int64_t>(call.page_size) * call.token_bytes;
  if (filled.to_page_stride == 0) filled.to_page_stride = static_cast<int64_t>(call.page_size) * call.token_bytes;
  const int64_t strides = filled.from_page_stride | filled.to_page_stride | call.token_bytes;
  const void* kernel = strides % 16 == 0  ? reinterpret_cast<const void*>(&gather_kernel<uint4>)
                       : strides % 8 == 0 ? reinterpret_cast<const void*>(&gather_kernel<uint2>)
                                          : reinterpret_cast<const void*>(&gather_kernel<uint32_t>);
  void* parameters[] = {&filled};
  check(cudaLaunchKernel(kernel, dim3(current_device().multiprocessors * 4), dim3(256), parameters, 0, stream), "cudaLaunchKernel");
}

}  // namespace tpla::cuda
