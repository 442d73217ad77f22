#pragma once

namespace tpla::cpu {

// What the processor and the kernel together allow this process to execute.
struct CpuFeatures {
  bool avx2 = false;         // with FMA and F16C
  bool avx512 = false;       // F, BW, DQ, VL
  bool avx512_bf16 = false;
  bool amx_bf16 = false;     // tiles, granted by the kernel
};

const CpuFeatures& cpu_features();

// Cores this process may use (affinity mask and container quota), at least 1.
int usable_cores();

}  // namespace tpla::cpu
