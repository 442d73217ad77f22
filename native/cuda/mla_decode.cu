// MLA decode: validation, choice of kernel, tensor map, launch.
#include "attention.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "decode_logits.h"
#include "decode_plan.h"
#include "device.h"
#include "mla_decode_args.h"
#include "mla_decode_kernel.h"

namespace tpla::cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// Rows of a sequence that are computed side by side, by blocks that read the same tokens. A chunk of more is scheduled row tile by row tile: that
// leaves no multiprocessor without work whatever their number, and skips what comes after a row tile's last query token.
constexpr int kMostRows = 2048;

DecodeKernel choose_kernel(const MlaDecode& call, const Device& device) {
  const int rows = call.heads * call.q_tokens;
  const LogitKind logits = call.variants.any() ? LogitKind::variant : rows > kMostRows ? LogitKind::chunk : LogitKind::plain;
  const bool sm90 = device.major == 9 && call.path != AttentionPath::sm80;
  if (call.path == AttentionPath::sm90 && device.major != 9) {
    throw AttentionError("the sm90 attention path needs a GPU of compute capability 9.0; this one is " + std::to_string(device.major) + "." +
                         std::to_string(device.minor));
  }
  DecodeKernel kernel;
  if (!sm90) {
    if (device.major < 8) {
      throw AttentionError("the attention kernels need compute capability 8.0 or newer; this GPU is " + std::to_string(device.major) + "." + std::to_string(device.minor));
    }
    kernel = sm80_mla_decode_kernel(call.latent, call.format, logits);
  } else if (call.format == KvFormat::fp8) {
    kernel = sm90_mla_decode_fp8_kernel(call.latent, rows, logits);
  } else if (rows <= 32) {
    kernel = sm90_mla_decode_narrow_kernel(call.latent, rows, logits);
  } else if (call.latent == 512) {
    kernel = sm90_mla_decode_shared_kernel(call.latent, rows, logits);
  } else {
    kernel = sm90_mla_decode_tile_kernel(call.latent, rows, logits);
  }
  if (!kernel.function && call.format == KvFormat::fp8) {
    throw AttentionError("MLA decode over fp8 KV has kernels for latents of 128, 256, 288 (compute capability 9.0 only), 320 and 512; got " + std::to_string(call.latent));
  }
  if (!kernel.function) {
    throw AttentionError("MLA decode has kernels for latents of 128, 256, 288 (compute capability 9.0 only), 320 and 512; got " + std::to_string(call.latent));
  }
  return kernel;
}

void validate(const MlaDecode& call) {
  const auto expect = [](bool ok, const std::string& message) {
    if (!ok) throw AttentionError("MLA decode: " + message);
  };
  expect(call.batch >= 0 && call.heads >= 1 && call.q_tokens >= 1,
         "batch, heads and q_tokens must be positive; got " + std::to_string(call.batch) + ", " + std::to_string(call.heads) + ", " + std::to_string(call.q_tokens));
  expect(call.rope == 64, "rope must be 64; got " + std::to_string(call.rope));
  expect(call.page_size >= 16 && call.page_size % 16 == 0 && call.page_size <= 1024,
         "page_size must be a multiple of 16 from 16 to 1024; got " + std::to_string(call.page_size));
  expect(call.page_stride % 16 == 0 && reinterpret_cast<uintptr_t>(call.kv) % 16 == 0, "pages must begin at multiples of 16 bytes");
  expect(reinterpret_cast<uintptr_t>(call.out) % 16 == 0, "out must begin at a multiple of 16 bytes");
  expect(call.softmax_scale > 0.0f, "softmax_scale must be positive");
  validate_variants(call.variants, "MLA decode");
}

DecodePlan plan(const MlaDecode& call) {
  validate(call);
  const Device& device = current_device();
  const DecodeKernel kernel = choose_kernel(call, device);
  const int rows = call.heads * call.q_tokens;
  return DecodePlan(kernel, rows, device.multiprocessors * kernel.blocks_per_multiprocessor, call.latent, std::max(kMostRows / kernel.block_rows, 1));
}

}  // namespace

size_t mla_decode_workspace_bytes(const MlaDecode& call) { return plan(call).workspace_bytes(); }

MlaDecodeArgs mla_decode_args(const MlaDecode& call) {
  MlaDecodeArgs args{};
  args.q = call.q;
  args.kv = call.kv;
  args.block_table = call.block_table;
  args.kv_lens = call.kv_lens;
  args.q_indptr = call.q_indptr;
  args.out = call.out;
  args.lse = call.lse;
  args.latent_scale = call.latent_scale;
  args.softmax_scale_log2 = static_cast<float>(call.softmax_scale * kLog2E);
  args.batch = call.batch;
  args.heads = call.heads;
  args.q_tokens = call.q_tokens;
  args.page_size = call.page_size;
  args.box_tokens = box_tokens(call.variants, call.page_size);
  args.num_pages = call.num_pages;
  args.page_stride = call.page_stride ? call.page_stride : call.page_size * static_cast<int64_t>(kv_token_bytes(call.format, call.latent));
  args.block_table_stride = call.block_table_stride;
  args.causal = call.causal;
  return args;
}

void mla_decode(const MlaDecode& call, Stream stream) {
  if (call.batch == 0) return;
  const DecodePlan decode = plan(call);
  if (call.workspace_bytes < decode.workspace_bytes()) {
    throw AttentionError("MLA decode needs a workspace of " + std::to_string(decode.workspace_bytes()) + " bytes; got " + std::to_string(call.workspace_bytes));
  }
  const int width = call.latent + call.rope;
  const int64_t token_bytes = kv_token_bytes(call.format, call.latent);

  MlaDecodeArgs args = mla_decode_args(call);
  args.logits = logit_args(call.variants, call.softmax_scale);
  decode.bind(args, call.workspace);

  // [page][chunk of 64 columns][token][column]; a box holds box_tokens tokens of some chunks.
  const auto encode = [&](int box_chunks) {
    return encode_tensor_map_4d(call.kv, {64, static_cast<uint64_t>(call.page_size), static_cast<uint64_t>((width + 63) / 64), static_cast<uint64_t>(call.num_pages)},
                                {static_cast<uint64_t>(token_bytes), 128, static_cast<uint64_t>(args.page_stride)},
                                {64, static_cast<uint32_t>(args.box_tokens), static_cast<uint32_t>(box_chunks), 1});
  };
  CUtensorMap chunk_map, run_map;
  void* parameters[3];
  int count = 0;
  if (decode.kernel.tensor_map) {
    chunk_map = encode(1);
    parameters[count++] = &chunk_map;
  }
  if (decode.kernel.run_chunks > 0) {
    run_map = encode(decode.kernel.run_chunks);
    parameters[count++] = &run_map;
  }
  parameters[count++] = &args;
  launch_cooperative(decode.kernel.function, decode.grid(), decode.kernel.threads, decode.kernel.shared_bytes, parameters, stream);
}

}  // namespace tpla::cuda
