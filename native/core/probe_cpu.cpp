#include "core/probe_cpu.h"

#include <fstream>
#include <set>
#include <sstream>

#include "cpu/cpu_features.h"
#include "cpu/kernels.h"

namespace tpla {

namespace {

const char* const kKnownFeatures[] = {"sse4_2", "pclmulqdq", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl",
                                      "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "bf16"};

}  // namespace

CpuProbe probe_cpu() {
  CpuProbe probe;
  probe.cores = cpu::usable_cores();
  probe.kernels = cpu::select_instruction_set(nullptr).name;
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const auto colon = line.find(':');
    if (colon == std::string::npos) {
      if (!probe.features.empty()) break;  // an empty line ends the first processor, the others are alike
      continue;
    }
    const std::string key = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
    const std::string value = colon + 2 <= line.size() ? line.substr(colon + 2) : "";
    if (key == "model name") probe.model = value;
    if (key != "flags" && key != "Features") continue;
    std::istringstream words(value);
    std::set<std::string> present;
    for (std::string word; words >> word;) present.insert(word);
    for (const char* feature : kKnownFeatures) {
      if (present.count(feature) != 0) probe.features.emplace_back(feature);
    }
  }
  return probe;
}

}  // namespace tpla
