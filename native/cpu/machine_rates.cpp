#include "cpu/machine_rates.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "cpu/bf16_tiles.h"
#include "cpu/cpu_backend.h"
#include "cpu/cpu_features.h"

namespace tpla::cpu {

namespace {

// Well beyond any last-level cache.
constexpr size_t kStreamFloats = size_t(128) << 20;
constexpr int kRepeats = 3;

template <typename Body>
double seconds(Body&& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Best of several runs of `body(thread)` on every thread, which returns its units of work.
template <typename Body>
double best_rate(ThreadTeam& team, Body&& body) {
  double best = 0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    std::atomic<int64_t> work{0};
    const double time = seconds([&] { team.run(team.size(), [&](int64_t part, int) { work += body(part); }); });
    best = std::max(best, double(work) / time);
  }
  return best;
}

}  // namespace

MachineRates measure_machine(int threads, const std::string& isa) {
  const InstructionSet& set = select_instruction_set(isa.c_str());
  ThreadTeam team(threads > 0 ? threads : usable_cores());
  MachineRates rates;
  rates.isa = set.name;
  rates.threads = team.size();
  rates.fp32_flops = best_rate(team, [&](int64_t) { return set.kernels->multiply_add_loop(4'000'000); });
  if (set.tiles) rates.bf16_flops = best_rate(team, [&](int64_t) { return set.tiles->product_loop(1'000'000); });

  Buffer from, to;
  float* source = from.reserve(kStreamFloats);
  float* target = to.reserve(kStreamFloats);
  const int64_t part = int64_t(kStreamFloats) / team.size();
  team.run(team.size(), [&](int64_t i, int) {
    std::memset(source + i * part, 1, size_t(part) * sizeof(float));
    std::memset(target + i * part, 0, size_t(part) * sizeof(float));
  });
  std::atomic<int> nonzero{0};
  rates.read_bytes = best_rate(team, [&](int64_t i) {
    nonzero += set.kernels->sum(source + i * part, part) != 0;
    return part * int64_t(sizeof(float));
  });
  rates.copy_bytes = best_rate(team, [&](int64_t i) {
    std::memcpy(target + i * part, source + i * part, size_t(part) * sizeof(float));
    return 2 * part * int64_t(sizeof(float));
  });
  return rates;
}

}  // namespace tpla::cpu
