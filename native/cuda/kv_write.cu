// Writes into paged KV: RMSNorm, rope and (optionally) fp8 conversion fused into the append; gather of tokens between pools.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention.h"
#include "device.h"
#include "e4m3.cuh"

namespace tpla::cuda {
namespace {

constexpr int kRope = 64;
constexpr int kMaxLatent = 512;
constexpr int kOctet = 8;  // values a lane takes at a time
constexpr int kWarpsPerBlock = 4;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(~0u, value, d);
  return value;
}

__device__ __forceinline__ void load_octet(const __nv_bfloat16* source, float (&values)[kOctet]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(source);
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&raw);
#pragma unroll
  for (int i = 0; i < kOctet / 2; ++i) {
    const float2 both = __bfloat1622float2(pairs[i]);
    values[2 * i] = both.x;
    values[2 * i + 1] = both.y;
  }
}

// One warp a token. The norm is that of the whole latent; the row holds the rank's own columns: the shared ones, then its slice. A lane takes
// eight of every 256 of either, so that 16 lanes have the columns of one fp8 scale.
__global__ void __launch_bounds__(kWarpsPerBlock * 32) append_kernel(const __grid_constant__ KvAppend call) {
  const int token = blockIdx.x * kWarpsPerBlock + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (token >= call.tokens) return;
  const int64_t slot = call.slots[token];
  if (slot < 0) return;
  const int width = call.shared_width + call.slice_width;
  uint8_t* row = static_cast<uint8_t*>(call.kv) + slot / call.page_size * call.page_stride + slot % call.page_size * kv_token_bytes(call.format, width);

  const __nv_bfloat16* latent = static_cast<const __nv_bfloat16*>(call.latent) + token * call.latent_stride;
  float values[kOctet];
  float inverse_rms = 1.0f;
  if (call.norm) {
    float squares = 0.0f;
    for (int column = lane * kOctet; column < call.latent_width; column += 32 * kOctet) {
      load_octet(latent + column, values);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) squares += values[i] * values[i];
    }
    inverse_rms = rsqrtf(warp_sum(squares) / call.latent_width + call.eps);
  }

  for (int first = 0; first < width; first += 32 * kOctet) {
    const int own = first + lane * kOctet;  // column of the row
    const bool kept = own < width;
    if (kept) {
      const int column = own < call.shared_width ? own : own - call.shared_width + call.slice_begin;
      load_octet(latent + column, values);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) values[i] *= inverse_rms * (call.norm_weight ? call.norm_weight[column + i] : 1.0f);
    }
    if (call.format == KvFormat::fp8) {
      const float scale = e4m3_scale_of(scale_group_amax(values, kept));
      if (!kept) continue;
      const uint2 codes = encode_e4m3(values, scale);
      reinterpret_cast<uint32_t*>(row + own)[0] = codes.x;  // rows of some widths are aligned to 4 bytes only
      reinterpret_cast<uint32_t*>(row + own)[1] = codes.y;
      if (lane % kScaleGroupLanes == 0) reinterpret_cast<float*>(row + width)[own / (kScaleGroupLanes * kOctet)] = scale;
    } else if (kept) {
      uint4 packed;
      __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
      for (int i = 0; i < kOctet / 2; ++i) pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
      *reinterpret_cast<uint4*>(row + own * 2) = packed;
    }
  }

  // Rope: lane i holds the pair i of 32. Interleaved pairs are (2i, 2i + 1), halves are (i, i + 32).
  const __nv_bfloat16* rope = static_cast<const __nv_bfloat16*>(call.rope) + token * call.rope_stride;
  const int first = call.interleaved ? 2 * lane : lane, second = call.interleaved ? 2 * lane + 1 : lane + 32;
  const float a = __bfloat162float(rope[first]), b = __bfloat162float(rope[second]);
  const float* angle = call.cos_sin + static_cast<int64_t>(call.positions[token]) * kRope;
  const float cosine = angle[lane], sine = angle[32 + lane];
  __nv_bfloat16* target = reinterpret_cast<__nv_bfloat16*>(row + kv_token_bytes(call.format, width) - kRope * 2);
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
  expect(call.shared_width >= 0 && call.shared_width % 32 == 0 && call.slice_begin >= 0 && call.slice_begin % 32 == 0 && call.slice_width > 0 && call.slice_width % 32 == 0,
         "shared columns and the slice must begin and end at multiples of 32; got " + std::to_string(call.shared_width) + ", " + std::to_string(call.slice_begin) + " + " +
             std::to_string(call.slice_width));
  expect(call.slice_begin >= call.shared_width && call.slice_begin + call.slice_width <= call.latent_width,
         "the slice must lie in the latent, behind the " + std::to_string(call.shared_width) + " shared columns; got " + std::to_string(call.slice_begin) + " + " +
             std::to_string(call.slice_width) + " of " + std::to_string(call.latent_width));
  if (call.tokens == 0) return;
  KvAppend filled = call;
  if (filled.page_stride == 0) filled.page_stride = static_cast<int64_t>(call.page_size) * kv_token_bytes(call.format, call.shared_width + call.slice_width);
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
