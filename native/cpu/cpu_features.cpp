#include "cpu/cpu_features.h"

#include <sched.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>

#include "core/error.h"
#include "cpu/bf16_tiles.h"
#include "cpu/blas.h"
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

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  // A container's quota in cores, rounded up: more threads than that would be throttled.
  std::ifstream quota("/sys/fs/cgroup/cpu.max");
  double allowed = 0;
  double period = 0;
  if (quota >> allowed >> period && period > 0) cores = std::min(cores, int(std::ceil(allowed / period)));
  return std::max(cores, 1);
}

const InstructionSet& select_instruction_set(const char* name) {
  struct Choice {
    InstructionSet set;
    bool (*usable)();
  };
  // Best first.
  static const Choice choices[] = {
#if defined(__x86_64__)
      {{"amx", &avx512_kernels(), &amx_tiles(), true, false}, [] { return cpu_features().amx_bf16; }},
      {{"avx512_bf16", &avx512_kernels(), &avx512bf16_tiles(), false, false}, [] { return cpu_features().avx512_bf16; }},
      {{"avx512", &avx512_kernels(), nullptr, false, false}, [] { return cpu_features().avx512; }},
      {{"avx2", &avx2_kernels(), nullptr, false, false}, [] { return cpu_features().avx2; }},
#endif
      {{"blas", &portable_kernels(), nullptr, false, true}, blas_usable},
      {{"portable", &portable_kernels(), nullptr, false, false}, [] { return true; }},
  };
  const bool any = name == nullptr || *name == '\0';
  std::string usable;
  for (const Choice& choice : choices) {
    if (!any && std::strcmp(name, choice.set.name) != 0) continue;
    if (choice.usable()) return choice.set;
  }
  for (const Choice& choice : choices) {
    if (choice.usable()) usable += (usable.empty() ? "" : ", ") + std::string(choice.set.name);
  }
  throw Error("CONFIG_INVALID", std::string("instruction set \"") + name + "\" is unknown or beyond this CPU, which has " + usable);
}

}  // namespace tpla::cpu
