// Memory of one GPU that another process can map.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "transfer/socket.h"

namespace tpla::cuda {

// Two ways to share: a VMM allocation whose descriptor travels over a socket (works across PID and network namespaces), or a CUDA IPC
// handle of plain memory. Both reach 397 GB/s over NVLink on H200; opening an IPC handle takes about 10 ms.
class DeviceMemory {
 public:
  enum class Sharing { descriptor, ipc };
  using IpcHandle = std::array<std::byte, 64>;

  // Not cleared. `others`: further devices of this process that use it. Throws OUT_OF_MEMORY, or INTERNAL with the driver's words.
  static DeviceMemory create(int device, size_t bytes, Sharing sharing, const std::vector<int>& others = {});
  // Maps a peer's allocation for use by `device`; `bytes` as it was created. Throws PROTOCOL where the driver refuses the descriptor.
  static DeviceMemory map(int device, size_t bytes, int fd);
  static DeviceMemory open(int device, size_t bytes, const IpcHandle& handle);

  DeviceMemory() = default;
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory();

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  int device() const { return device_; }

  // Of memory made with Sharing::descriptor.
  UniqueFd export_fd() const;
  // Of memory made with Sharing::ipc.
  IpcHandle export_ipc() const;

 private:
  enum class Kind { none, vmm, malloced, opened };

  std::byte* data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_ = 0;  // size rounded to the allocation granularity
  unsigned long long handle_ = 0;
  int device_ = -1;
  Kind kind_ = Kind::none;
};

// Names one GPU of the host in every process: 32 hex digits.
std::string device_uuid(int device);

// Lets `device` use a peer GPU's plain allocations. Throws INTERNAL where the two are not linked.
void enable_peer(int device, int peer);

// Host memory that GPUs use directly, here memory that another process shares. Throws INTERNAL with the driver's words.
class RegisteredHost {
 public:
  RegisteredHost(std::byte* data, size_t bytes);
  RegisteredHost(const RegisteredHost&) = delete;
  ~RegisteredHost();
  // Address for kernels.
  std::byte* device_data() const { return device_data_; }

 private:
  std::byte* data_;
  std::byte* device_data_ = nullptr;
};

}  // namespace tpla::cuda
