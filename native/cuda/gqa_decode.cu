// GQA decode: validation, choice of kernel, launch.
#include "attention.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "decode_logits.h"
#include "decode_plan.h"
#include "device.h"
#include "gqa_decode_args.h"
#include "gqa_decode_kernel.h"

namespace tpla::cuda {
namespace {

constexpr int kMostBlocks = kArrivalBytes / sizeof(int);
constexpr int kRun = 16;                // tokens the kernels load from one page without looking
constexpr double kLog2E = 1.4426950408889634;

void validate(const GqaDecode& call, const Device& device) {
  const auto expect = [](bool ok, const std::string& message) {
    if (!ok) throw AttentionError("GQA decode: " + message);
  };
  expect(device.major >= 8, "the kernels need compute capability 8.0 or newer; this GPU is " + std::to_string(device.major) + "." + std::to_string(device.minor));
  expect(call.path != AttentionPath::sm90, "there is one kernel, sm80, for all GPUs; use path auto or sm80");
  expect(call.batch >= 0 && call.heads >= 1 && call.kv_heads >= 1 && call.q_tokens >= 1,
         "batch, heads, kv_heads and q_tokens must be positive; got " + std::to_string(call.batch) + ", " + std::to_string(call.heads) + ", " +
             std::to_string(call.kv_heads) + ", " + std::to_string(call.q_tokens));
  expect(call.heads % call.kv_heads == 0, "heads must be a multiple of kv_heads; got " + std::to_string(call.heads) + " and " + std::to_string(call.kv_heads));
  expect(call.head_dim == 64 || call.head_dim == 128, "head_dim must be 64 or 128; got " + std::to_string(call.head_dim));
  expect(call.page_size >= kRun && call.page_size % kRun == 0, "page_size must be a multiple of 16; got " + std::to_string(call.page_size));
  expect(call.page_stride % 16 == 0 && call.token_stride % 16 == 0 && call.head_stride % 16 == 0, "strides must be multiples of 16 bytes");
  expect(call.softmax_scale > 0.0f, "softmax_scale must be positive");
  validate_variants(call.variants, "GQA decode");
}

DecodePlan plan(const GqaDecode& call) {
  const Device& device = current_device();
  validate(call, device);
  const int rows = call.heads / call.kv_heads * call.q_tokens;
  const DecodeKernel kernel = sm80_gqa_decode_kernel(call.head_dim, rows, call.variants.any() ? LogitKind::variant : LogitKind::plain);
  const int resident = resident_blocks(kernel.function, kernel.threads, kernel.shared_bytes);
  if (resident == 0) throw AttentionError("GQA decode: this GPU has less than the " + std::to_string(kernel.shared_bytes) + " bytes of shared memory a block needs");
  const int blocks = std::min(device.multiprocessors * resident, kMostBlocks);
  const DecodePlan result(kernel, rows, blocks, call.head_dim, rows);
  if (result.row_tiles > blocks) {
    throw AttentionError("GQA decode takes at most " + std::to_string(blocks * kernel.block_rows) +
                         " query rows (heads of a KV head × q_tokens) a sequence on this GPU; got " + std::to_string(rows));
  }
  return result;
}

}  // namespace

size_t gqa_decode_workspace_bytes(const GqaDecode& call) { return plan(call).workspace_bytes(); }

void gqa_decode(const GqaDecode& call, Stream stream) {
  if (call.batch == 0) return;
  const DecodePlan decode = plan(call);
  if (call.workspace_bytes < decode.workspace_bytes()) {
    throw AttentionError("GQA decode needs a workspace of " + std::to_string(decode.workspace_bytes()) + " bytes; got " + std::to_string(call.workspace_bytes));
  }
  GqaDecodeArgs args{};
  args.q = call.q;
  args.k = call.k;
  args.v = call.v;
  args.block_table = call.block_table;
  args.kv_lens = call.kv_lens;
  args.q_indptr = call.q_indptr;
  args.out = call.out;
  args.lse = call.lse;
  args.softmax_scale_log2 = static_cast<float>(call.softmax_scale * kLog2E);
  args.batch = call.batch * call.kv_heads;
  args.heads = call.heads / call.kv_heads;
  args.kv_heads = call.kv_heads;
  args.q_tokens = call.q_tokens;
  args.page_size = call.page_size;
  args.box_tokens = kRun;
  args.head_stride = call.head_stride ? call.head_stride : call.head_dim * 2;
  args.token_stride = call.token_stride ? call.token_stride : static_cast<int64_t>(call.kv_heads) * call.head_dim * 2;
  args.page_stride = call.page_stride ? call.page_stride : static_cast<int64_t>(call.page_size) * call.kv_heads * call.head_dim * 2;
  args.block_table_stride = call.block_table_stride;
  args.causal = call.causal;
  args.logits = logit_args(call.variants, call.softmax_scale);
  decode.bind(args, call.workspace);
  void* parameters[] = {&args};
  launch_cooperative(decode.kernel.function, decode.grid(), decode.kernel.threads, decode.kernel.shared_bytes, parameters, stream);
}

}  // namespace tpla::cuda
