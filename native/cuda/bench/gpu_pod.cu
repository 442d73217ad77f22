#include "cuda/bench/gpu_pod.h"

#include <algorithm>
#include <numeric>

#include "cuda/attention.h"
#include "cuda/bench/gpu_decode.h"
#include "cuda/bench/gpu_prefill.h"

namespace tpla::bench {

namespace {

// Enough to say whether the shape runs fused.
cuda::PodBatch sizes_of(const PodShape& shape) {
  cuda::PodBatch batch;
  batch.decode = decode_sizes(shape.decode);
  batch.prefill = prefill_sizes(shape.prefill);
  batch.prefill.batch = static_cast<int>(shape.prefill.q_lens.size());
  batch.prefill.q_tokens = std::accumulate(shape.prefill.q_lens.begin(), shape.prefill.q_lens.end(), int64_t{0});
  return batch;
}

class GpuPod : public GpuPodProblem {
 public:
  GpuPod(const PodShape& shape, uint64_t seed, bool timed)
      : kernel_(gpu_kernel_for(shape)), decode_(make_gpu_decode(shape.decode, seed, timed)), prefill_(make_gpu_prefill(shape.prefill, seed + 1, timed)) {
    batch_.decode_multiprocessors = shape.decode_multiprocessors;
    batch_ = batch(0);
    batch_.workspace_bytes = cuda::pod_workspace_bytes(batch_);
    workspace_ = DeviceBuffer<uint8_t>(batch_.workspace_bytes);
    workspace_.fill_bytes(0, nullptr);
    gpu_check(cudaDeviceSynchronize(), "drawing a fused problem");
    batch_.workspace = workspace_.data();
  }

  std::string kernel() const override { return kernel_; }
  int sets() const override { return std::max(decode_->sets(), prefill_->sets()); }
  std::vector<DeviceBuffer<uint8_t>*> outputs() override { return {decode_->outputs()[0], prefill_->outputs()[0]}; }
  void run_serially() override { serially_ = true; }
  void run_fused(int decode_multiprocessors) override {
    serially_ = false;
    batch_.decode_multiprocessors = decode_multiprocessors;
  }

  void launch(int set, cudaStream_t stream) override {
    if (!serially_) {
      cuda::pod(batch(set), stream);
    } else {
      prefill_->launch(set % prefill_->sets(), stream);
      decode_->launch(set % decode_->sets(), stream);
    }
  }

  void set_lengths_to_zero(bool zero, cudaStream_t stream) override {
    decode_->set_lengths_to_zero(zero, stream);
    prefill_->set_lengths_to_zero(zero, stream);
  }

  Check compare_on_gpu(GpuStream& stream) override { return worse_of(decode_->compare_on_gpu(stream), prefill_->compare_on_gpu(stream)); }
  Check compare_on_host() override { return worse_of(decode_->compare_on_host(), prefill_->compare_on_host()); }

 private:
  cuda::PodBatch batch(int set) const {
    cuda::PodBatch batch = batch_;
    batch.prefill = prefill_->call(set % prefill_->sets());
    batch.decode = decode_->call(set % decode_->sets());
    return batch;
  }

  const std::string kernel_;
  std::unique_ptr<GpuDecodeProblem> decode_;
  std::unique_ptr<GpuPrefillProblem> prefill_;
  DeviceBuffer<uint8_t> workspace_;
  cuda::PodBatch batch_;
  bool serially_ = false;
};

}  // namespace

std::string gpu_kernel_for(const PodShape& shape) {
  const std::string prefill = gpu_kernel_for(shape.prefill), decode = gpu_kernel_for(shape.decode);
  const std::string reason = cuda::pod_unfused_reason(sizes_of(shape));
  return reason.empty() ? "sm90 fused" : prefill + ", " + decode;
}

std::unique_ptr<GpuPodProblem> make_gpu_pod(const PodShape& shape, uint64_t seed, bool timed) { return std::make_unique<GpuPod>(shape, seed, timed); }

}  // namespace tpla::bench
