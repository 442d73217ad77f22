#include "device_kv.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "core/error.h"
#include "core/kv_memory.h"
#include "kv_transfer.h"
#include "transfer/reshard.h"

namespace tpla::cuda {

namespace {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw Error(status == cudaErrorMemoryAllocation ? "OUT_OF_MEMORY" : "INTERNAL", std::string(call) + ": " + cudaGetErrorString(status));
}

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// What one transfer needs beside its route: a stream, and room for checksums on both sides. Kept and reused.
struct Lane {
  explicit Lane(int on) : device(on) {
    const OnDevice current(device);
    // Below compute's default priority in nothing: a hand-off is short, and its request waits for it.
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    check(cudaEventCreateWithFlags(&done, cudaEventDisableTiming | cudaEventBlockingSync), "cudaEventCreateWithFlags");
  }
  void reserve(size_t words) {
    if (words <= room) return;
    cudaFree(on_device);
    cudaFreeHost(on_host);
    on_device = on_host = nullptr;
    room = 0;
    check(cudaMalloc(&on_device, words * sizeof(uint64_t)), "cudaMalloc");
    check(cudaMallocHost(&on_host, words * sizeof(uint64_t)), "cudaMallocHost");
    room = words;
  }

  const int device;
  cudaStream_t stream = nullptr;
  cudaEvent_t done = nullptr;
  uint64_t* on_device = nullptr;
  uint64_t* on_host = nullptr;
  size_t room = 0;
};

class Lanes {
 public:
  static Lanes& shared() {
    // Never destroyed: the driver may be gone by then.
    static Lanes* lanes = new Lanes();
    return *lanes;
  }
  std::unique_ptr<Lane> take(int device) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = std::find_if(free_.begin(), free_.end(), [&](const auto& lane) { return lane->device == device; });
      if (found != free_.end()) {
        std::unique_ptr<Lane> lane = std::move(*found);
        free_.erase(found);
        return lane;
      }
    }
    return std::make_unique<Lane>(device);
  }
  void give(std::unique_ptr<Lane> lane) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(lane));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Lane>> free_;
};

using RegionPointer = std::shared_ptr<const KvRegion>;

// Routes by the pair of regions, forgotten when either is gone.
class Routes {
 public:
  static Routes& shared() {
    static Routes* routes = new Routes();
    return *routes;
  }
  // The checksum route of a region is that of the region with itself.
  std::shared_ptr<const KvRoute> of(const RegionPointer& src, const RegionPointer& dst, int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto at = routes_.begin(); at != routes_.end();) at = at->second.src.expired() || at->second.dst.expired() ? routes_.erase(at) : std::next(at);
    const auto key = std::make_pair(src.get(), dst.get());
    const auto found = routes_.find(key);
    if (found != routes_.end()) return found->second.route;
    auto route = src == dst ? std::make_shared<const KvRoute>(KvRoute::checksum(device, *src)) : std::make_shared<const KvRoute>(device, *src, *dst);
    routes_.emplace(key, Entry{src, dst, route});
    return route;
  }

 private:
  struct Entry {
    std::weak_ptr<const KvRegion> src;
    std::weak_ptr<const KvRegion> dst;
    std::shared_ptr<const KvRoute> route;
  };
  std::mutex mutex_;
  std::map<std::pair<const KvRegion*, const KvRegion*>, Entry> routes_;
};

// Token ranges whose tables fit one launch, cut where pages of the destination begin.
std::vector<Range> launches_of(const KvLayout& src, const KvLayout& dst, Range tokens) {
  const int pages = KvRoute::kMaxPages / 2 - 2;
  const int most = std::max(dst.page_tokens, std::min(src.page_tokens, dst.page_tokens) * pages / dst.page_tokens * dst.page_tokens);
  std::vector<Range> ranges;
  for (int begin = tokens.begin; begin < tokens.end;) {
    const int end = std::min(tokens.end, begin / dst.page_tokens * dst.page_tokens + most);
    ranges.push_back({begin, end});
    begin = end;
  }
  return ranges;
}

std::vector<uint64_t> run(const KvRoute& route, int device, const KvLayout& src, const KvLayout& dst, Range layers, Range tokens, const PageTables& src_pages,
                          const PageTables& dst_pages) {
  std::vector<uint64_t> checksums;
  const OnDevice on(device);
  std::unique_ptr<Lane> lane = Lanes::shared().take(device);
  for (const Range part : launches_of(src, dst, tokens)) {
    const size_t words = size_t(pages_of(dst, part).size()) * route.copies();
    lane->reserve(words);
    route.put(layers, part, src_pages, dst_pages, lane->on_device, lane->stream);
    check(cudaMemcpyAsync(lane->on_host, lane->on_device, words * sizeof(uint64_t), cudaMemcpyDeviceToHost, lane->stream), "cudaMemcpyAsync");
    check(cudaEventRecord(lane->done, lane->stream), "cudaEventRecord");
    check(cudaEventSynchronize(lane->done), "KV transfer on the GPU");
    checksums.insert(checksums.end(), lane->on_host, lane->on_host + words);
  }
  Lanes::shared().give(std::move(lane));
  return checksums;
}

}  // namespace

DeviceKv::DeviceKv(const KvLayout& layout, int pages, std::vector<DeviceMemory> memories, DeviceMemory::Sharing sharing)
    : region_(layout, pages), memories_(std::move(memories)), sharing_(sharing) {
  region_.device = memories_[0].device();
  for (size_t m = 0; m < memories_.size(); m++) region_.base[m] = memories_[m].data();
}

std::shared_ptr<DeviceKv> DeviceKv::create(const KvLayout& layout, int pages, const std::vector<int>& devices, DeviceMemory::Sharing sharing) {
  check_kv_layout(layout, pages);
  if (devices.empty()) throw Error("REQUEST_INVALID", "a GPU arena needs at least one device");
  std::vector<DeviceMemory> memories;
  for (int m = 0; m < layout.memories(); m++) {
    memories.push_back(DeviceMemory::create(devices[m % devices.size()], layout.rank_bytes(pages), sharing, devices));
    const OnDevice on(memories.back().device());
    check(cudaMemset(memories.back().data(), 0, memories.back().size()), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  return std::shared_ptr<DeviceKv>(new DeviceKv(layout, pages, std::move(memories), sharing));
}

std::shared_ptr<DeviceKv> DeviceKv::map(const KvLayout& layout, int pages, const std::vector<int>& fds, int device) {
  check_kv_layout(layout, pages);
  if (fds.size() != size_t(layout.memories())) {
    throw Error("PROTOCOL", std::to_string(fds.size()) + " memory descriptors came, the layout has " + std::to_string(layout.memories()));
  }
  std::vector<DeviceMemory> memories;
  for (int fd : fds) memories.push_back(DeviceMemory::map(device, layout.rank_bytes(pages), fd));
  return std::shared_ptr<DeviceKv>(new DeviceKv(layout, pages, std::move(memories), DeviceMemory::Sharing::descriptor));
}

std::shared_ptr<DeviceKv> DeviceKv::open(const KvLayout& layout, int pages, const std::vector<DeviceMemory::IpcHandle>& handles, int device) {
  check_kv_layout(layout, pages);
  if (handles.size() != size_t(layout.memories())) {
    throw Error("PROTOCOL", std::to_string(handles.size()) + " IPC handles came, the layout has " + std::to_string(layout.memories()));
  }
  std::vector<DeviceMemory> memories;
  for (const auto& handle : handles) memories.push_back(DeviceMemory::open(device, layout.rank_bytes(pages), handle));
  return std::shared_ptr<DeviceKv>(new DeviceKv(layout, pages, std::move(memories), DeviceMemory::Sharing::ipc));
}

size_t DeviceKv::bytes() const { return region_.layout.rank_bytes(region_.pages) * memories_.size(); }

const std::vector<UniqueFd>& DeviceKv::fds() {
  if (sharing_ != DeviceMemory::Sharing::descriptor) throw Error("REQUEST_INVALID", "this GPU arena is shared by IPC handles, it has no descriptors");
  if (fds_.empty()) {
    for (const DeviceMemory& memory : memories_) fds_.push_back(memory.export_fd());
  }
  return fds_;
}

std::vector<DeviceMemory::IpcHandle> DeviceKv::ipc_handles() const {
  std::vector<DeviceMemory::IpcHandle> handles;
  for (const DeviceMemory& memory : memories_) handles.push_back(memory.export_ipc());
  return handles;
}

void DeviceKv::read_page(int memory, int layer, int page, std::byte* to) const {
  const OnDevice on(memories_[memory].device());
  check(cudaMemcpy(to, region_.page(memory, layer, page), region_.layout.page_bytes(layer), cudaMemcpyDeviceToHost), "cudaMemcpy");
}

PinnedKv::PinnedKv(std::shared_ptr<const KvRegion> host, int device) : host_(std::move(host)), region_(*host_) {
  if (host_->device >= 0) throw Error("REQUEST_INVALID", "only host memory is pinned");
  const OnDevice on(device);
  region_.device = device;
  for (int m = 0; m < region_.layout.memories(); m++) {
    registered_.push_back(std::make_unique<RegisteredHost>(host_->base[m], region_.layout.rank_bytes(region_.pages)));
    region_.base[m] = registered_.back()->device_data();
  }
}

KvPutResult device_put(std::shared_ptr<const KvRegion> src, std::shared_ptr<const KvRegion> dst, const KvPut& put) {
  if (src->device < 0 || dst->device < 0) throw Error("REQUEST_INVALID", "a transfer with a GPU takes host memory that is pinned for it");
  check_compatible(src->layout, dst->layout);
  check_pages("source", *src, put.src_pages, put.layers, put.tokens);
  check_pages("destination", *dst, put.dst_pages, put.layers, put.tokens);
  // The source's GPU does the work: writes travel better than reads.
  const int device = src->device;
  const auto route = Routes::shared().of(src, dst, device);
  const GatedWrite write(put.pass);
  KvPutResult result;
  result.checksums = run(*route, device, src->layout, dst->layout, put.layers, put.tokens, put.src_pages, put.dst_pages);
  result.bytes = result.wire_bytes = dst->layout.token_bytes(put.layers.begin, put.layers.end) * put.tokens.size() * copies_per_page(dst->layout);
  return result;
}

double device_plain_copy(const KvRegion& src, const KvRegion& dst, size_t bytes) {
  if (bytes > std::min(src.layout.rank_bytes(src.pages), dst.layout.rank_bytes(dst.pages))) throw Error("REQUEST_INVALID", "plain copy beyond the smaller side");
  const OnDevice on(src.device);
  std::unique_ptr<Lane> lane = Lanes::shared().take(src.device);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  check(cudaEventRecord(begin, lane->stream), "cudaEventRecord");
  check(cudaMemcpyAsync(dst.base[0], src.base[0], bytes, cudaMemcpyDefault, lane->stream), "cudaMemcpyAsync");
  check(cudaEventRecord(end, lane->stream), "cudaEventRecord");
  check(cudaEventSynchronize(end), "a plain copy on the GPU");
  float ms = 0;
  check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  Lanes::shared().give(std::move(lane));
  return ms / 1e3;
}

std::vector<uint64_t> device_checksum(std::shared_ptr<const KvRegion> region, const PageTables& pages, Range layers, Range tokens) {
  check_pages("region", *region, pages, layers, tokens);
  const auto route = Routes::shared().of(region, region, region->device);
  return run(*route, region->device, region->layout, region->layout, layers, tokens, pages, pages);
}

}  // namespace tpla::cuda
