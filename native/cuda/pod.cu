// Fused prefill+decode: what can be fused, workspace, launch; and the two launches where it cannot.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "decode_plan.h"
#include "device.h"
#include "mla_prefill_kernel.h"
#include "pod_kernel.h"
#include "sm90_pod_split.cuh"

namespace tpla::cuda {
namespace {

constexpr int kMostRowTiles = 1;  // with two, each multiprocessor reads every token twice: measured slower than two launches

// Workspace: counters, arrivals of decode, then either the partial results of the one launch, or the two workspaces of two launches, whose
// parts that must stay zero lie outside of the partial results.
constexpr size_t kArrivals = 4096;
constexpr size_t kPrefillWorkspace = kArrivals + kMostSequences * kMostRowTiles * sizeof(int);
constexpr size_t kDecodeWorkspace = kPrefillWorkspace + 4096;
constexpr size_t kPartials = kDecodeWorkspace + 4096;

struct PodPlan {
  PodKernel kernel;
  int row_tiles;
  size_t partial_out_bytes;
  size_t partial_sum_bytes;
};

PodPlan plan(const MlaDecode& call) {
  const int rows = call.heads * call.q_tokens;
  PodPlan result{};
  result.kernel = sm90_pod_kernel(call.latent, rows);
  if (!result.kernel.function) return result;
  result.row_tiles = (rows + result.kernel.block_rows - 1) / result.kernel.block_rows;
  const size_t rows_of_parts = static_cast<size_t>(kItems + call.batch) * result.row_tiles * result.kernel.block_rows;
  result.partial_out_bytes = rows_of_parts * call.latent * sizeof(float);
  result.partial_sum_bytes = rows_of_parts * sizeof(float2);
  return result;
}

// Measured on an H100 at its power limit, both kinds at the same time.
PodCosts costs_of(const MlaDecode& call) {
  constexpr float kBytesPerNanosecond = 3700.0f;  // of all multiprocessors that decode
  constexpr float kMargin = 1.08f;                // decode that ends last, on few multiprocessors, costs more than decode that ends first
  const int chunks = call.latent / 64 + 1;
  PodCosts costs{};
  costs.prefill_block = 2100.0f;
  costs.prefill_tile = 3700.0f;
  costs.decode_tile = kMargin * (call.heads * call.q_tokens > 16 ? 160.0f : 125.0f) * chunks;
  costs.decode_neighbour = kMargin * chunks * 128 * kTokenTile / kBytesPerNanosecond;
  return costs;
}

}  // namespace

std::string pod_unfused_reason(const PodBatch& batch) {
  const MlaDecode& decode = batch.decode;
  const Device& device = current_device();
  if (batch.prefill.batch == 0 || batch.prefill.q_tokens == 0) return "there is nothing to prefill";
  if (decode.batch == 0) return "there is nothing to decode";
  if (device.major != 9) return "only GPUs of compute capability 9.0 have the fused kernel; this one is " + std::to_string(device.major) + "." + std::to_string(device.minor);
  if (batch.prefill.path == AttentionPath::sm80 || decode.path == AttentionPath::sm80) return "the sm80 path was asked for";
  if (decode.format != KvFormat::bf16) return "the fused kernel reads bf16 KV";
  if (decode.variants.any()) return "the fused kernel has no softcap, window, bias or block mask";
  if (decode.batch > kMostSequences) return "the fused kernel takes " + std::to_string(kMostSequences) + " decode sequences, not " + std::to_string(decode.batch);
  const PodPlan pod = plan(decode);
  if (!pod.kernel.function) return "the fused kernel takes latents of 128, 256, 320 and 512, not " + std::to_string(decode.latent);
  if (pod.row_tiles > kMostRowTiles) {
    return "the fused kernel takes " + std::to_string(kMostRowTiles * pod.kernel.block_rows) + " decode rows (heads × q_tokens) a sequence, not " + std::to_string(decode.heads * decode.q_tokens);
  }
  return "";
}

size_t pod_workspace_bytes(const PodBatch& batch) {
  if (!pod_unfused_reason(batch).empty()) return kDecodeWorkspace + (batch.decode.batch > 0 ? mla_decode_workspace_bytes(batch.decode) : 0);
  const PodPlan pod = plan(batch.decode);
  return kPartials + align_up(pod.partial_out_bytes) + align_up(pod.partial_sum_bytes);
}

void pod(const PodBatch& batch, Stream stream) {
  if (batch.workspace_bytes < pod_workspace_bytes(batch)) {
    throw AttentionError("fused prefill+decode needs a workspace of " + std::to_string(pod_workspace_bytes(batch)) + " bytes; got " + std::to_string(batch.workspace_bytes));
  }
  uint8_t* workspace = static_cast<uint8_t*>(batch.workspace);
  MlaPrefill prefill = batch.prefill;
  prefill.workspace = workspace + kPrefillWorkspace;
  prefill.workspace_bytes = kDecodeWorkspace - kPrefillWorkspace;
  MlaDecode decode = batch.decode;
  if (!pod_unfused_reason(batch).empty()) {
    decode.workspace = workspace + kDecodeWorkspace;
    decode.workspace_bytes = batch.workspace_bytes - kDecodeWorkspace;
    mla_prefill(prefill, stream);
    mla_decode(decode, stream);
    return;
  }
  validate_prefill(prefill, "MLA prefill");
  mla_decode_workspace_bytes(decode);  // refuses what no decode kernel takes
  const PodPlan pod = plan(decode);

  PrefillArgs prefill_arguments = prefill_args(prefill);
  prefill_arguments.counter = reinterpret_cast<int*>(workspace);
  PrefillTensorMaps maps = sm90_prefill_maps(prefill, prefill_arguments);

  const int width = decode.latent + decode.rope;
  const int64_t row_bytes = width * 2;
  MlaDecodeArgs args = mla_decode_args(decode);
  args.row_tiles = pod.row_tiles;
  args.stacked = 1;
  args.arrivals = reinterpret_cast<int*>(workspace + kArrivals);
  args.partial_out = reinterpret_cast<float*>(workspace + kPartials);
  args.partial_sum = reinterpret_cast<float2*>(workspace + kPartials + align_up(pod.partial_out_bytes));
  const uint32_t chunks = args.box_tokens == kTokenTile ? pod.kernel.box_chunks : 1;
  CUtensorMap kv_map = encode_tensor_map_4d(decode.kv, {64, static_cast<uint64_t>(decode.page_size), static_cast<uint64_t>(width / 64), static_cast<uint64_t>(decode.num_pages)},
                                            {static_cast<uint64_t>(row_bytes), 128, static_cast<uint64_t>(args.page_stride)}, {64, static_cast<uint32_t>(args.box_tokens), chunks, 1});

  const int multiprocessors = current_device().multiprocessors;
  PodCosts costs = costs_of(decode);
  costs.decode_first = std::clamp(batch.decode_multiprocessors, 0, multiprocessors);
  void* parameters[] = {&maps.q, &maps.k, &maps.k_rope, &maps.v, &kv_map, &prefill_arguments, &args, &costs};
  launch_cooperative(pod.kernel.function, multiprocessors, 384, pod.kernel.shared_bytes, parameters, stream);
}

}  // namespace tpla::cuda
