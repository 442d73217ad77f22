#pragma once
#include <string>

namespace tpla::cpu {

// What this machine gives when nothing else limits it: the denominators of a benchmark's ratios, measured in the same run.
struct MachineRates {
  std::string isa;
  int threads = 0;
  double fp32_flops = 0;      // fused multiply-adds in registers, per second
  double bf16_flops = 0;      // on bf16 hardware, 0 without
  double read_bytes = 0;      // streamed from memory, per second
  double copy_bytes = 0;      // read + written, per second
};

// Takes about a second. `threads` 0: as many as the process may use; `isa` as in select_instruction_set.
MachineRates measure_machine(int threads, const std::string& isa);

}  // namespace tpla::cpu
