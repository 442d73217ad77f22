#include "core/cuda_driver.h"

#include <fstream>
#include <regex>

#include "core/dynamic_library.h"

namespace tpla {

namespace {

// The few entry points of the CUDA driver API that a probe needs, declared here so that no CUDA header is.
using CuResult = int;
using CuDevice = int;
constexpr CuResult kSuccess = 0;
constexpr int kMultiprocessorCount = 16;
constexpr int kCapabilityMajor = 75;
constexpr int kCapabilityMinor = 76;

struct Driver {
  DynamicLibrary library{"libcuda.so.1", "libcuda.so"};
  CuResult (*init)(unsigned) = library.symbol<CuResult(unsigned)>("cuInit");
  CuResult (*driver_version)(int*) = library.symbol<CuResult(int*)>("cuDriverGetVersion");
  CuResult (*error_string)(CuResult, const char**) = library.symbol<CuResult(CuResult, const char**)>("cuGetErrorString");
  CuResult (*device_count)(int*) = library.symbol<CuResult(int*)>("cuDeviceGetCount");
  CuResult (*device_get)(CuDevice*, int) = library.symbol<CuResult(CuDevice*, int)>("cuDeviceGet");
  CuResult (*device_name)(char*, int, CuDevice) = library.symbol<CuResult(char*, int, CuDevice)>("cuDeviceGetName");
  CuResult (*total_memory)(size_t*, CuDevice) = library.symbol<CuResult(size_t*, CuDevice)>("cuDeviceTotalMem_v2");
  CuResult (*attribute)(int*, int, CuDevice) = library.symbol<CuResult(int*, int, CuDevice)>("cuDeviceGetAttribute");
  CuResult (*can_access_peer)(int*, CuDevice, CuDevice) = library.symbol<CuResult(int*, CuDevice, CuDevice)>("cuDeviceCanAccessPeer");

  bool complete() const {
    return init && driver_version && error_string && device_count && device_get && device_name && total_memory && attribute && can_access_peer;
  }

  std::string explain(CuResult result) const {
    const char* text = nullptr;
    if (error_string(result, &text) != kSuccess || text == nullptr) text = "unknown error";
    return std::string(text) + " (" + std::to_string(result) + ")";
  }
};

// "580.65.06" of /proc/driver/nvidia/version; empty where the kernel module is not loaded.
std::string kernel_module_version() {
  std::ifstream file("/proc/driver/nvidia/version");
  std::string line;
  std::smatch match;
  if (std::getline(file, line) && std::regex_search(line, match, std::regex(R"((\d+\.\d+(\.\d+)?))"))) return match[1];
  return "";
}

std::string driver_text(const Driver& driver) {
  int version = 0;
  driver.driver_version(&version);
  std::string text = "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  const std::string module = kernel_module_version();
  return module.empty() ? text : text + ", driver " + module;
}

int attribute_of(const Driver& driver, CuDevice device, int attribute) {
  int value = 0;
  driver.attribute(&value, attribute, device);
  return value;
}

CudaDevice describe(const Driver& driver, int index, int count) {
  CudaDevice described;
  described.index = index;
  CuDevice device = 0;
  driver.device_get(&device, index);
  char name[256] = {};
  driver.device_name(name, sizeof name, device);
  described.name = name;
  described.capability =
      std::to_string(attribute_of(driver, device, kCapabilityMajor)) + "." + std::to_string(attribute_of(driver, device, kCapabilityMinor));
  driver.total_memory(&described.memory_bytes, device);
  described.multiprocessors = attribute_of(driver, device, kMultiprocessorCount);
  for (int other = 0; other < count; ++other) {
    CuDevice peer = 0;
    int access = 0;
    if (other != index && driver.device_get(&peer, other) == kSuccess && driver.can_access_peer(&access, device, peer) == kSuccess && access != 0) {
      described.peers.push_back(other);
    }
  }
  return described;
}

}  // namespace

CudaProbe probe_cuda() {
  CudaProbe probe;
  const Driver driver;
  if (!driver.library) {
    probe.reason = driver.library.error();
    return probe;
  }
  if (!driver.complete()) {
    probe.reason = driver.library.path() + " lacks functions of the driver API; it is a stub or very old";
    return probe;
  }
  probe.driver = driver_text(driver);
  if (const CuResult result = driver.init(0); result != kSuccess) {
    probe.reason = "the CUDA driver does not start: " + driver.explain(result);
    return probe;
  }
  int count = 0;
  if (const CuResult result = driver.device_count(&count); result != kSuccess || count == 0) {
    probe.reason = result != kSuccess ? "the CUDA driver counts no devices: " + driver.explain(result) : "the CUDA driver finds no device";
    return probe;
  }
  for (int index = 0; index < count; ++index) probe.devices.push_back(describe(driver, index, count));
  return probe;
}

}  // namespace tpla
