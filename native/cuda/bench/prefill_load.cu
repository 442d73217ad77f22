#include "cuda/bench/prefill_load.h"

#include <cuda_bf16.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda/attention.h"
#include "cuda/bench/gpu_tensors.h"

namespace tpla::bench {

namespace {

constexpr int kKeyDim = 192;
constexpr int kValueDim = 128;

DeviceBuffer<__nv_bfloat16> random_values(size_t count, uint64_t seed, cudaStream_t stream) {
  DeviceBuffer<__nv_bfloat16> buffer(count);
  draw_normals(buffer.data(), count, 1.0f, seed, stream);
  return buffer;
}

}  // namespace

// No GpuSession: other streams of the process are meant to work at the same time.
struct PrefillLoad::State {
  State(int on, int tokens, int heads) : device(on) {
    gpu_check(cudaSetDevice(device), "cudaSetDevice");
    stream = std::make_unique<GpuStream>();
    const size_t rows = size_t(tokens) * heads;
    q = random_values(rows * kKeyDim, 1, stream->get());
    k = random_values(rows * kKeyDim, 2, stream->get());
    v = random_values(rows * kValueDim, 3, stream->get());
    out = DeviceBuffer<__nv_bfloat16>(rows * kValueDim);
    indptr = DeviceBuffer<int32_t>(std::vector<int32_t>{0, tokens});
    call.q = q.data();
    call.k = k.data();
    call.v = v.data();
    call.out = out.data();
    call.q_indptr = call.kv_indptr = indptr.data();
    call.softmax_scale = 1 / std::sqrt(float(kKeyDim));
    call.batch = 1;
    call.heads = heads;
    call.key_dim = kKeyDim;
    call.value_dim = kValueDim;
    call.q_tokens = call.kv_tokens = call.max_q_tokens = call.max_kv_tokens = tokens;
    workspace = DeviceBuffer<std::byte>(cuda::mla_prefill_workspace_bytes(call));
    workspace.fill_bytes(0, stream->get());
    call.workspace = workspace.data();
    call.workspace_bytes = workspace.bytes();
    stream->finish("preparing prefill");
  }

  const int device;
  std::unique_ptr<GpuStream> stream;
  DeviceBuffer<__nv_bfloat16> q, k, v, out;
  DeviceBuffer<int32_t> indptr;
  DeviceBuffer<std::byte> workspace;
  cuda::MlaPrefill call;
};

PrefillLoad::PrefillLoad(int device, int tokens, int heads) : state_(std::make_shared<State>(device, tokens, heads)) {}
PrefillLoad::~PrefillLoad() = default;

std::function<void()> PrefillLoad::compute(int layers) {
  gpu_check(cudaSetDevice(state_->device), "cudaSetDevice");
  for (int layer = 0; layer < layers; layer++) {
    try {
      cuda::mla_prefill(state_->call, state_->stream->get());
    } catch (const cuda::AttentionError& error) {
      throw Error("REQUEST_INVALID", std::string("prefill attention: ") + error.what());
    }
  }
  const auto done = std::make_shared<GpuEvent>();
  done->record(state_->stream->get());
  return [state = state_, done] {
    gpu_check(cudaSetDevice(state->device), "cudaSetDevice");
    gpu_check(cudaEventSynchronize(done->get()), "prefill");
  };
}

}  // namespace tpla::bench
