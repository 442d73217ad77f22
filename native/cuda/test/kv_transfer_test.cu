// Every reshard and conversion on the GPU against the CPU path, byte for byte and checksum for checksum.
//   kv_transfer_test [--quick]     quick: a few cases, for compute-sanitizer
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/kv_row.h"
#include "cuda/kv_transfer.h"
#include "cuda/test/support.cuh"
#include "transfer/kv_put.h"
#include "transfer/reshard.h"

using namespace tpla;
using cuda::Buffer;
using cuda::finish;

namespace {

constexpr int kLayers = 3;
int failures = 0;
std::mt19937 random_bits(7);

KvLayout layout(KvForm form, int ranks, KvDType dtype, int page_tokens, int latent = 512, int rope = 64, SharedWidths shared = 0) {
  KvLayout l;
  l.form = form;
  l.ranks = ranks;
  l.layers = kLayers;
  l.latent = latent;
  l.rope = rope;
  l.shared = shared;
  l.dtype = dtype;
  l.page_tokens = page_tokens;
  return l;
}

SharedWidths mixed(std::vector<int> widths) { return SharedWidths(std::move(widths)); }

// One region twice: on the host, and with the same bytes on a GPU.
struct Store {
  std::vector<std::vector<std::byte>> host;
  std::vector<std::byte*> device;
  KvRegion on_host;
  KvRegion on_device;
  PageTables pages;

  Store(const KvLayout& l, int tokens) : on_host(l, (tokens + l.page_tokens - 1) / l.page_tokens + 3), on_device(l, on_host.pages) {
    const int needed = (tokens + l.page_tokens - 1) / l.page_tokens;
    const int total = on_host.pages;
    for (int m = 0; m < l.memories(); m++) {
      host.emplace_back(l.rank_bytes(total), std::byte{0xa5});
      std::byte* data = nullptr;
      CUDA(cudaMalloc(&data, host.back().size()));
      device.push_back(data);
      on_host.base[m] = host.back().data();
      on_device.base[m] = data;
    }
    std::vector<int32_t> ids(total);
    for (int i = 0; i < total; i++) ids[i] = i;
    const int tables = l.form == KvForm::dcp ? l.ranks : 1;
    for (int t = 0; t < tables; t++) {
      std::shuffle(ids.begin(), ids.end(), random_bits);
      pages.tables.emplace_back(ids.begin(), ids.begin() + (l.form == KvForm::dcp ? (needed - t + l.ranks - 1) / l.ranks : needed));
    }
    pages.rank = l.form == KvForm::dp ? l.ranks - 1 : 0;
    upload();
  }
  ~Store() {
    for (std::byte* data : device) cudaFree(data);
  }
  void upload() {
    for (size_t m = 0; m < host.size(); m++) CUDA(cudaMemcpy(device[m], host[m].data(), host[m].size(), cudaMemcpyHostToDevice));
  }
  bool device_equals_host() const {
    for (size_t m = 0; m < host.size(); m++) {
      std::vector<std::byte> copy(host[m].size());
      CUDA(cudaMemcpy(copy.data(), device[m], copy.size(), cudaMemcpyDeviceToHost));
      if (copy != host[m]) {
        size_t at = 0;
        while (copy[at] == host[m][at]) at++;
        int layer = 0;
        while (layer + 1 < on_host.layout.layers && on_host.layer_offset(layer + 1) <= at) layer++;
        const size_t inside = at - on_host.layer_offset(layer), row = on_host.layout.row_bytes(layer);
        std::printf("  memory %zu differs at byte %zu (layer %d row %zu byte %zu): %02x, expected %02x\n", m, at, layer, inside / row, inside % row, unsigned(copy[at]), unsigned(host[m][at]));
        return false;
      }
    }
    return true;
  }
  // What a model could have left there, in every copy.
  void fill(int tokens) {
    const KvLayout& layout = on_host.layout;
    std::vector<float> latent(layout.latent), rope(layout.rope), own;
    for (int layer = 0; layer < layout.layers; layer++) {
      const RowLayout l = layout.row(layer);
      own.resize(l.width());
      for (int token = 0; token < tokens; token++) {
        for (float& v : latent) v = value();
        for (float& v : rope) v = value();
        const PagePlace place = place_of(layout, pages, token / layout.page_tokens);
        for (int copy = 0; copy < copies_per_page(l); copy++) {
          int at = 0;
          if (l.form == KvForm::tpla) {
            for (int c = 0; c < l.shared; c++) own[at++] = latent[c];
            for (int c = 0; c < l.slice(); c++) own[at++] = latent[l.slice_begin(copy) + c];
          } else {
            own = latent;
          }
          encode_row(l, own.data(), rope.data(), on_host.row(l.form == KvForm::tpla ? copy : place.memory, layer, place.page, token % layout.page_tokens));
        }
      }
    }
    upload();
  }
  static float value() {
    const int kind = random_bits() % 64;
    if (kind == 0) return 0;
    if (kind == 1) return INFINITY * (random_bits() % 2 ? 1 : -1);
    if (kind == 2) return std::ldexp(1.0f, -int(random_bits() % 140));
    return (int(random_bits() % 4001) - 2000) / 500.0f * std::ldexp(1.0f, int(random_bits() % 12) - 8);
  }
};

void check_case(const KvLayout& from, const KvLayout& to, Range layers, Range tokens, int total, int blocks) {
  const std::string what = std::to_string(int(from.form)) + "x" + std::to_string(from.ranks) + " dtype " + std::to_string(int(from.dtype)) + " page " + std::to_string(from.page_tokens) +
                           " -> " + std::to_string(int(to.form)) + "x" + std::to_string(to.ranks) + " dtype " + std::to_string(int(to.dtype)) + " page " + std::to_string(to.page_tokens) +
                           " latent " + std::to_string(to.latent) + " shared " + std::to_string(to.shared[0]) + (to.shared.is_uniform() ? "" : "...");
  Store src(from, total);
  Store dst(to, total);
  src.fill(total);
  KvPut put{&src.on_host, &dst.on_host, layers, tokens, src.pages, dst.pages, {}};
  const KvPutResult expected = kv_put(put);
  const size_t sums = expected.checksums.size();
  Buffer<uint64_t> checksums(sums);
  checksums.poison();
  const cuda::KvRoute route(0, src.on_device, dst.on_device);
  route.put(layers, tokens, src.pages, dst.pages, checksums.data, nullptr, blocks);
  finish(what.c_str());
  const bool same_sums = checksums.read() == expected.checksums;
  const bool same_bytes = dst.device_equals_host();
  const cuda::KvRoute verify = cuda::KvRoute::checksum(0, dst.on_device);
  checksums.poison();
  verify.put(layers, tokens, dst.pages, dst.pages, checksums.data, nullptr, blocks);
  finish(what.c_str());
  const bool same_read = checksums.read() == expected.checksums;
  if (!same_sums || !same_bytes || !same_read) {
    failures++;
    std::printf("FAIL %s: checksums %s, bytes %s, read back %s\n", what.c_str(), same_sums ? "ok" : "differ", same_bytes ? "ok" : "differ", same_read ? "ok" : "differ");
  }
}

void check_replicas() {
  // mla on two memories of one GPU: both get every byte, one is hashed.
  Store src(layout(KvForm::mla, 1, KvDType::bf16, 16), 70);
  Store one(layout(KvForm::mla, 2, KvDType::bf16, 64), 70);
  src.fill(70);
  std::byte* second = nullptr;
  CUDA(cudaMalloc(&second, one.host[0].size()));
  CUDA(cudaMemset(second, 0xa5, one.host[0].size()));
  KvRegion both = one.on_device;
  both.base[1] = second;
  const KvPutResult expected = kv_put({&src.on_host, &one.on_host, {0, kLayers}, {0, 70}, src.pages, one.pages, {}});
  Buffer<uint64_t> checksums(expected.checksums.size());
  const cuda::KvRoute route(0, src.on_device, both, 2);
  route.put({0, kLayers}, {0, 70}, src.pages, one.pages, checksums.data, nullptr);
  finish("replicas");
  std::vector<std::byte> copy(one.host[0].size());
  CUDA(cudaMemcpy(copy.data(), second, copy.size(), cudaMemcpyDeviceToHost));
  if (!one.device_equals_host() || copy != one.host[0] || checksums.read() != expected.checksums) {
    failures++;
    std::printf("FAIL replicas of mla\n");
  }
  CUDA(cudaFree(second));
}

void check_refusals() {
  const auto refused = [](const char* what, auto build) {
    try {
      build();
      failures++;
      std::printf("FAIL %s was not refused\n", what);
    } catch (const Error& error) {
      if (error.code() != "REQUEST_INVALID") {
        failures++;
        std::printf("FAIL %s: %s\n", what, error.what());
      }
    }
  };
  Store src(layout(KvForm::mla, 1, KvDType::bf16, 16, 100, 12), 20);
  Store dst(layout(KvForm::mla, 1, KvDType::fp8, 16, 100, 12), 20);
  refused("a conversion of odd widths", [&] { cuda::KvRoute(0, src.on_device, dst.on_device); });
  Store wide(layout(KvForm::mla, 1, KvDType::f32, 16, 4096, 64), 20);
  refused("a row beyond 8 KiB", [&] { cuda::KvRoute(0, wide.on_device, wide.on_device); });
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  const KvDType dtypes[] = {KvDType::f32, KvDType::bf16, KvDType::fp8};
  int cases = 0;
  const auto run = [&](const KvLayout& from, const KvLayout& to, Range layers, Range tokens, int total, int blocks = 0) {
    check_case(from, to, layers, tokens, total, blocks);
    cases++;
  };
  for (const KvDType a : dtypes) {
    for (const KvDType b : dtypes) {
      run(layout(KvForm::mla, 1, a, 16), layout(KvForm::tpla, 2, b, 64), {0, kLayers}, {0, 150}, 150);
      run(layout(KvForm::mla, 1, a, 64), layout(KvForm::mla, 1, b, 16), {1, 3}, {5, 133}, 150, 1);
      if (quick) continue;
      run(layout(KvForm::tpla, 2, a, 32, 512, 64, 128), layout(KvForm::tpla, 4, b, 48, 512, 64, 64), {0, kLayers}, {0, 150}, 150);
      run(layout(KvForm::tpla, 8, a, 32), layout(KvForm::dcp, 3, b, 16), {0, kLayers}, {31, 150}, 150);
      run(layout(KvForm::dcp, 2, a, 16), layout(KvForm::dp, 2, b, 64), {0, kLayers}, {0, 150}, 150);
      run(layout(KvForm::dp, 2, a, 16), layout(KvForm::tpla, 8, b, 128), {0, kLayers}, {0, 150}, 150);
      run(layout(KvForm::mla, 1, a, 64, 128, 32), layout(KvForm::tpla, 2, b, 64, 128, 32, 32), {0, kLayers}, {0, 100}, 100);
      run(layout(KvForm::mla, 1, a, 16), layout(KvForm::tpla, 2, b, 64, 512, 64, mixed({0, 128, 64})), {0, kLayers}, {0, 150}, 150);
      run(layout(KvForm::tpla, 2, a, 64, 512, 64, mixed({512, 0, 128})), layout(KvForm::mla, 1, b, 16), {1, 3}, {5, 133}, 150);
      run(layout(KvForm::tpla, 2, a, 64, 512, 64, mixed({64, 0, 64})), layout(KvForm::tpla, 2, b, 32, 512, 64, mixed({64, 512, 0})), {0, kLayers}, {0, 150}, 150);
      run(layout(KvForm::mla, 1, a, 64, 200, 40), layout(KvForm::mla, 1, b, 32, 200, 40), {0, kLayers}, {0, 100}, 100);
    }
  }
  if (!quick) {
    // More layers than one launch takes, of two widths.
    KvLayout from = layout(KvForm::mla, 1, KvDType::bf16, 16, 64, 16), to = layout(KvForm::tpla, 2, KvDType::bf16, 16, 64, 16);
    from.layers = to.layers = 300;
    std::vector<int> shared;
    for (int layer = 0; layer < to.layers; layer++) shared.push_back(layer % 7 == 0 ? 16 : 0);
    to.shared = mixed(shared);
    run(from, to, {0, 300}, {0, 40}, 40);
  }
  // Layers whose rows have widths drawn at random, among them all and none of the latent.
  for (int draw = 0; draw < (quick ? 1 : 24); draw++) {
    const int groups = 1 << (1 + random_bits() % 3);
    const auto widths = [&] {
      std::vector<int> shared;
      for (int layer = 0; layer < kLayers; layer++) shared.push_back(int(random_bits() % (512 / (8 * groups) + 1)) * 8 * groups);
      return mixed(shared);
    };
    const KvDType a = dtypes[random_bits() % 3], b = dtypes[random_bits() % 3];
    run(layout(KvForm::mla, 1, a, 64), layout(KvForm::tpla, groups, b, 64, 512, 64, widths()), {0, kLayers}, {0, 100}, 100);
    run(layout(KvForm::tpla, groups, a, 64, 512, 64, widths()), layout(KvForm::tpla, groups, b, 16, 512, 64, widths()), {0, kLayers}, {3, 100}, 100);
  }
  if (!quick) {
    run(layout(KvForm::mla, 1, KvDType::bf16, 16, 64, 16), layout(KvForm::tpla, 2, KvDType::bf16, 64, 64, 16), {0, kLayers}, {0, 30000}, 30000);
    run(layout(KvForm::mla, 1, KvDType::bf16, 16, 90, 14), layout(KvForm::tpla, 5, KvDType::bf16, 16, 90, 14), {0, kLayers}, {0, 100}, 100);
  }
  check_replicas();
  check_refusals();
  std::printf("%d cases, %d failures\n", cases + 2, failures);
  return failures == 0 ? 0 : 1;
}
