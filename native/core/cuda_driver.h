#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace tpla {

struct CudaDevice {
  int index = 0;
  std::string name;
  std::string capability;  // "9.0"
  size_t memory_bytes = 0;
  int multiprocessors = 0;
  // Devices whose memory this one can access directly (NVLink or PCIe peer-to-peer).
  std::vector<int> peers;
};

struct CudaProbe {
  // "CUDA 13.0, driver 580.65"; empty where there is no driver.
  std::string driver;
  // Why no device is listed; empty where one is.
  std::string reason;
  std::vector<CudaDevice> devices;
};

// Asks libcuda, opened at run time; needs neither the CUDA toolkit nor a build with CUDA.
CudaProbe probe_cuda();

}  // namespace tpla
