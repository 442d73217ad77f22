#pragma once

#include <string>

#include "bench/attention_shape.h"

namespace tpla::bench {

// Attention as the engine computes it on CPUs, in fp32 arithmetic over the stored rows: absorbed decode, and chunks of prefill, which are causal,
// un-absorbed and give no log-sum-exp. `threads` 0: all that this process may use. Throws OUT_OF_MEMORY.
Outcome run_on_cpu(int threads, const DecodeShape& shape, const RunOptions& options);
Outcome run_on_cpu(int threads, const ChunkShape& shape, const RunOptions& options);

// Instruction set the kernels run with; of a chunk also the form.
std::string cpu_kernel_for(const DecodeShape& shape);
std::string cpu_kernel_for(const ChunkShape& shape);

// Large copies and fp32 matrix products on the same threads.
Rates cpu_rates(int threads);

}  // namespace tpla::bench
