// A problem on the device that can be launched, checked and timed, whatever the kernel behind it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bench/attention_shape.h"
#include "cuda/bench/gpu.h"

namespace tpla::bench {

class GpuProblem {
 public:
  virtual ~GpuProblem() = default;

  virtual std::string kernel() const = 0;
  // Sets of inputs of one shape, of which set 0 is the one that is checked.
  virtual int sets() const = 0;
  virtual void launch(int set, cudaStream_t stream) = 0;
  // Everything a launch writes.
  virtual std::vector<DeviceBuffer<uint8_t>*> outputs() = 0;
  // Makes every length zero, or what it was: a captured launch must read them at each replay.
  virtual void set_lengths_to_zero(bool zero, cudaStream_t stream) = 0;
  // Errors of the outputs for set 0, against float64.
  virtual Check compare_on_gpu(GpuStream& stream) = 0;
  virtual Check compare_on_host() = 0;
};

// The larger of each error; NaN is the largest.
Check worse_of(const Check& a, const Check& b);

// Number of input sets that together exceed what the device's L2 can keep, within half of the free memory; at least 1.
int sets_that_outgrow_l2(size_t bytes_per_set, size_t fixed_bytes);

// Medians of graph replays in which calls take the input sets in turn, set 0 last.
Timing time_problem(GpuProblem& problem, int runs, GpuStream& stream);

// The same for each of several settings of one problem, in turns of random order: a GPU at its power limit slows down while it is measured, and
// whoever came later, or after one that draws more power, would seem slower.
std::vector<Timing> time_in_turns(GpuProblem& problem, const std::vector<std::function<void()>>& settings, int runs, GpuStream& stream);

// Checks first, then times; the timed launches' last result must still have the checked bits.
Outcome run_problem(GpuProblem& problem, const RunOptions& options);

}  // namespace tpla::bench
