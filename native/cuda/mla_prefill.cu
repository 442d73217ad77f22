// MLA prefill: validation, choice of kernel, launch.
#include <algorithm>

#include "mla_prefill_kernel.h"

namespace tpla::cuda {

namespace {

constexpr double kLog2E = 1.4426950408889634;

bool runs_on_sm90(const MlaPrefill& call) {
  const Device& device = current_device();
  const std::string capability = std::to_string(device.major) + "." + std::to_string(device.minor);
  if (call.path == AttentionPath::sm90 && device.major != 9) throw AttentionError("the sm90 attention path needs a GPU of compute capability 9.0; this one is " + capability);
  if (device.major < 8) throw AttentionError("the attention kernels need compute capability 8.0 or newer; this GPU is " + capability);
  return device.major == 9 && call.path != AttentionPath::sm80;
}

}  // namespace

void validate_prefill(const MlaPrefill& call, const char* who) {
  const auto expect = [&](bool ok, const std::string& message) {
    if (!ok) throw AttentionError(std::string(who) + ": " + message);
  };
  expect(call.batch >= 0 && call.heads >= 1, "batch and heads must be positive; got " + std::to_string(call.batch) + " and " + std::to_string(call.heads));
  expect(call.key_dim == kPrefillKeyDim && call.value_dim == kPrefillValueDim,
         "head dims must be 192 (keys) and 128 (values); got " + std::to_string(call.key_dim) + " and " + std::to_string(call.value_dim));
  expect(call.workspace_bytes >= mla_prefill_workspace_bytes(call),
         "needs a workspace of " + std::to_string(mla_prefill_workspace_bytes(call)) + " bytes; got " + std::to_string(call.workspace_bytes));
  expect(call.softmax_scale > 0.0f, "softmax_scale must be positive");
  expect((call.k_token_stride | call.k_head_stride | call.v_token_stride | call.v_head_stride | call.k_rope_stride) % 8 == 0, "strides must be multiples of 8 values");
}

PrefillArgs prefill_args(const MlaPrefill& call) {
  PrefillArgs args{};
  args.q = static_cast<const __nv_bfloat16*>(call.q);
  args.k = static_cast<const __nv_bfloat16*>(call.k);
  args.v = static_cast<const __nv_bfloat16*>(call.v);
  const int own_keys = call.k_rope ? kPrefillKeyDim - kPrefillRopeDim : kPrefillKeyDim;  // columns of k
  args.k_head = call.k_head_stride ? call.k_head_stride : own_keys;
  args.k_token = call.k_token_stride ? call.k_token_stride : static_cast<int64_t>(call.heads) * own_keys;
  args.v_head = call.v_head_stride ? call.v_head_stride : kPrefillValueDim;
  args.v_token = call.v_token_stride ? call.v_token_stride : static_cast<int64_t>(call.heads) * kPrefillValueDim;
  args.k_rope = call.k_rope ? static_cast<const __nv_bfloat16*>(call.k_rope) : args.k + kPrefillKeyDim - kPrefillRopeDim;
  args.k_rope_token = !call.k_rope ? args.k_token : call.k_rope_stride ? call.k_rope_stride : kPrefillRopeDim;
  args.k_rope_head = call.k_rope ? 0 : args.k_head;
  args.q_indptr = call.q_indptr;
  args.kv_indptr = call.kv_indptr;
  args.out = static_cast<__nv_bfloat16*>(call.out);
  args.lse = call.lse;
  args.scale_log2 = static_cast<float>(call.softmax_scale * kLog2E);
  args.batch = call.batch;
  args.heads = call.heads;
  args.row_blocks = (call.max_q_tokens + kPrefillRows - 1) / kPrefillRows;
  constexpr int64_t kL2Share = 24 << 20;
  const int64_t head_bytes = static_cast<int64_t>(std::max(call.max_kv_tokens, 1)) * (kPrefillKeyDim + kPrefillValueDim) * 2;
  args.heads_per_group = static_cast<int>(std::clamp<int64_t>(kL2Share / head_bytes, 1, call.heads));
  args.causal = call.causal;
  args.counter = static_cast<int*>(call.workspace);
  return args;
}

AttentionPath mla_prefill_path(const MlaPrefill& call) { return runs_on_sm90(call) ? AttentionPath::sm90 : AttentionPath::sm80; }

size_t mla_prefill_workspace_bytes(const MlaPrefill&) { return 256; }

void mla_prefill(const MlaPrefill& call, Stream stream) {
  validate_prefill(call, "MLA prefill");
  const bool sm90 = runs_on_sm90(call);
  if (call.batch == 0 || call.q_tokens == 0) return;
  if (sm90) launch_sm90_prefill(call, prefill_args(call), stream);
  else launch_sm80_prefill(prefill_args(call), stream);
}

}  // namespace tpla::cuda
