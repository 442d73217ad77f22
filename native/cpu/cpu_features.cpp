#include "cpu/cpu_features.h"

#include <sched.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstring>

#include "core/error.h"
#include "cpu/kernels.h"

namespace tpla::cpu {

namespace {

#if defined(__x86_64__)
// Linux hands out the 8 KiB of tile state per process on request (arch_prctl ARCH_REQ_XCOMP_PERM).
bool request_tiles() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

CpuFeatures detect() {
  CpuFeatures found;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool osxsave = c & (1u << 27);
  const bool fma = c & (1u << 12);
  const bool f16c = c & (1u << 29);
  if (!osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const uint64_t state = enabled_state();
  const bool ymm = (state & 0x6) == 0x6;
  const bool zmm = (state & 0xe6) == 0xe6;
  const bool tiles = (state & 0x60000) == 0x60000;
  found.avx2 = ymm && fma && f16c && (b & (1u << 5));
  const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  found.avx512 = found.avx2 && zmm && (b & avx512) == avx512;
  const bool amx = (d & (1u << 22)) && (d & (1u << 24));  // AMX-BF16, AMX-TILE
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx512_bf16 = found.avx512 && (a & (1u << 5));
  found.amx_bf16 = found.avx512_bf16 && tiles && amx && request_tiles();
  return found;
}
#else
CpuFeatures detect() { return {}; }
#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

std::vector<std::string> feature_names() {
  const CpuFeatures& f = cpu_features();
  std::vector<std::string> names;
  if (f.avx2) names.insert(names.end(), {"avx2", "fma", "f16c"});
  if (f.avx512) names.insert(names.end(), {"avx512f", "avx512bw", "avx512dq", "avx512vl"});
  if (f.avx512_bf16) names.push_back("avx512_bf16");
  if (f.amx_bf16) names.push_back("amx_bf16");
  return names;
}

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  const int cores = CPU_COUNT(&set);
  return cores > 0 ? cores : 1;
}

const Kernels& select_kernels(const char* forced) {
  const CpuFeatures& f = cpu_features();
#if defined(__x86_64__)
  struct Choice {
    const Kernels& (*kernels)();
    const char* name;
    bool usable;
  };
  const Choice choices[] = {{avx512_kernels, "avx512", f.avx512}, {avx2_kernels, "avx2", f.avx2}, {portable_kernels, "portable", true}};
  for (const Choice& choice : choices) {
    if (forced != nullptr && *forced != '\0' ? std::strcmp(forced, choice.name) != 0 : !choice.usable) continue;
    if (!choice.usable) throw Error("CONFIG_INVALID", std::string("TPLA_CPU_ISA=") + forced + " names an instruction set that this CPU does not have");
    return choice.kernels();
  }
  throw Error("CONFIG_INVALID", std::string("TPLA_CPU_ISA=") + forced + " is unknown; it takes portable, avx2 or avx512");
#else
  (void)f;
  if (forced != nullptr && *forced != '\0' && std::strcmp(forced, "portable") != 0) {
    throw Error("CONFIG_INVALID", std::string("TPLA_CPU_ISA=") + forced + " does not exist on this architecture; it takes portable");
  }
  return portable_kernels();
#endif
}

}  // namespace tpla::cpu
