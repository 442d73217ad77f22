#include "bench/cpu_attention.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>

#include "bench/cpu_problem.h"
#include "bench/random.h"
#include "cpu/cpu_features.h"

namespace tpla::bench {

namespace {

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point begin) { return std::chrono::duration<double, std::milli>(Clock::now() - begin).count(); }

int count_or_all(int threads) { return threads > 0 ? threads : cpu::usable_cores(); }

bool same_bits(const HostResult& a, const HostResult& b) {
  return std::memcmp(a.out.data(), b.out.data(), a.out.size() * sizeof(float)) == 0 && std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * sizeof(float)) == 0;
}

// Outputs are NaN before every launch.
Check check_problem(CpuProblem& problem, cpu::CpuBackend& backend, int repeats) {
  bool same = true;
  HostResult first;
  for (int i = 0; i < repeats; ++i) {
    for (std::vector<float>* output : {&problem.outputs.out, &problem.outputs.lse}) std::fill(output->begin(), output->end(), std::numeric_limits<float>::quiet_NaN());
    problem.launch(backend, 0);
    if (i == 0) first = problem.outputs;
    else same = same && same_bits(problem.outputs, first);
  }
  Check check = problem.check();
  check.same_bits = same;
  check.repeats = repeats;
  return check;
}

Timing time_problem(CpuProblem& problem, cpu::CpuBackend& backend, int runs) {
  problem.launch(backend, 0);
  std::vector<double> times;
  for (int i = 0; i < runs; ++i) {
    const auto begin = Clock::now();
    problem.launch(backend, i % problem.sets());
    times.push_back(milliseconds_since(begin));
  }
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back(), runs, 1, problem.sets()};
}

Outcome run_problem(CpuProblem& problem, int threads, const RunOptions& options, const std::string& kernel) {
  cpu::CpuBackend backend(cpu::select_instruction_set(nullptr), count_or_all(threads), 3);
  Outcome outcome;
  outcome.kernel = kernel;
  if (options.repeats > 0) outcome.check = check_problem(problem, backend, options.repeats);
  if (options.runs > 0) outcome.timing = time_problem(problem, backend, options.runs);
  return outcome;
}

constexpr int kRateRepeats = 5;

double copy_bytes_per_s(cpu::ThreadTeam& team) {
  constexpr size_t kBytes = size_t(128) << 20;
  const std::vector<std::byte> from(kBytes, std::byte{1});
  std::vector<std::byte> to(kBytes);
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kRateRepeats; ++i) {
    const auto begin = Clock::now();
    team.run_ranges(int64_t(kBytes), int64_t(1) << 20, [&](int64_t first, int64_t last, int) { std::memcpy(to.data() + first, from.data() + first, size_t(last - first)); });
    best = std::min(best, milliseconds_since(begin));
  }
  return 2.0 * double(kBytes) / best * 1e3;
}

// Each thread multiplies a few small matrices of its own again and again.
double matrix_flops_per_s(cpu::ThreadTeam& team) {
  constexpr int64_t kRows = 64, kDepth = 256, kPanels = 4, kProducts = 64;
  const cpu::Kernels& kernels = cpu::select_kernels(nullptr);
  const int64_t columns = kPanels * kernels.panel;
  std::vector<float> a(size_t(kRows * kDepth)), b(size_t(columns * kDepth));
  for (size_t i = 0; i < a.size(); ++i) a[i] = random_normal(1, i);
  for (size_t i = 0; i < b.size(); ++i) b[i] = random_normal(2, i);
  std::vector<std::vector<float>> results(size_t(team.size()), std::vector<float>(size_t(kRows * columns)));
  const int64_t tasks = int64_t(team.size()) * 4;
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kRateRepeats; ++i) {
    const auto begin = Clock::now();
    team.run(tasks, [&](int64_t, int thread) {
      for (int64_t product = 0; product < kProducts; ++product) {
        kernels.gemm({.m = kRows, .n = columns, .k = kDepth, .a = a.data(), .a_row = kDepth, .a_col = 1, .b = b.data(), .b_panel = kDepth * kernels.panel,
                      .b_row = kernels.panel, .c = results[size_t(thread)].data(), .ldc = columns, .accumulate = false});
      }
    });
    best = std::min(best, milliseconds_since(begin));
  }
  return 2.0 * double(kRows * columns * kDepth * kProducts * tasks) / best * 1e3;
}

const char* instruction_set() { return cpu::select_kernels(nullptr).name; }

}  // namespace

std::string cpu_kernel_for(const DecodeShape&) { return instruction_set(); }

std::string cpu_kernel_for(const ChunkShape&) { return std::string("un-absorbed, ") + instruction_set(); }

Outcome run_on_cpu(int threads, const DecodeShape& shape, const RunOptions& options) {
  return run_problem(*make_cpu_decode(shape, options.seed, options.runs > 0), threads, options, cpu_kernel_for(shape));
}

Outcome run_on_cpu(int threads, const ChunkShape& shape, const RunOptions& options) {
  return run_problem(*make_cpu_chunk(shape, options.seed, options.runs > 0), threads, options, cpu_kernel_for(shape));
}

Rates cpu_rates(int threads) {
  cpu::ThreadTeam team(count_or_all(threads));
  Rates rates;
  rates.copy_bytes_per_s = copy_bytes_per_s(team);
  rates.matrix_flops_per_s = matrix_flops_per_s(team);
  rates.matrix_source = std::string("fp32 products in cache, ") + instruction_set();
  return rates;
}

}  // namespace tpla::bench
