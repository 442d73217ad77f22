// An attention problem in memory that the CPU engine can compute and that can be checked.
#pragma once

#include <memory>

#include "bench/attention_shape.h"
#include "bench/host_reference.h"
#include "cpu/cpu_backend.h"

namespace tpla::bench {

class CpuProblem {
 public:
  virtual ~CpuProblem() = default;

  // Sets of inputs of one shape, of which set 0 is the one that is checked.
  virtual int sets() const = 0;
  virtual void launch(cpu::CpuBackend& backend, int set) = 0;
  // Errors of the outputs for set 0, against float64.
  virtual Check check() const = 0;

  // Everything a launch writes, in the engine's order.
  HostResult outputs;
};

// `timed`: several input sets, which together outgrow the cache. Both throw OUT_OF_MEMORY.
std::unique_ptr<CpuProblem> make_cpu_decode(const DecodeShape& shape, uint64_t seed, bool timed);
std::unique_ptr<CpuProblem> make_cpu_chunk(const ChunkShape& shape, uint64_t seed, bool timed);

}  // namespace tpla::bench
