// The hand-off between two processes, each with its own GPU where there are two: prefill puts, decode verifies.
//   kv_transfer_bench [--same-gpu] [TEXT]     only cases whose name contains TEXT
// Lines: case,bytes,gb_per_s,fraction_of_copy,put_us,committed_us,submit_us
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include "core/error.h"
#include "core/shared_memory.h"
#include "cuda/device_memory.h"
#include "cuda/kv_transfer.h"
#include "cuda/test/support.cuh"
#include "transfer/kv_put.h"
#include "transfer/reshard.h"

using namespace tpla;
using cuda::hash;
using cuda::DeviceMemory;
using cuda::KvRoute;

namespace {

constexpr int kLayers = 61;
constexpr int kTokens = 7500;
constexpr int kMaxSums = 1 << 16;

double now_us() { return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// One fixed record each way, with at most one descriptor a memory.
struct Record {
  int verb = 0;  // 1 offer, 2 verify, 3 verified, 4 next, 5 stop
  int memories = 0;
  size_t bytes = 0;
  int group_begin = 0;
  int group_end = 0;
  int last = 0;
  int sums = 0;
  double at_us = 0;
  int wrong = 0;
};

void write_all(int fd, const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = write(fd, at, bytes);
    if (n <= 0) std::exit(3);
    at += n;
    bytes -= n;
  }
}

void read_all(int fd, void* data, size_t bytes) {
  char* at = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t n = read(fd, at, bytes);
    if (n <= 0) std::exit(3);
    at += n;
    bytes -= n;
  }
}

void send_fd(int socket, int fd) {
  char byte = 1;
  iovec vector{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &vector;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  cmsghdr* part = CMSG_FIRSTHDR(&header);
  part->cmsg_level = SOL_SOCKET;
  part->cmsg_type = SCM_RIGHTS;
  part->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(part), &fd, sizeof(int));
  if (sendmsg(socket, &header, 0) != 1) std::exit(3);
}

int receive_fd(int socket) {
  char byte;
  iovec vector{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &vector;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  if (recvmsg(socket, &header, 0) != 1) std::exit(3);
  int fd;
  std::memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&header)), sizeof(int));
  return fd;
}

enum class Place { descriptor, ipc, host };

const std::vector<int> kGroups = {0, 38, 54};

struct Case {
  const char* name;
  KvLayout src;
  KvLayout dst;
  int tokens;
  Place place;
  std::vector<int> groups;  // first layers of a commit's groups: shrinking, so that little is left to verify after the last byte
};

KvLayout deepseek(KvForm form, int ranks, KvDType dtype, int page_tokens) {
  KvLayout l;
  l.form = form;
  l.ranks = ranks;
  l.layers = kLayers;
  l.latent = 512;
  l.rope = 64;
  l.dtype = dtype;
  l.page_tokens = page_tokens;
  return l;
}

std::vector<Case> cases(const std::string& text) {
  const auto mla = [](KvDType dtype, int page) { return deepseek(KvForm::mla, 1, dtype, page); };
  const auto tpla = [](KvDType dtype, int page) { return deepseek(KvForm::tpla, 2, dtype, page); };
  // Rows of 256, 288 and 320 columns by turns, as the decode kernels take them.
  const auto mixed = [&](KvDType dtype, int page) {
    KvLayout l = tpla(dtype, page);
    std::vector<int> shared;
    for (int layer = 0; layer < kLayers; layer++) shared.push_back(layer % 3 * 64);
    l.shared = SharedWidths(shared);
    return l;
  };
  const KvDType bf16 = KvDType::bf16, fp8 = KvDType::fp8;
  std::vector<Case> all = {
      {"bf16 18432-byte pieces", mla(bf16, 16), mla(bf16, 16), kTokens, Place::descriptor, kGroups},
      {"bf16 18432 to 64-token pages", mla(bf16, 16), mla(bf16, 64), kTokens, Place::descriptor, kGroups},
      {"bf16 64-token pages", mla(bf16, 64), mla(bf16, 64), kTokens, Place::descriptor, kGroups},
      {"bf16 16 to tpla g=2 64", mla(bf16, 16), tpla(bf16, 64), kTokens, Place::descriptor, kGroups},
      {"bf16 16 to tpla g=2 of three widths", mla(bf16, 16), mixed(bf16, 64), kTokens, Place::descriptor, kGroups},
      {"bf16 to fp8", mla(bf16, 64), mla(fp8, 64), kTokens, Place::descriptor, kGroups},
      {"bf16 to fp8 tpla g=2", mla(bf16, 64), tpla(fp8, 64), kTokens, Place::descriptor, kGroups},
      {"fp8 to fp8", mla(fp8, 64), mla(fp8, 64), kTokens, Place::descriptor, kGroups},
      {"fp8 to bf16", mla(fp8, 64), mla(bf16, 64), kTokens, Place::descriptor, kGroups},
      {"bf16 64-token pages, ipc", mla(bf16, 64), mla(bf16, 64), kTokens, Place::ipc, kGroups},
      {"bf16 to pinned host", mla(bf16, 64), mla(bf16, 64), kTokens, Place::host, kGroups},
      {"bf16 to tpla pinned host", mla(bf16, 64), tpla(bf16, 64), kTokens, Place::host, kGroups},
  };
  all.erase(std::remove_if(all.begin(), all.end(), [&](const Case& c) { return !std::strstr(c.name, text.c_str()); }), all.end());
  return all;
}

PageTables scattered(const KvLayout& l, int tokens, unsigned seed) {
  PageTables pages;
  const int needed = (tokens + l.page_tokens - 1) / l.page_tokens;
  std::vector<int32_t> ids(needed + 5);
  for (size_t i = 0; i < ids.size(); i++) ids[i] = int(i);
  for (size_t i = ids.size() - 1; i > 0; i--) {
    seed = seed * 1664525u + 1013904223u;
    std::swap(ids[i], ids[seed % (i + 1)]);
  }
  ids.resize(needed);
  pages.tables.push_back(ids);
  return pages;
}

int pages_needed(const KvLayout& l, int tokens) { return (tokens + l.page_tokens - 1) / l.page_tokens + 5; }

__global__ void fill_words(uint32_t* words, size_t count, uint32_t seed, bool bf16) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
    const uint32_t x = uint32_t(hash(i * 2654435761u + seed));
    // bf16: two values with exponents near one; fp8 rows are made by converting, raw bits elsewhere.
    words[i] = bf16 ? (x & 0x807f807fu) | 0x3f003f00u | (x >> 3 & 0x00800080u) : x & 0x3f3f3f3fu;
  }
}

// ---------------------------------------------------------------- decode

struct Landing {
  explicit Landing(const Case& c) : region(c.dst, pages_needed(c.dst, c.tokens)) {}
  KvRegion region;
  std::vector<DeviceMemory> device;
  std::vector<SharedMemory> host;
};

void run_decode(int socket, int device, const std::vector<Case>& cases) {
  CUDA(cudaSetDevice(device));
  CUDA(cudaFree(nullptr));
  cudaStream_t stream;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  uint64_t* sums = nullptr;
  CUDA(cudaMalloc(&sums, kMaxSums * sizeof(uint64_t)));
  uint64_t* read_back = nullptr;
  CUDA(cudaMallocHost(&read_back, kMaxSums * sizeof(uint64_t)));
  std::vector<uint64_t> expected(kMaxSums);
  for (const Case& c : cases) {
    Landing landing(c);
    const size_t bytes = c.dst.rank_bytes(landing.region.pages);
    Record offer;
    offer.verb = 1;
    offer.memories = c.dst.memories();
    offer.bytes = bytes;
    write_all(socket, &offer, sizeof(offer));
    for (int m = 0; m < offer.memories; m++) {
      if (c.place == Place::host) {
        landing.host.push_back(SharedMemory::create(bytes, "bench"));
        landing.region.base[m] = landing.host.back().data();
        send_fd(socket, landing.host.back().fd());
      } else {
        landing.device.push_back(DeviceMemory::create(device, bytes, c.place == Place::ipc ? DeviceMemory::Sharing::ipc : DeviceMemory::Sharing::descriptor));
        landing.region.base[m] = landing.device.back().data();
        CUDA(cudaMemset(landing.region.base[m], 0xcc, bytes));
        CUDA(cudaDeviceSynchronize());
        if (c.place == Place::ipc) {
          const DeviceMemory::IpcHandle handle = landing.device.back().export_ipc();
          write_all(socket, handle.data(), handle.size());
        } else {
          send_fd(socket, landing.device.back().export_fd().get());
        }
      }
    }
    const PageTables pages = scattered(c.dst, c.tokens, 99);
    std::unique_ptr<KvRoute> verify;
    if (c.place != Place::host) verify = std::make_unique<KvRoute>(KvRoute::checksum(device, landing.region));
    int wrong = 0;
    while (true) {
      Record order;
      read_all(socket, &order, sizeof(order));
      if (order.verb == 4) break;
      read_all(socket, expected.data(), order.sums * sizeof(uint64_t));
      if (verify) {
        verify->put({order.group_begin, order.group_end}, {0, c.tokens}, pages, pages, sums, stream);
        CUDA(cudaMemcpyAsync(read_back, sums, order.sums * sizeof(uint64_t), cudaMemcpyDeviceToHost, stream));
        CUDA(cudaStreamSynchronize(stream));
        wrong += std::memcmp(read_back, expected.data(), order.sums * sizeof(uint64_t)) != 0;
      } else {
        wrong += std::memcmp(kv_checksum(landing.region, pages, {order.group_begin, order.group_end}, {0, c.tokens}).data(), expected.data(), order.sums * sizeof(uint64_t)) != 0;
      }
      if (!order.last) continue;
      Record done;
      done.verb = 3;
      done.at_us = now_us();
      done.wrong = wrong;
      wrong = 0;
      write_all(socket, &done, sizeof(done));
    }
    if (verify) {
      // How fast verification reads, alone.
      cudaEvent_t begin, end;
      CUDA(cudaEventCreate(&begin));
      CUDA(cudaEventCreate(&end));
      std::vector<double> times;
      for (int i = 0; i < 12; i++) {
        CUDA(cudaEventRecord(begin, stream));
        verify->put({0, kLayers}, {0, c.tokens}, pages, pages, sums, stream);
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaEventSynchronize(end));
        float ms;
        CUDA(cudaEventElapsedTime(&ms, begin, end));
        times.push_back(ms * 1e3);
      }
      const double total = double(c.dst.token_bytes()) * c.tokens * copies_per_page(c.dst);
      std::printf("verify %s,%.0f,%.1f,,%.1f,,\n", c.name, total, total / median(times) / 1e3, median(times));
      std::fflush(stdout);
    }
    Record ready;
    write_all(socket, &ready, sizeof(ready));
  }
}

// ---------------------------------------------------------------- prefill

struct Timer {
  cudaStream_t stream;
  cudaEvent_t begin, end;
  explicit Timer(cudaStream_t s) : stream(s) {
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
  }
  double median_us(int repeats, const std::function<void()>& body) {
    std::vector<double> times;
    for (int i = 0; i < repeats + 2; i++) {
      CUDA(cudaEventRecord(begin, stream));
      body();
      CUDA(cudaEventRecord(end, stream));
      CUDA(cudaEventSynchronize(end));
      float ms;
      CUDA(cudaEventElapsedTime(&ms, begin, end));
      if (i >= 2) times.push_back(ms * 1e3);
    }
    return median(times);
  }
};

__global__ void busy(float* out, int rounds) {
  float a = threadIdx.x, b = 1.0001f, c = 0.5f, d = 0.25f;
  for (int i = 0; i < rounds; i++) {
#pragma unroll
    for (int j = 0; j < 16; j++) {
      a = a * b + c;
      d = d * b + c;
    }
  }
  if (a + d == 1234.5f) out[0] = a;
}

void run_prefill(int socket, int device, const std::vector<Case>& cases) {
  CUDA(cudaSetDevice(device));
  CUDA(cudaFree(nullptr));
  cudaStream_t stream;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  Timer timer(stream);
  uint64_t* sums = nullptr;
  CUDA(cudaMalloc(&sums, kMaxSums * sizeof(uint64_t)));
  uint64_t* host_sums = nullptr;
  CUDA(cudaMallocHost(&host_sums, kMaxSums * sizeof(uint64_t)));
  for (const Case& c : cases) {
    Record offer;
    read_all(socket, &offer, sizeof(offer));
    KvRegion dst(c.dst, pages_needed(c.dst, c.tokens));
    std::vector<DeviceMemory> mapped;
    std::vector<SharedMemory> host;
    std::vector<std::unique_ptr<cuda::RegisteredHost>> registered;
    const double open_at = now_us();
    for (int m = 0; m < offer.memories; m++) {
      if (c.place == Place::ipc) {
        DeviceMemory::IpcHandle handle;
        read_all(socket, handle.data(), handle.size());
        mapped.push_back(DeviceMemory::open(device, offer.bytes, handle));
        dst.base[m] = mapped.back().data();
        continue;
      }
      const UniqueFd fd(receive_fd(socket));
      if (c.place == Place::host) {
        host.push_back(SharedMemory::map(fd.get(), offer.bytes));
        registered.push_back(std::make_unique<cuda::RegisteredHost>(host.back().data(), offer.bytes));
        dst.base[m] = registered.back()->device_data();
      } else {
        mapped.push_back(DeviceMemory::map(device, offer.bytes, fd.get()));
        dst.base[m] = mapped.back().data();
      }
    }
    const double opened_us = now_us() - open_at;

    KvRegion src(c.src, pages_needed(c.src, c.tokens));
    const size_t src_bytes = c.src.rank_bytes(src.pages);
    std::byte* source = nullptr;
    CUDA(cudaMalloc(&source, src_bytes));
    src.base[0] = source;
    fill_words<<<1024, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(source), src_bytes / 4, 5, c.src.dtype == KvDType::bf16);
    CUDA(cudaStreamSynchronize(stream));

    const PageTables src_pages = scattered(c.src, c.tokens, 7);
    const PageTables dst_pages = scattered(c.dst, c.tokens, 99);
    const KvRoute route(device, src, dst);
    const int copies = route.copies();
    const int count = pages_of(c.dst, {0, c.tokens}).size() * copies;
    const double bytes = double(c.dst.token_bytes()) * c.tokens * copies;

    // What a single plain copy of as many bytes does on the same pair, in this run.
    const size_t copied = std::min<size_t>(std::min(src_bytes, offer.bytes), size_t(bytes));
    const double copy_us = timer.median_us(10, [&] { CUDA(cudaMemcpyAsync(dst.base[0], source, copied, cudaMemcpyDefault, stream)); });
    const double copy_rate = copied / copy_us / 1e3;

    std::vector<double> submit;
    const double put_us = timer.median_us(20, [&] {
      const double at = now_us();
      route.put({0, kLayers}, {0, c.tokens}, src_pages, dst_pages, sums, stream);
      submit.push_back(now_us() - at);
    });

    // Committed: from the first submit to the moment decode has verified the last layer group, groups overlapped.
    std::vector<double> commits;
    int wrong = 0;
    const int groups = static_cast<int>(c.groups.size());
    const auto group = [&](int g) { return Range{c.groups[g], g + 1 < groups ? c.groups[g + 1] : kLayers}; };
    std::vector<cudaEvent_t> group_done(groups);
    for (cudaEvent_t& event : group_done) CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    for (int i = 0; i < 12; i++) {
      const double start = now_us();
      for (int g = 0; g < groups; g++) {
        route.put(group(g), {0, c.tokens}, src_pages, dst_pages, sums + g * count, stream);
        CUDA(cudaMemcpyAsync(host_sums + g * count, sums + g * count, count * sizeof(uint64_t), cudaMemcpyDeviceToHost, stream));
        CUDA(cudaEventRecord(group_done[g], stream));
      }
      for (int g = 0; g < groups; g++) {
        CUDA(cudaEventSynchronize(group_done[g]));
        Record order;
        order.verb = 2;
        order.group_begin = group(g).begin;
        order.group_end = group(g).end;
        order.sums = count;
        order.last = g == groups - 1;
        write_all(socket, &order, sizeof(order));
        write_all(socket, host_sums + g * count, count * sizeof(uint64_t));
      }
      Record done;
      read_all(socket, &done, sizeof(done));
      if (i >= 2) commits.push_back(done.at_us - start);
      wrong += done.wrong;
    }
    std::printf("%s,%.0f,%.1f,%.3f,%.1f,%.1f,%.1f%s\n", c.name, bytes, bytes / put_us / 1e3, bytes / put_us / 1e3 / copy_rate, put_us, median(commits), median(submit),
                wrong ? "  WRONG CHECKSUMS" : "");
    std::printf("  single copy %.1f GB/s, opened in %.0f us\n", copy_rate, opened_us);

    if (c.place == Place::descriptor) {
      for (int blocks : {8, 12, 16, 20, 24, 28, 32, 40, 48, 66, 96, 132, 198, 264, 396}) {
        const double us = timer.median_us(6, [&] { route.put({0, kLayers}, {0, c.tokens}, src_pages, dst_pages, sums, stream, blocks); });
        std::printf("  %d blocks: %.1f GB/s\n", blocks, bytes / us / 1e3);
      }
      // A kernel that fills every multiprocessor, alone and while puts run beside it.
      cudaStream_t compute;
      CUDA(cudaStreamCreateWithFlags(&compute, cudaStreamNonBlocking));
      Timer compute_timer(compute);
      float* out = nullptr;
      CUDA(cudaMalloc(&out, 4));
      for (int blocks : {0, 16, 24, 32, 132}) {
        const double us = compute_timer.median_us(3, [&] {
          busy<<<132 * 8, 256, 0, compute>>>(out, 30000);
          for (int g = 0; blocks > 0 && g < 8; g++) {
            const Range layers{kLayers * g / 8, kLayers * (g + 1) / 8};
            route.put(layers, {0, c.tokens}, src_pages, dst_pages, sums, stream, blocks);
          }
        });
        CUDA(cudaStreamSynchronize(stream));
        std::printf("  compute beside puts of %d blocks: %.0f us\n", blocks, us);
      }
      CUDA(cudaFree(out));
    }
    if (std::strcmp(c.name, "bf16 18432-byte pieces") == 0) {
      // Today's way: one copy call a piece.
      const size_t piece = c.src.page_bytes(0);
      const double us = timer.median_us(2, [&] {
        for (int layer = 0; layer < kLayers; layer++) {
          for (int page = 0; page < c.tokens / 16; page++) {
            CUDA(cudaMemcpyAsync(dst.page(0, layer, dst_pages.tables[0][page]), src.page(0, layer, src_pages.tables[0][page]), piece, cudaMemcpyDefault, stream));
          }
        }
      });
      std::printf("  one copy call per 18432-byte piece: %.1f GB/s\n", double(piece) * kLayers * (c.tokens / 16) / us / 1e3);
    }
    std::fflush(stdout);
    Record next;
    next.verb = 4;
    write_all(socket, &next, sizeof(next));
    Record ready;
    read_all(socket, &ready, sizeof(ready));
    CUDA(cudaFree(source));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool same_gpu = argc > 1 && std::strcmp(argv[1], "--same-gpu") == 0;
  const std::vector<Case> chosen = cases(argc > 1 + same_gpu ? argv[1 + same_gpu] : "");
  int sockets[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) != 0) return 2;
  std::printf("case,bytes,gb_per_s,fraction_of_copy,put_us,committed_us,submit_us\n");
  std::fflush(stdout);
  const pid_t child = fork();
  try {
    if (child == 0) {
      close(sockets[0]);
      run_prefill(sockets[1], 0, chosen);
      return 0;
    }
    close(sockets[1]);
    int devices = 0;
    CUDA(cudaGetDeviceCount(&devices));
    run_decode(sockets[0], same_gpu || devices < 2 ? 0 : 1, chosen);
  } catch (const Error& error) {
    std::printf("FAIL %s: %s\n", error.code().c_str(), error.what());
    std::fflush(stdout);
    std::exit(1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status == 0 ? 0 : 1;
}
