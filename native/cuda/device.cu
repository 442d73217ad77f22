#include "device.h"

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

namespace tpla::cuda {

void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess) throw AttentionError(std::string(call) + ": " + cudaGetErrorString(status));
}

const Device& current_device() {
  constexpr int kMaxDevices = 64;
  static Device devices[kMaxDevices];
  static std::once_flag read[kMaxDevices];
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  if (index >= kMaxDevices) throw AttentionError("device index " + std::to_string(index) + " is beyond the " + std::to_string(kMaxDevices) + " supported");
  std::call_once(read[index], [index] {
    Device& device = devices[index];
    check(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
  });
  return devices[index];
}

CUtensorMap encode_tensor_map_4d(const void* base, std::array<uint64_t, 4> sizes, std::array<uint64_t, 3> strides, std::array<uint32_t, 4> box) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found), "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) throw AttentionError("the NVIDIA driver has no cuTensorMapEncodeTiled; it must be of CUDA 12 or newer");
    return reinterpret_cast<Encode>(function);
  }();
  CUtensorMap map;
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(base), sizes.data(), strides.data(), box.data(),
                                 element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw AttentionError("cuTensorMapEncodeTiled refused the KV pages (error " + std::to_string(status) + "): the base must be 16-byte aligned and strides multiples of 16");
  }
  return map;
}

void prepare_kernel(const void* function, int shared_bytes) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> prepared;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (prepared.insert({device, function}).second) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "cudaFuncSetAttribute");
  }
}

int resident_blocks(const void* function, int threads, int shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> known;
  prepare_kernel(function, shared_bytes);
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{device, function}];
  if (blocks == 0) check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, shared_bytes), "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

void launch_cooperative(const void* function, dim3 blocks, int threads, int shared_bytes, void** parameters, Stream stream) {
  prepare_kernel(function, shared_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelExC(&config, function, parameters), "cudaLaunchKernelExC");
}

}  // namespace tpla::cuda
