#pragma once
#include <string>
#include <vector>

namespace tpla {

struct CpuProbe {
  std::string model;
  // Cores this process may run on.
  int cores = 0;
  // Instruction sets our kernels know of, as the kernel names them.
  std::vector<std::string> features;
  // The set of kernels the engine takes on it.
  std::string kernels;
};

CpuProbe probe_cpu();

}  // namespace tpla
