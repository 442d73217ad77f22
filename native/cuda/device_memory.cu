#include "device_memory.h"

#include <cuda.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "runtime.h"

namespace tpla::cuda {

namespace {

template <class Function>
Function entry_point(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check_runtime(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess) throw Error("INTERNAL", std::string("the NVIDIA driver has no ") + name + "; it must be of CUDA 12 or newer");
  return reinterpret_cast<Function>(function);
}

// The driver's virtual memory calls, found at run time.
struct Driver {
  decltype(&cuMemGetAllocationGranularity) granularity = entry_point<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity");
  decltype(&cuMemCreate) create = entry_point<decltype(&cuMemCreate)>("cuMemCreate");
  decltype(&cuMemRelease) release = entry_point<decltype(&cuMemRelease)>("cuMemRelease");
  decltype(&cuMemAddressReserve) reserve = entry_point<decltype(&cuMemAddressReserve)>("cuMemAddressReserve");
  decltype(&cuMemAddressFree) free_address = entry_point<decltype(&cuMemAddressFree)>("cuMemAddressFree");
  decltype(&cuMemMap) map = entry_point<decltype(&cuMemMap)>("cuMemMap");
  decltype(&cuMemUnmap) unmap = entry_point<decltype(&cuMemUnmap)>("cuMemUnmap");
  decltype(&cuMemSetAccess) set_access = entry_point<decltype(&cuMemSetAccess)>("cuMemSetAccess");
  decltype(&cuMemExportToShareableHandle) export_handle = entry_point<decltype(&cuMemExportToShareableHandle)>("cuMemExportToShareableHandle");
  decltype(&cuMemImportFromShareableHandle) import_handle = entry_point<decltype(&cuMemImportFromShareableHandle)>("cuMemImportFromShareableHandle");
  decltype(&cuGetErrorString) error_string = entry_point<decltype(&cuGetErrorString)>("cuGetErrorString");
};

const Driver& driver() {
  static const Driver calls;
  return calls;
}

void check_driver(CUresult status, const char* call, const char* code = "INTERNAL") {
  if (status == CUDA_SUCCESS) return;
  const char* text = nullptr;
  driver().error_string(status, &text);
  throw Error(status == CUDA_ERROR_OUT_OF_MEMORY ? "OUT_OF_MEMORY" : code, std::string(call) + ": " + (text ? text : "unknown error"));
}

CUmemAllocationProp properties(int device) {
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = device;
  prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return prop;
}

size_t round_up(size_t bytes, int device) {
  const CUmemAllocationProp prop = properties(device);
  size_t granularity = 0;
  check_driver(driver().granularity(&granularity, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED), "cuMemGetAllocationGranularity");
  return (bytes + granularity - 1) / granularity * granularity;
}

CUdeviceptr map_handle(CUmemGenericAllocationHandle handle, size_t mapped, const std::vector<int>& devices) {
  CUdeviceptr at = 0;
  check_driver(driver().reserve(&at, mapped, 0, 0, 0), "cuMemAddressReserve");
  CUresult status = driver().map(at, mapped, 0, handle, 0);
  if (status == CUDA_SUCCESS) {
    std::vector<CUmemAccessDesc> access(devices.size());
    for (size_t i = 0; i < devices.size(); i++) {
      access[i].location.type = CU_MEM_LOCATION_TYPE_DEVICE;
      access[i].location.id = devices[i];
      access[i].flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    }
    status = driver().set_access(at, mapped, access.data(), access.size());
    if (status != CUDA_SUCCESS) driver().unmap(at, mapped);
  }
  if (status != CUDA_SUCCESS) driver().free_address(at, mapped);
  check_driver(status, "mapping shared GPU memory");
  return at;
}

}  // namespace

DeviceMemory DeviceMemory::create(int device, size_t bytes, Sharing sharing, const std::vector<int>& others) {
  const OnDevice on(device);
  std::vector<int> devices = {device};
  for (int other : others) {
    if (std::find(devices.begin(), devices.end(), other) == devices.end()) devices.push_back(other);
  }
  DeviceMemory memory;
  memory.device_ = device;
  memory.size_ = bytes;
  if (sharing == Sharing::ipc) {
    void* data = nullptr;
    check_runtime(cudaMalloc(&data, bytes), "cudaMalloc");
    memory.data_ = static_cast<std::byte*>(data);
    memory.kind_ = Kind::malloced;
    for (int other : devices) {
      if (other != device) enable_peer(other, device);
    }
    return memory;
  }
  const CUmemAllocationProp prop = properties(device);
  memory.mapped_ = round_up(bytes, device);
  CUmemGenericAllocationHandle handle = 0;
  check_driver(driver().create(&handle, memory.mapped_, &prop, 0), "cuMemCreate");
  try {
    memory.data_ = reinterpret_cast<std::byte*>(map_handle(handle, memory.mapped_, devices));
  } catch (...) {
    driver().release(handle);
    throw;
  }
  memory.handle_ = handle;
  memory.kind_ = Kind::vmm;
  return memory;
}

DeviceMemory DeviceMemory::map(int device, size_t bytes, int fd) {
  const OnDevice on(device);
  DeviceMemory memory;
  memory.device_ = device;
  memory.size_ = bytes;
  memory.mapped_ = round_up(bytes, device);
  CUmemGenericAllocationHandle handle = 0;
  check_driver(driver().import_handle(&handle, reinterpret_cast<void*>(static_cast<intptr_t>(fd)), CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
               "the peer's GPU memory cannot be imported", "PROTOCOL");
  try {
    memory.data_ = reinterpret_cast<std::byte*>(map_handle(handle, memory.mapped_, {device}));
  } catch (...) {
    driver().release(handle);
    throw;
  }
  memory.handle_ = handle;
  memory.kind_ = Kind::vmm;
  return memory;
}

DeviceMemory DeviceMemory::open(int device, size_t bytes, const IpcHandle& handle) {
  const OnDevice on(device);
  cudaIpcMemHandle_t native;
  static_assert(sizeof(native) == sizeof(IpcHandle));
  std::memcpy(&native, handle.data(), sizeof(native));
  void* data = nullptr;
  check_runtime(cudaIpcOpenMemHandle(&data, native, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
  DeviceMemory memory;
  memory.device_ = device;
  memory.size_ = bytes;
  memory.data_ = static_cast<std::byte*>(data);
  memory.kind_ = Kind::opened;
  return memory;
}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  std::swap(handle_, other.handle_);
  std::swap(device_, other.device_);
  std::swap(kind_, other.kind_);
  return *this;
}

DeviceMemory::~DeviceMemory() {
  if (kind_ == Kind::none) return;
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  if (kind_ == Kind::malloced) cudaFree(data_);
  if (kind_ == Kind::opened) cudaIpcCloseMemHandle(data_);
  if (kind_ == Kind::vmm) {
    const auto at = reinterpret_cast<CUdeviceptr>(data_);
    driver().unmap(at, mapped_);
    driver().free_address(at, mapped_);
    driver().release(handle_);
  }
  cudaSetDevice(before);
}

UniqueFd DeviceMemory::export_fd() const {
  int fd = -1;
  check_driver(driver().export_handle(&fd, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0), "cuMemExportToShareableHandle");
  return UniqueFd(fd);
}

DeviceMemory::IpcHandle DeviceMemory::export_ipc() const {
  const OnDevice on(device_);
  cudaIpcMemHandle_t native;
  check_runtime(cudaIpcGetMemHandle(&native, data_), "cudaIpcGetMemHandle");
  IpcHandle handle;
  std::memcpy(handle.data(), &native, sizeof(native));
  return handle;
}

std::string device_uuid(int device) {
  cudaDeviceProp properties;
  check_runtime(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  std::string text;
  for (const char byte : properties.uuid.bytes) {
    char hex[3];
    std::snprintf(hex, sizeof(hex), "%02x", static_cast<unsigned char>(byte));
    text += hex;
  }
  return text;
}

void enable_peer(int device, int peer) {
  const OnDevice on(device);
  const cudaError_t status = cudaDeviceEnablePeerAccess(peer, 0);
  if (status == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    return;
  }
  check_runtime(status, "cudaDeviceEnablePeerAccess");
}

namespace {

// The driver takes a range once; several connections may lend the same pages.
struct Registrations {
  struct Entry {
    std::byte* device_data = nullptr;
    int owners = 0;
  };
  std::mutex mutex;
  std::map<std::byte*, Entry> entries;

  static Registrations& shared() {
    static auto* registrations = new Registrations();
    return *registrations;
  }
};

}  // namespace

RegisteredHost::RegisteredHost(std::byte* data, size_t bytes) : data_(data) {
  Registrations& known = Registrations::shared();
  const std::lock_guard lock(known.mutex);
  Registrations::Entry& entry = known.entries[data];
  if (entry.owners == 0) {
    void* device = nullptr;
    cudaError_t status = cudaHostRegister(data, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (status == cudaSuccess && (status = cudaHostGetDevicePointer(&device, data, 0)) != cudaSuccess) cudaHostUnregister(data);
    if (status != cudaSuccess) known.entries.erase(data);
    check_runtime(status, "cudaHostRegister");
    entry.device_data = static_cast<std::byte*>(device);
  }
  entry.owners++;
  device_data_ = entry.device_data;
}

RegisteredHost::~RegisteredHost() {
  Registrations& known = Registrations::shared();
  const std::lock_guard lock(known.mutex);
  const auto entry = known.entries.find(data_);
  if (--entry->second.owners > 0) return;
  cudaHostUnregister(data_);
  known.entries.erase(entry);
}

}  // namespace tpla::cuda
