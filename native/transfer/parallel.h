#pragma once
#include <cstddef>
#include <functional>

namespace tpla {

// Threads that copy and hash may use, this one included: the CPUs of the process's affinity mask, at most 16 (memory bandwidth is
// spent by then).
int transfer_threads();

// Whether this process and another of this host may run on fewer than four CPUs, taken together, and have some in common: what one computes, the
// other waits for. False where nothing is known of the other (0, or a process of another PID namespace).
bool shares_few_cpus(int pid);

// Calls body(i) for every i in [0, count), on up to `threads` threads of a pool that all callers share; returns when all are done.
// After an exception the rest is left out; the first one is rethrown.
void parallel_for(size_t count, int threads, const std::function<void(size_t)>& body);

}  // namespace tpla
