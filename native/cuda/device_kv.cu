#include "device_kv.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <pthread.h>
#include <string>
#include <thread>

#include "core/error.h"
#include "core/kv_memory.h"
#include "kv_transfer.h"
#include "runtime.h"
#include "transfer/busy_poll.h"
#include "transfer/reshard.h"
#include "transfer/task_queue.h"
#include "transfer/timeline.h"

namespace tpla::cuda {

namespace {

// What one launch needs beside its route: how it tells the host that it is done (PutReport), and checksums. Kept and reused.
struct Lane {
  explicit Lane(int on) : device(on) {
    const OnDevice current(device);
    check_runtime(cudaEventCreateWithFlags(&done, cudaEventDisableTiming | cudaEventBlockingSync), "cudaEventCreateWithFlags");
    check_runtime(cudaMalloc(&ticket, sizeof(uint32_t)), "cudaMalloc");
    check_runtime(cudaMemset(ticket, 0, sizeof(uint32_t)), "cudaMemset");
    reserve(kUsualWords);
  }
  // Memory is taken while nothing is under way: it makes the GPU wait.
  void reserve(size_t words) {
    if (words <= room) return;
    const OnDevice current(device);
    cudaFree(sums);
    cudaFreeHost(host);
    sums = host = nullptr;
    room = 0;
    check_runtime(cudaMalloc(&sums, words * sizeof(uint64_t)), "cudaMalloc");
    check_runtime(cudaMemset(sums, 0, words * sizeof(uint64_t)), "cudaMemset");
    check_runtime(cudaHostAlloc(&host, (1 + words) * sizeof(uint64_t), cudaHostAllocPortable | cudaHostAllocMapped), "cudaHostAlloc");
    host[0] = turn;
    room = words;
  }
  PutReport next_report() { return {sums, ticket, host, ++turn}; }
  bool has_told() const { return __atomic_load_n(&host[0], __ATOMIC_ACQUIRE) == turn; }

  // The pages of a long prompt, once; of a short one in 8 slices.
  static constexpr size_t kUsualWords = 8192;
  const int device;
  cudaEvent_t done = nullptr;
  uint64_t* sums = nullptr;
  uint32_t* ticket = nullptr;
  uint64_t* host = nullptr;
  uint64_t turn = 0;
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

// A route with a stream of its own: what travels one route ends in order, and does not wait for what travels another, slower one.
struct Way {
  Way(KvRoute made, int on) : route(std::move(made)), device(on) {
    const OnDevice current(device);
    // Below compute's default priority in nothing: a hand-off is short, and its request waits for it.
    check_runtime(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  ~Way() { cudaStreamDestroy(stream); }
  Way(const Way&) = delete;

  const KvRoute route;
  const int device;
  cudaStream_t stream = nullptr;
};

// Routes by the pair of regions, forgotten when either is gone.
class Routes {
 public:
  static Routes& shared() {
    static Routes* routes = new Routes();
    return *routes;
  }
  // The checksum route of a region is that of the region with itself.
  std::shared_ptr<const Way> of(const RegionPointer& src, const RegionPointer& dst, int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto at = routes_.begin(); at != routes_.end();) at = at->second.src.expired() || at->second.dst.expired() ? routes_.erase(at) : std::next(at);
    const auto key = std::make_pair(src.get(), dst.get());
    const auto found = routes_.find(key);
    if (found != routes_.end()) return found->second.way;
    const auto way = std::make_shared<const Way>(src == dst ? KvRoute::checksum(device, *src) : KvRoute(device, *src, *dst), device);
    routes_.emplace(key, Entry{src, dst, way});
    return way;
  }

 private:
  struct Entry {
    std::weak_ptr<const KvRegion> src;
    std::weak_ptr<const KvRegion> dst;
    std::shared_ptr<const Way> way;
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

// One transfer that was enqueued.
struct Flight {
  std::shared_ptr<const Way> way;
  // What it reads and writes stays until it has landed.
  RegionPointer src;
  RegionPointer dst;
  std::vector<std::unique_ptr<Lane>> lanes;
  std::vector<size_t> words;
  ChecksumDone done;

  bool has_landed() const {
    return std::all_of(lanes.begin(), lanes.end(), [](const auto& lane) { return lane->has_told(); });
  }
  // Blocks until the GPU is done with it and all that was asked for by now, or has failed. An event with every put would be host time for nothing
  // where the words it writes are watched, and would keep the next launch from overlapping this one.
  cudaError_t wait() const {
    const OnDevice on(way->device);
    const cudaError_t status = cudaEventRecord(lanes.back()->done, way->stream);
    return status == cudaSuccess ? cudaEventSynchronize(lanes.back()->done) : status;
  }
  void land(cudaError_t status) {
    std::vector<uint64_t> checksums;
    std::unique_ptr<Error> error;
    if (status == cudaSuccess && has_landed()) {
      for (size_t i = 0; i < lanes.size(); i++) checksums.insert(checksums.end(), lanes[i]->host + 1, lanes[i]->host + 1 + words[i]);
      // A lane of a transfer that failed is left where it is: the GPU may still write to it.
      for (auto& lane : lanes) Lanes::shared().give(std::move(lane));
    } else {
      for (auto& lane : lanes) static_cast<void>(lane.release());
      error = std::make_unique<Error>("INTERNAL", std::string("KV transfer on the GPU: ") + cudaGetErrorString(status));
    }
    done(std::move(checksums), std::move(error));
  }
};

// The thread that waits for transfers. It watches the words that GPUs write, and blocks in the driver where one takes long.
class Arrivals {
 public:
  static Arrivals& shared() {
    static Arrivals* arrivals = new Arrivals();
    return *arrivals;
  }

  void await(std::unique_ptr<Flight> flight) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      coming_.push_back(std::move(flight));
      count_++;
    }
    came_.notify_one();
  }

 private:
  using Clock = std::chrono::steady_clock;

  Arrivals() {
    std::thread([this] { run(); }).detach();
  }

  [[noreturn]] void run() {
    pthread_setname_np(pthread_self(), "tpla-arrivals");
    std::vector<std::unique_ptr<Flight>> flights;
    auto last = Clock::now();
    while (true) {
      if (take(flights, polls_busily() && Clock::now() - last < kBusyPoll)) last = Clock::now();
      const auto landed = std::find_if(flights.begin(), flights.end(), [](const auto& flight) { return flight->has_landed(); });
      if (landed != flights.end()) {
        (*landed)->land(cudaSuccess);
        flights.erase(landed);
        last = Clock::now();
      } else if (!flights.empty() && (!polls_busily() || Clock::now() - last > kPatience)) {
        const cudaError_t status = flights.front()->wait();
        flights.front()->land(status);
        flights.erase(flights.begin());
        last = Clock::now();
      } else {
        relax();
      }
    }
  }

  // Whether a flight was taken over. Sleeps while there is none, unless `polls`.
  bool take(std::vector<std::unique_ptr<Flight>>& flights, bool polls) {
    if (count_ == 0 && (polls || !flights.empty())) return false;
    std::unique_lock<std::mutex> lock(mutex_);
    came_.wait(lock, [this] { return !coming_.empty(); });
    for (auto& flight : coming_) flights.push_back(std::move(flight));
    count_ -= coming_.size();
    coming_.clear();
    return true;
  }

  // How long words are watched without one changing: a large transfer between GPUs takes a millisecond or two, one over PCIe longer.
  static constexpr std::chrono::milliseconds kPatience{4};
  std::mutex mutex_;
  std::condition_variable came_;
  std::deque<std::unique_ptr<Flight>> coming_;
  std::atomic<size_t> count_{0};
};

void start(const std::shared_ptr<const Way>& way, const RegionPointer& src, const RegionPointer& dst, Range layers, Range tokens, const PageTables& src_pages,
           const PageTables& dst_pages, ChecksumDone done) {
  const OnDevice on(way->device);
  auto flight = std::make_unique<Flight>();
  flight->way = way;
  flight->src = src;
  flight->dst = dst;
  flight->done = std::move(done);
  try {
    for (const Range part : launches_of(src->layout, dst->layout, tokens)) {
      flight->words.push_back(size_t(pages_of(dst->layout, part).size()) * way->route.copies());
      flight->lanes.push_back(Lanes::shared().take(way->device));
      Lane& lane = *flight->lanes.back();
      lane.reserve(flight->words.back());
      way->route.put(layers, part, src_pages, dst_pages, lane.next_report(), way->stream);
      mark_step("launched");
    }
  } catch (...) {
    // What was enqueued before writes on: it must not outlive the gate.
    cudaStreamSynchronize(way->stream);
    throw;
  }
  Arrivals::shared().await(std::move(flight));
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
    check_runtime(cudaMemset(memories.back().data(), 0, memories.back().size()), "cudaMemset");
    check_runtime(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
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
  check_runtime(cudaMemcpy(to, region_.page(memory, layer, page), region_.layout.page_bytes(layer), cudaMemcpyDeviceToHost), "cudaMemcpy");
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

namespace {

// Puts are launched by a thread of their own: whoever asks for one has other things to do, and the driver takes tens of microseconds where it was not
// called for a while.
TaskQueue& launches() {
  static auto* queue = new TaskQueue("tpla-launches");
  return *queue;
}

void launch_put(const RegionPointer& src, const RegionPointer& dst, const KvPut& put, std::shared_ptr<const WriteGate> gate, const PutDone& done) {
  if (src->device < 0 || dst->device < 0) throw Error("REQUEST_INVALID", "a transfer with a GPU takes host memory that is pinned for it");
  check_compatible(src->layout, dst->layout);
  check_pages("source", *src, put.src_pages, put.layers, put.tokens);
  check_pages("destination", *dst, put.dst_pages, put.layers, put.tokens);
  // The source's GPU does the work: writes travel better than reads.
  const auto way = Routes::shared().of(src, dst, src->device);
  // Entered until the last byte is in place.
  struct Inside {
    Inside(std::shared_ptr<const WriteGate> at, const WritePass& with) : gate(std::move(at)), pass(with), write(pass) {}
    const std::shared_ptr<const WriteGate> gate;
    const WritePass pass;
    const GatedWrite write;
  };
  auto inside = std::make_shared<std::unique_ptr<Inside>>(std::make_unique<Inside>(std::move(gate), put.pass));
  const size_t bytes = dst->layout.token_bytes(put.layers.begin, put.layers.end) * put.tokens.size() * copies_per_page(dst->layout);
  start(way, src, dst, put.layers, put.tokens, put.src_pages, put.dst_pages, [inside, bytes, done](std::vector<uint64_t> checksums, std::unique_ptr<Error> error) {
    inside->reset();
    done({bytes, bytes, std::move(checksums)}, std::move(error));
  });
}

}  // namespace

void device_put(std::shared_ptr<const KvRegion> src, std::shared_ptr<const KvRegion> dst, KvPut put, std::shared_ptr<const WriteGate> gate, PutDone done) {
  launches().post([src = std::move(src), dst = std::move(dst), put = std::move(put), gate = std::move(gate), done = std::move(done)] {
    try {
      launch_put(src, dst, put, gate, done);
    } catch (const Error& error) {
      done({}, std::make_unique<Error>(error));
    } catch (const std::exception& error) {
      done({}, std::make_unique<Error>("INTERNAL", error.what()));
    }
  });
}

void prepare_device_puts(std::shared_ptr<const KvRegion> src, std::shared_ptr<const KvRegion> dst) {
  launches().post([src = std::move(src), dst = std::move(dst)] {
    try {
      const auto way = Routes::shared().of(src, dst, src->device);
      Lanes::shared().give(Lanes::shared().take(src->device));
      // Into the driver and back.
      const OnDevice on(src->device);
      cudaStreamQuery(way->stream);
    } catch (const std::exception&) {
      // Each put will say so.
    }
  });
}

double device_plain_copy(const KvRegion& src, const KvRegion& dst, size_t bytes) {
  if (bytes > std::min(src.layout.rank_bytes(src.pages), dst.layout.rank_bytes(dst.pages))) throw Error("REQUEST_INVALID", "plain copy beyond the smaller side");
  const OnDevice on(src.device);
  cudaStream_t stream;
  check_runtime(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  cudaEvent_t begin, end;
  check_runtime(cudaEventCreate(&begin), "cudaEventCreate");
  check_runtime(cudaEventCreate(&end), "cudaEventCreate");
  check_runtime(cudaEventRecord(begin, stream), "cudaEventRecord");
  check_runtime(cudaMemcpyAsync(dst.base[0], src.base[0], bytes, cudaMemcpyDefault, stream), "cudaMemcpyAsync");
  check_runtime(cudaEventRecord(end, stream), "cudaEventRecord");
  check_runtime(cudaEventSynchronize(end), "a plain copy on the GPU");
  float ms = 0;
  check_runtime(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  return ms / 1e3;
}

void device_checksum(std::shared_ptr<const KvRegion> region, const PageTables& pages, Range layers, Range tokens, ChecksumDone done) {
  check_pages("region", *region, pages, layers, tokens);
  start(Routes::shared().of(region, region, region->device), region, region, layers, tokens, pages, pages, std::move(done));
}

}  // namespace tpla::cuda
