#pragma once

#include "bench/attention_shape.h"

namespace tpla::bench {

// Decode attention as the engine computes it on CPUs: fp32 arithmetic over the stored rows. `threads` 0: all that this process may
// use. Throws OUT_OF_MEMORY.
Outcome run_on_cpu(int threads, const DecodeShape& shape, const RunOptions& options);

// Instruction set the kernels run with.
const char* cpu_kernel();

// Large copies and fp32 matrix products on the same threads.
Rates cpu_rates(int threads);

}  // namespace tpla::bench
