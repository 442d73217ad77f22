#include "cuda/bench/gpu_problem.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>

#include "core/error.h"

namespace tpla::bench {

namespace {

constexpr int kMostSets = 256;
constexpr double kReplayMs = 2;      // a replay should last this long, so that the events around it cost nothing
constexpr int kMostCallsPerRun = 256;

__global__ void count_different_bytes(const uint8_t* a, const uint8_t* b, size_t count, unsigned long long* different) {
  unsigned long long found = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) found += a[i] != b[i];
  if (found) atomicAdd(different, found);
}

bool same_bytes(const DeviceBuffer<uint8_t>& a, const DeviceBuffer<uint8_t>& b, GpuStream& stream) {
  DeviceBuffer<unsigned long long> different(1);
  different.fill_bytes(0, stream.get());
  count_different_bytes<<<1024, 256, 0, stream.get()>>>(a.data(), b.data(), a.count(), different.data());
  gpu_check(cudaGetLastError(), "count_different_bytes");
  stream.finish("comparing outputs");
  return different.read()[0] == 0;
}

class SavedOutputs {
 public:
  explicit SavedOutputs(GpuProblem& problem) : problem_(problem) {}

  void save(GpuStream& stream) {
    copies_.clear();
    for (const DeviceBuffer<uint8_t>* output : problem_.outputs()) {
      copies_.emplace_back(output->count());
      gpu_check(cudaMemcpyAsync(copies_.back().data(), output->data(), output->bytes(), cudaMemcpyDeviceToDevice, stream.get()), "cudaMemcpyAsync");
    }
  }
  bool same_as_now(GpuStream& stream) const {
    const auto now = problem_.outputs();
    for (size_t i = 0; i < now.size(); ++i) {
      if (!same_bytes(copies_[i], *now[i], stream)) return false;
    }
    return true;
  }

 private:
  GpuProblem& problem_;
  std::vector<DeviceBuffer<uint8_t>> copies_;
};

double worse(double a, double b) { return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b); }

void poison(GpuProblem& problem, GpuStream& stream) {
  for (DeviceBuffer<uint8_t>* output : problem.outputs()) output->fill_bytes(0xff, stream.get());
}

// Outputs are NaN before every launch. Every second repetition replays a graph that was captured, and run once, with all lengths zero.
Check check_problem(GpuProblem& problem, const RunOptions& options, GpuStream& stream, SavedOutputs& first) {
  poison(problem, stream);
  problem.launch(0, stream.get());
  stream.finish("the kernel");
  first.save(stream);
  Check check = options.host_reference ? problem.compare_on_host() : problem.compare_on_gpu(stream);
  check.repeats = options.repeats;
  if (options.repeats < 2) return check;

  problem.set_lengths_to_zero(true, stream.get());
  GpuGraph graph(stream, [&](cudaStream_t into) { problem.launch(0, into); });
  graph.replay(stream);
  problem.set_lengths_to_zero(false, stream.get());
  for (int i = 1; i < options.repeats; ++i) {
    poison(problem, stream);
    if (i % 2 == 1) graph.replay(stream);
    else problem.launch(0, stream.get());
    stream.finish("the kernel");
    check.same_bits = check.same_bits && first.same_as_now(stream);
  }
  return check;
}

// Calls in one replay: whole rounds over the input sets, long enough to time.
int calls_per_run(const GpuProblem& problem, double one_call_ms) {
  const double wanted = std::min<double>(kMostCallsPerRun, kReplayMs / std::max(one_call_ms, 1e-4));
  const int rounds = std::max(1, static_cast<int>(std::ceil(wanted / problem.sets())));
  return rounds * problem.sets();
}

// Launches of a problem in one graph, which take the input sets in turn, set 0 last, whose result is known.
class TimedCalls {
 public:
  TimedCalls(GpuProblem& problem, GpuStream& stream)
      : sets_(problem.sets()), calls_(calls_per_run(problem, time_on_gpu(stream, 1, [&] { problem.launch(0, stream.get()); })[0])), graph_(stream, [&](cudaStream_t into) {
          for (int i = 1; i <= calls_; ++i) problem.launch(i % sets_, into);
        }) {}

  void replay(GpuStream& stream) { graph_.replay(stream); }

  // `times`: milliseconds of replays, sorted.
  Timing timing(std::vector<double> times) const {
    for (double& ms : times) ms /= calls_;
    return {times[times.size() / 2], times.front(), times.back(), static_cast<int>(times.size()), calls_, sets_};
  }

 private:
  const int sets_, calls_;
  GpuGraph graph_;
};

}  // namespace

Check worse_of(const Check& a, const Check& b) {
  Check check = a;
  check.worst_row = worse(a.worst_row, b.worst_row);
  check.overall = worse(a.overall, b.overall);
  check.worst_lse = worse(a.worst_lse, b.worst_lse);
  check.same_bits = a.same_bits && b.same_bits;
  return check;
}

Timing time_problem(GpuProblem& problem, int runs, GpuStream& stream) {
  TimedCalls calls(problem, stream);
  return calls.timing(time_on_gpu(stream, runs, [&] { calls.replay(stream); }));
}

std::vector<Timing> time_in_turns(GpuProblem& problem, const std::vector<std::function<void()>>& settings, int runs, GpuStream& stream) {
  std::vector<std::unique_ptr<TimedCalls>> calls;
  for (const auto& set : settings) {
    set();
    calls.push_back(std::make_unique<TimedCalls>(problem, stream));
  }
  std::vector<std::vector<double>> times(settings.size());
  std::vector<size_t> order(settings.size());
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(1);
  for (int run = 0; run < runs; ++run) {
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) times[i].push_back(time_on_gpu(stream, 1, [&] { calls[i]->replay(stream); })[0]);
  }
  std::vector<Timing> result;
  for (size_t i = 0; i < settings.size(); ++i) {
    std::sort(times[i].begin(), times[i].end());
    result.push_back(calls[i]->timing(times[i]));
  }
  return result;
}

int sets_that_outgrow_l2(size_t bytes_per_set, size_t fixed_bytes) {
  int device = 0, l2 = 0;
  size_t free = 0, total = 0;
  gpu_check(cudaGetDevice(&device), "cudaGetDevice");
  gpu_check(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device), "cudaDeviceGetAttribute");
  gpu_check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const size_t bytes = std::max<size_t>(bytes_per_set, 1);
  const size_t wanted = std::clamp<size_t>((3 * static_cast<size_t>(l2) + bytes - 1) / bytes, 2, kMostSets);
  const size_t affordable = free / 2 > fixed_bytes ? (free / 2 - fixed_bytes) / bytes : 0;
  return static_cast<int>(std::max<size_t>(1, std::min(wanted, affordable)));
}

Outcome run_problem(GpuProblem& problem, const RunOptions& options) {
  GpuStream stream;
  SavedOutputs first(problem);
  Outcome outcome;
  outcome.kernel = problem.kernel();
  if (options.repeats > 0) outcome.check = check_problem(problem, options, stream, first);
  if (options.runs > 0) {
    outcome.timing = time_problem(problem, options.runs, stream);
    if (outcome.check) outcome.check->same_bits = outcome.check->same_bits && first.same_as_now(stream);
  }
  return outcome;
}

}  // namespace tpla::bench
