// KV arenas in GPU memory, and the transfer calls over them. Plain C++: no CUDA header.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/kv_layout.h"
#include "cuda/device_memory.h"
#include "transfer/kv_put.h"

namespace tpla::cuda {

// Pages on one GPU or several: an arena of this process, or a peer's mapped here.
class DeviceKv {
 public:
  // Zeroed. Memory of rank r on devices[r % devices.size()]; region().device is the first. Throws OUT_OF_MEMORY, REQUEST_INVALID.
  static std::shared_ptr<DeviceKv> create(const KvLayout& layout, int pages, const std::vector<int>& devices, DeviceMemory::Sharing sharing);
  // A peer's, for use by `device`: one descriptor, or one IPC handle, a memory. Throws PROTOCOL.
  static std::shared_ptr<DeviceKv> map(const KvLayout& layout, int pages, const std::vector<int>& fds, int device);
  static std::shared_ptr<DeviceKv> open(const KvLayout& layout, int pages, const std::vector<DeviceMemory::IpcHandle>& handles, int device);

  const KvRegion& region() const { return region_; }
  size_t bytes() const;
  DeviceMemory::Sharing sharing() const { return sharing_; }
  // Of Sharing::descriptor; the arena keeps them.
  const std::vector<UniqueFd>& fds();
  std::vector<DeviceMemory::IpcHandle> ipc_handles() const;
  // Copies one page of one layer to the host.
  void read_page(int memory, int layer, int page, std::byte* to) const;
  int device_of(int memory) const { return memories_[memory].device(); }

 private:
  DeviceKv(const KvLayout& layout, int pages, std::vector<DeviceMemory> memories, DeviceMemory::Sharing sharing);

  KvRegion region_;
  std::vector<DeviceMemory> memories_;
  std::vector<UniqueFd> fds_;
  DeviceMemory::Sharing sharing_;
};

// Host pages that a GPU uses directly. Registering takes about a second for each 2 GB: once, at connect.
class PinnedKv {
 public:
  PinnedKv(std::shared_ptr<const KvRegion> host, int device);
  const KvRegion& region() const { return region_; }

 private:
  std::shared_ptr<const KvRegion> host_;
  std::vector<std::unique_ptr<RegisteredHost>> registered_;
  KvRegion region_;
};

// kv_put where either region is a device's; both must have been made for the same device. `done` is called once, on another thread, after the gate was
// left: with the result, REQUEST_INVALID, or CANCELLED where the gate is shut. Puts between the same two regions end in the order in which they were
// asked for, so that the first can be verified while the others travel.
using PutDone = std::function<void(KvPutResult result, std::unique_ptr<Error> error)>;
void device_put(std::shared_ptr<const KvRegion> src, std::shared_ptr<const KvRegion> dst, KvPut put, std::shared_ptr<const WriteGate> gate, PutDone done);
// Puts between these may follow at once: what they need is made, and the thread that launches them looks out for them instead of being woken.
void prepare_device_puts(std::shared_ptr<const KvRegion> src, std::shared_ptr<const KvRegion> dst);
// kv_checksum of a device's region: enqueues the work and returns; `done` is called as above. Throws REQUEST_INVALID.
using ChecksumDone = std::function<void(std::vector<uint64_t> checksums, std::unique_ptr<Error> error)>;
void device_checksum(std::shared_ptr<const KvRegion> region, const PageTables& pages, Range layers, Range tokens, ChecksumDone done);
// Seconds of one plain copy between the first memories of two regions of one device. Throws REQUEST_INVALID where either is smaller.
double device_plain_copy(const KvRegion& src, const KvRegion& dst, size_t bytes);

}  // namespace tpla::cuda
