#include "cuda/bench/gpu_attention.h"

#include <memory>

#include "core/error.h"
#include "cuda/attention.h"
#include "cuda/bench/gpu.h"
#include "cuda/bench/gpu_chunk.h"
#include "cuda/bench/gpu_decode.h"
#include "cuda/bench/gpu_gqa.h"
#include "cuda/bench/gpu_pod.h"
#include "cuda/bench/gpu_prefill.h"
#include "cuda/bench/gpu_rates.h"

namespace tpla::bench {

namespace {

// The kernels' own error says both "not this shape" and "the driver refused"; only the second leaves a trace in the runtime.
template <class Body>
auto with_gpu(int device, Body&& body) {
  const GpuSession session(device);
  try {
    return body();
  } catch (const cuda::AttentionError& error) {
    throw Error(cudaGetLastError() == cudaSuccess ? "REQUEST_INVALID" : "GPU_FAILED", error.what());
  }
}

std::unique_ptr<GpuProblem> make_problem(const DecodeShape& shape, const RunOptions& options) { return make_gpu_decode(shape, options.seed, options.runs > 0); }
std::unique_ptr<GpuProblem> make_problem(const GqaShape& shape, const RunOptions& options) { return make_gpu_gqa(shape, options.seed, options.runs > 0); }
std::unique_ptr<GpuProblem> make_problem(const PrefillShape& shape, const RunOptions& options) { return make_gpu_prefill(shape, options.seed, options.runs > 0); }

template <class Shape>
Outcome run(int device, const Shape& shape, const RunOptions& options) {
  return with_gpu(device, [&] { return run_problem(*make_problem(shape, options), options); });
}

}  // namespace

GpuDescription describe_gpu(int device) {
  return with_gpu(device, [&] {
    cudaDeviceProp properties;
    gpu_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      if (cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) cudaGetLastError();
      return value;
    };
    GpuDescription gpu;
    gpu.name = properties.name;
    gpu.capability = std::to_string(properties.major) + "." + std::to_string(properties.minor);
    gpu.multiprocessors = properties.multiProcessorCount;
    gpu.l2_bytes = static_cast<size_t>(properties.l2CacheSize);
    gpu.memory_bytes = properties.totalGlobalMem;
    gpu.sm_clock_hz = attribute(cudaDevAttrClockRate) * 1e3;
    gpu.memory_clock_hz = attribute(cudaDevAttrMemoryClockRate) * 1e3;
    return gpu;
  });
}

Rates measure_gpu(int device) {
  return with_gpu(device, [] { return gpu_rates(); });
}

std::string plan_on_gpu(int device, const DecodeShape& shape) {
  return with_gpu(device, [&] { return gpu_kernel_for(shape); });
}

std::string plan_on_gpu(int device, const GqaShape& shape) {
  return with_gpu(device, [&] { return gpu_kernel_for(shape); });
}

std::string plan_on_gpu(int device, const PrefillShape& shape) {
  return with_gpu(device, [&] { return gpu_kernel_for(shape); });
}

std::string plan_on_gpu(int device, const ChunkShape& shape) {
  return with_gpu(device, [&] { return gpu_kernel_for(shape); });
}

std::string plan_on_gpu(int device, const PodShape& shape) {
  return with_gpu(device, [&] { return gpu_kernel_for(shape); });
}

Outcome run_on_gpu(int device, const DecodeShape& shape, const RunOptions& options) { return run(device, shape, options); }
Outcome run_on_gpu(int device, const GqaShape& shape, const RunOptions& options) { return run(device, shape, options); }
Outcome run_on_gpu(int device, const PrefillShape& shape, const RunOptions& options) { return run(device, shape, options); }

// A shape that leaves the form open is checked in both, and both are timed; what is reported is the one that was chosen.
Outcome run_on_gpu(int device, const ChunkShape& shape, const RunOptions& options) {
  return with_gpu(device, [&] {
    const auto problem = make_gpu_chunk(shape, options.seed, options.runs > 0);
    if (shape.form != ChunkFormChoice::automatic) return run_problem(*problem, options);
    const bool absorbed = problem->runs_absorbed();
    RunOptions check_only = options;
    check_only.runs = 0;
    problem->run_as(absorbed ? ChunkFormChoice::unabsorbed : ChunkFormChoice::absorbed);
    const Outcome other = run_problem(*problem, check_only);
    problem->run_as(absorbed ? ChunkFormChoice::absorbed : ChunkFormChoice::unabsorbed);
    Outcome outcome = run_problem(*problem, check_only);
    if (outcome.check) outcome.check = worse_of(*outcome.check, *other.check);
    if (options.runs > 0) {
      GpuStream stream;
      const std::vector<Timing> timings = time_in_turns(*problem, {[&] { problem->run_as(ChunkFormChoice::absorbed); }, [&] { problem->run_as(ChunkFormChoice::unabsorbed); }}, options.runs, stream);
      outcome.absorbed = timings[0];
      outcome.unabsorbed = timings[1];
      outcome.timing = absorbed ? outcome.absorbed : outcome.unabsorbed;
    }
    return outcome;
  });
}

Outcome run_on_gpu(int device, const PodShape& shape, const RunOptions& options) {
  std::vector<Timing> none;
  return run_on_gpu(device, shape, options, {}, none);
}

Outcome run_on_gpu(int device, const PodShape& shape, const RunOptions& options, const std::vector<int>& splits, std::vector<Timing>& of_splits) {
  return with_gpu(device, [&] {
    const auto problem = make_gpu_pod(shape, options.seed, options.runs > 0);
    Outcome outcome = run_problem(*problem, options);
    if (options.runs > 0) {
      std::vector<std::function<void()>> settings{[&] { problem->run_fused(shape.decode_multiprocessors); }, [&] { problem->run_serially(); }};
      for (const int split : splits) settings.push_back([&problem, split] { problem->run_fused(split); });
      GpuStream stream;
      std::vector<Timing> timings = time_in_turns(*problem, settings, options.runs, stream);
      outcome.timing = timings[0];
      outcome.serial = timings[1];
      of_splits.assign(timings.begin() + 2, timings.end());
    }
    return outcome;
  });
}

}  // namespace tpla::bench
