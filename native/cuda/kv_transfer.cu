#include "kv_transfer.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/kv_row.h"
#include "put_rows.cuh"
#include "runtime.h"
#include "transfer/kv_checksum.h"
#include "transfer/reshard.h"

namespace tpla::cuda {

namespace {

using put_rows::kGroupLanes;
using put_rows::kOctet;
using put_rows::kUnitTokens;
using put_rows::kWarps;
using put_rows::Launch;
using put_rows::LayerPlace;
using put_rows::Plan;
using put_rows::RowShape;
using put_rows::Side;
using put_rows::Source;

// Rows are built in shared memory, two batches a warp: one leaves while the next is made. This is about what one batch takes.
constexpr size_t kBatchBytes = 5632;
// Shared memory holds, beside the batches, a key for each word of the longest row, and a source for each chunk of a row of each shape.
constexpr size_t kMaxRowBytes = 8 * 1024;
constexpr size_t kMaxTableBytes = 16 * 1024;
// Of one launch: a place for each in shared memory.
constexpr int kMaxLayers = 128;
// What a small launch carries in its parameters, 4 KiB in all; a large one takes the 32 KiB of CUDA 12.1.
constexpr int kSmallTables = 992;
// More than the kernel has of its own.
constexpr size_t kStaticSharedBytes = 1024;
static_assert(sizeof(Launch<kSmallTables>) <= 4096);

[[noreturn]] void refuse(const std::string& message) { throw Error("REQUEST_INVALID", "KV transfer on GPU: " + message); }

int bases_of(const RowLayout& layout, int replicas) { return layout.form == KvForm::mla ? replicas : layout.ranks; }

Side side_of(const KvRegion& region, int replicas) {
  Side side{};
  std::copy_n(region.base, bases_of(region.layout.row(0), replicas), side.base);
  side.page_tokens = region.layout.page_tokens;
  side.ranks = region.layout.ranks;
  side.form = region.layout.form;
  return side;
}

// Largest of 16, 8 and 4 that divides all of it; 0 where not even 4 does.
class Alignment {
 public:
  void take(size_t value) { divisor_ = std::gcd(divisor_, value); }
  // Rows of a region's memories.
  void take(const KvRegion& region, const RowLayout& row, int replicas) {
    take(row.bytes());
    for (int i = 0; i < bases_of(row, replicas); i++) take(reinterpret_cast<uintptr_t>(region.base[i]));
  }
  int bytes() const { return divisor_ >= 4 ? static_cast<int>(divisor_) : 0; }

 private:
  size_t divisor_ = 16;
};

// Which segment a byte of the destination row comes from.
std::vector<Source> chunk_sources(const RowPlan& plan, uint32_t chunks, int chunk_bytes) {
  std::vector<Source> sources(chunks);
  for (const ByteSegment& segment : plan.segments) {
    for (size_t at = 0; at < segment.bytes; at += chunk_bytes) {
      sources[(segment.dst_offset + at) / chunk_bytes] = {segment.src_memory, static_cast<int32_t>(segment.src_offset + at), 0};
    }
  }
  return sources;
}

std::vector<Source> octet_sources(const RowPlan& plan, const RowLayout& src, uint32_t latent_octets, uint32_t rope_octets) {
  std::vector<Source> sources(latent_octets + rope_octets);
  const int value_bytes = src.dtype == KvDType::f32 ? 4 : src.dtype == KvDType::bf16 ? 2 : 1;
  for (const LatentPiece& piece : plan.pieces) {
    for (int column = 0; column < piece.columns; column += kOctet) {
      const int from = piece.src_column + column;
      const int scale = src.dtype == KvDType::fp8 ? static_cast<int>(fp8_scales_offset(src.width())) + from / kFp8ScaleGroup * 4 : 0;
      sources[(piece.dst_column + column) / kOctet] = {piece.src_memory, from * value_bytes, scale};
    }
  }
  const int rope_value_bytes = src.dtype == KvDType::f32 ? 4 : 2;
  for (uint32_t octet = 0; octet < rope_octets; octet++) {
    sources[latent_octets + octet] = {plan.rope_memory, static_cast<int32_t>(rope_offset(src) + octet * kOctet * rope_value_bytes), 0};
  }
  return sources;
}

// Rows as they are, each copy where it is.
std::vector<RowPlan> plan_reading(const RowLayout& layout) {
  std::vector<RowPlan> plans;
  for (int copy = 0; copy < copies_per_page(layout); copy++) {
    RowPlan plan;
    plan.is_copy = true;
    const int memory = layout.form == KvForm::tpla ? copy : layout.form == KvForm::mla ? 0 : kHolder;
    plan.segments = {{memory, 0, 0, layout.bytes()}};
    plans.push_back(plan);
  }
  return plans;
}

template <class T>
T* upload(const std::vector<T>& host) {
  T* device = nullptr;
  check_runtime(cudaMalloc(&device, host.size() * sizeof(T)), "cudaMalloc");
  check_runtime(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return device;
}

// How the kernel makes rows: copied or converted, and at which alignment.
struct Making {
  bool is_copy;
  int bytes;  // of a chunk where no value changes, else of what is loaded at once
  bool operator==(const Making& other) const { return is_copy == other.is_copy && bytes == other.bytes; }
};

// Rows that are made alike, as one shape of a plan.
struct Shaped {
  Making making;
  RowShape shape{};
  std::vector<std::vector<Source>> sources;  // [copies][chunks]
};

Making making_of(const KvRegion& from, const KvRegion& to, const RowGroup& rows, const std::vector<RowPlan>& plans, int replicas) {
  const RowLayout& src = rows.src;
  const RowLayout& dst = rows.dst;
  Alignment chunks;
  chunks.take(from, src, 1);
  Alignment stores;
  stores.take(to, dst, replicas);
  const bool is_copy = std::all_of(plans.begin(), plans.end(), [](const RowPlan& row) { return row.is_copy; });
  if (!is_copy) {
    if (src.dtype == dst.dtype && src.dtype != KvDType::fp8) refuse("columns are cut within 32-bit words; this one needs the CPU path");
    for (const RowPlan& plan : plans) {
      for (const LatentPiece& piece : plan.pieces) {
        for (const int columns : {piece.src_column, piece.dst_column, piece.columns, src.rope}) {
          if (columns % kOctet == 0) continue;
          refuse("a conversion takes latent widths, slices, shared columns and rope in multiples of " + std::to_string(kOctet) + "; this one needs the CPU path");
        }
      }
    }
    chunks.take(rope_offset(src));
  } else {
    chunks.take(to, dst, replicas);
    for (const RowPlan& plan : plans) {
      for (const ByteSegment& segment : plan.segments) {
        for (const size_t offset : {segment.src_offset, segment.dst_offset, segment.bytes}) chunks.take(offset);
      }
    }
  }
  if (chunks.bytes() == 0 || stores.bytes() == 0) refuse("rows or memories are not aligned to 4 bytes");
  return {is_copy, is_copy || chunks.bytes() == 16 ? chunks.bytes() : 4};
}

Shaped shape_rows(const KvRegion& from, const KvRegion& to, const RowGroup& rows, bool is_checksum, int replicas) {
  const RowLayout& src = rows.src;
  const RowLayout& dst = rows.dst;
  const size_t longest = std::max(src.bytes(), dst.bytes());
  if (longest > kMaxRowBytes) refuse("a row takes " + std::to_string(longest) + " bytes, at most " + std::to_string(kMaxRowBytes) + " are supported");
  const std::vector<RowPlan> plans = is_checksum ? plan_reading(dst) : plan_reshard(src, dst);
  Shaped made{making_of(from, to, rows, plans, replicas)};
  RowShape& shape = made.shape;
  shape.src_row_bytes = static_cast<uint32_t>(src.bytes());
  shape.row_bytes = static_cast<uint32_t>(dst.bytes());
  shape.src_page_stride = src.bytes() * from.layout.page_tokens;
  shape.dst_page_stride = dst.bytes() * to.layout.page_tokens;
  shape.batch_rows = kUnitTokens;
  while (shape.batch_rows > 1 && shape.batch_rows * shape.row_bytes > kBatchBytes) shape.batch_rows /= 2;
  shape.latent_octets = dst.width() / kOctet;
  const uint32_t octets = shape.latent_octets + dst.rope / kOctet;
  shape.octet_slots = (octets + kGroupLanes - 1) / kGroupLanes * kGroupLanes;
  shape.scales_offset = static_cast<uint32_t>(fp8_scales_offset(dst.width()));
  shape.rope_offset = static_cast<uint32_t>(rope_offset(dst));
  shape.chunks = made.making.is_copy ? shape.row_bytes / made.making.bytes : octets;
  for (const RowPlan& row : plans) {
    const std::vector<Source> one = made.making.is_copy ? chunk_sources(row, shape.chunks, made.making.bytes) : octet_sources(row, src, shape.latent_octets, octets - shape.latent_octets);
    made.sources.insert(made.sources.end(), replicas, one);
  }
  return made;
}

template <class Rows, int kTables>
const void* kernel() {
  return reinterpret_cast<const void*>(&put_rows::put<Rows, kTables>);
}

template <int kTables, KvDType kFrom, KvDType kTo>
const void* converting_kernel(int bytes) {
  return bytes == 16 ? kernel<put_rows::ConvertedRows<16, kFrom, kTo>, kTables>() : kernel<put_rows::ConvertedRows<4, kFrom, kTo>, kTables>();
}

template <int kTables, bool kStores>
const void* copying_kernel(int bytes) {
  switch (bytes) {
    case 16: return kernel<put_rows::CopiedRows<16, kStores>, kTables>();
    case 8: return kernel<put_rows::CopiedRows<8, kStores>, kTables>();
    default: return kernel<put_rows::CopiedRows<4, kStores>, kTables>();
  }
}

template <int kTables>
const void* kernel_for(const Making& making, bool is_checksum, KvDType from, KvDType to) {
  if (is_checksum) return copying_kernel<kTables, false>(making.bytes);
  if (making.is_copy) return copying_kernel<kTables, true>(making.bytes);
  constexpr KvDType f32 = KvDType::f32, bf16 = KvDType::bf16, fp8 = KvDType::fp8;
  if (from == f32) return to == bf16 ? converting_kernel<kTables, f32, bf16>(making.bytes) : converting_kernel<kTables, f32, fp8>(making.bytes);
  if (from == bf16) return to == f32 ? converting_kernel<kTables, bf16, f32>(making.bytes) : converting_kernel<kTables, bf16, fp8>(making.bytes);
  if (to == f32) return converting_kernel<kTables, fp8, f32>(making.bytes);
  return to == bf16 ? converting_kernel<kTables, fp8, bf16>(making.bytes) : converting_kernel<kTables, fp8, fp8>(making.bytes);
}

}  // namespace

struct KvRoute::State {
  int device = 0;
  int multiprocessors = 0;
  size_t max_shared_bytes = 0;  // of a block, dynamic
  bool overlaps_launches = false;
  KvLayout src;
  KvLayout dst;
  int copies = 1;    // hashed
  int replicas = 1;  // of an mla page, written
  bool is_checksum = false;
  std::vector<std::unique_ptr<Pass>> passes;

  void build(const KvRegion& from, const KvRegion& to);
};

// Layers that one launch takes: their rows are made in one way, and what a block must know of them fits beside its batches.
class KvRoute::Pass {
 public:
  Pass(const State& route, const KvRegion& from, const KvRegion& to, Making making);
  ~Pass();
  Pass(const Pass&) = delete;

  // False where the rows are made in another way, or have no room.
  bool take(const KvRegion& from, const KvRegion& to, const std::vector<int>& layers, const Shaped& made);
  // Once all are taken.
  void finish();
  // Of the layers in a range, those of this pass: the first in its list, and how many.
  Range places(Range range) const;
  template <int kTables>
  void launch(Launch<kTables>& parameters, int blocks, CUstream_st* stream) const;

 private:
  const State& route_;
  const Making making_;
  const void* const small_kernel_;
  const void* const large_kernel_;
  Plan plan_{};  // its tables are in device memory
  std::vector<LayerPlace> places_;
  std::vector<RowShape> shapes_;
  std::vector<std::vector<Source>> sources_;  // [copies][origins]
  Plan* on_device_ = nullptr;
};

KvRoute::Pass::Pass(const State& route, const KvRegion& from, const KvRegion& to, Making making)
    : route_(route),
      making_(making),
      small_kernel_(kernel_for<kSmallTables>(making, route.is_checksum, from.layout.dtype, to.layout.dtype)),
      large_kernel_(kernel_for<kMaxPages>(making, route.is_checksum, from.layout.dtype, to.layout.dtype)),
      sources_(size_t(route.copies) * route.replicas) {
  plan_.src = side_of(from, 1);
  plan_.dst = side_of(to, route.replicas);
  for (const void* function : {small_kernel_, large_kernel_}) {
    check_runtime(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(route.max_shared_bytes)), "cudaFuncSetAttribute");
  }
}

KvRoute::Pass::~Pass() {
  const OnDevice on(route_.device);
  for (const void* table : {static_cast<const void*>(plan_.layers), static_cast<const void*>(plan_.keys), static_cast<const void*>(plan_.sources),
                            static_cast<const void*>(plan_.row_shapes), static_cast<const void*>(on_device_)}) {
    cudaFree(const_cast<void*>(table));
  }
}

bool KvRoute::Pass::take(const KvRegion& from, const KvRegion& to, const std::vector<int>& layers, const Shaped& made) {
  if (!(made.making == making_)) return false;
  Plan with = plan_;
  with.origins += made.shape.chunks;
  with.words = std::max(with.words, made.shape.row_bytes / 4);
  with.batch_stride = std::max(with.batch_stride, (made.shape.batch_rows * made.shape.row_bytes + 127) / 128 * 128);
  with.shapes++;
  const bool has_room = put_rows::table_bytes(with) <= kMaxTableBytes && put_rows::shared_bytes(with, kMaxLayers, !route_.is_checksum) <= route_.max_shared_bytes;
  if (!shapes_.empty() && !has_room) return false;
  for (const int layer : layers) places_.push_back({from.layer_offset(layer), to.layer_offset(layer), static_cast<uint32_t>(layer), plan_.shapes});
  shapes_.push_back(made.shape);
  shapes_.back().first_origin = plan_.origins;
  for (size_t copy = 0; copy < sources_.size(); copy++) sources_[copy].insert(sources_[copy].end(), made.sources[copy].begin(), made.sources[copy].end());
  plan_ = with;
  return true;
}

void KvRoute::Pass::finish() {
  std::sort(places_.begin(), places_.end(), [](const LayerPlace& a, const LayerPlace& b) { return a.layer < b.layer; });
  std::vector<uint64_t> keys(plan_.words);
  for (uint32_t word = 0; word < plan_.words; word++) keys[word] = checksum_key(word);
  std::vector<Source> sources;
  for (const std::vector<Source>& one : sources_) sources.insert(sources.end(), one.begin(), one.end());
  plan_.layers = upload(places_);
  plan_.keys = upload(keys);
  plan_.sources = upload(sources);
  plan_.row_shapes = upload(shapes_);
  on_device_ = upload(std::vector<Plan>{plan_});
}

Range KvRoute::Pass::places(Range range) const {
  const auto at = [this](int layer) {
    return static_cast<int>(std::lower_bound(places_.begin(), places_.end(), layer, [](const LayerPlace& place, int wanted) { return int(place.layer) < wanted; }) - places_.begin());
  };
  return {at(range.begin), at(range.end)};
}

template <int kTables>
void KvRoute::Pass::launch(Launch<kTables>& parameters, int blocks, CUstream_st* stream) const {
  parameters.plan = on_device_;
  void* arguments[] = {&parameters};
  const uint32_t units = parameters.layers * ((parameters.end + kUnitTokens - 1) / kUnitTokens - parameters.begin / kUnitTokens);
  // Measured on H200: copies fill the link with one block a multiprocessor, conversions and hashing take two.
  const int wanted = blocks > 0 ? blocks : route_.multiprocessors * (making_.is_copy && !route_.is_checksum ? 1 : 2);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min<uint32_t>(wanted, (units * put_rows::kParts + kWarps - 1) / kWarps), static_cast<uint32_t>(sources_.size()));
  config.blockDim = dim3(put_rows::kThreads);
  config.dynamicSmemBytes = put_rows::shared_bytes(plan_, parameters.layers, !route_.is_checksum);
  config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = route_.overlaps_launches ? 1 : 0;
  check_runtime(cudaLaunchKernelExC(&config, kTables == kSmallTables ? small_kernel_ : large_kernel_, arguments), "launching a KV transfer");
}

void KvRoute::State::build(const KvRegion& from, const KvRegion& to) {
  const OnDevice on(device);
  const auto attribute = [this](cudaDeviceAttr of) {
    int value = 0;
    check_runtime(cudaDeviceGetAttribute(&value, of, device), "cudaDeviceGetAttribute");
    return value;
  };
  multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  max_shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticSharedBytes;
  overlaps_launches = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  src = from.layout;
  dst = to.layout;
  copies = copies_per_page(dst);
  for (const RowGroup& rows : group_layers(src, dst)) {
    const Shaped made = shape_rows(from, to, rows, is_checksum, replicas);
    const bool is_taken = std::any_of(passes.begin(), passes.end(), [&](const auto& pass) { return pass->take(from, to, rows.layers, made); });
    if (is_taken) continue;
    passes.push_back(std::make_unique<Pass>(*this, from, to, made.making));
    passes.back()->take(from, to, rows.layers, made);
  }
  for (const auto& pass : passes) pass->finish();
}

KvRoute::KvRoute(std::unique_ptr<State> state) : state_(std::move(state)) {}
KvRoute::KvRoute(KvRoute&&) noexcept = default;
KvRoute::~KvRoute() = default;

KvRoute::KvRoute(int device, const KvRegion& src, const KvRegion& dst, int replicas) : state_(std::make_unique<State>()) {
  if (replicas != 1 && dst.layout.form != KvForm::mla) refuse("only mla keeps replicas of a page");
  state_->device = device;
  state_->replicas = replicas;
  state_->build(src, dst);
}

KvRoute KvRoute::checksum(int device, const KvRegion& region) {
  auto state = std::make_unique<State>();
  state->device = device;
  state->is_checksum = true;
  state->build(region, region);
  return KvRoute(std::move(state));
}

int KvRoute::copies() const { return state_->copies; }

void KvRoute::put(Range layers, Range tokens, const PageTables& src_pages, const PageTables& dst_pages, uint64_t* checksums, CUstream_st* stream, int blocks) const {
  const OnDevice on(state_->device);
  check_runtime(cudaMemsetAsync(checksums, 0, size_t(pages_of(state_->dst, tokens).size()) * state_->copies * sizeof(uint64_t), stream), "cudaMemsetAsync");
  enqueue(layers, tokens, src_pages, dst_pages, {checksums, nullptr, nullptr, 0}, stream, blocks);
}

void KvRoute::put(Range layers, Range tokens, const PageTables& src_pages, const PageTables& dst_pages, const PutReport& report, CUstream_st* stream, int blocks) const {
  const OnDevice on(state_->device);
  enqueue(layers, tokens, src_pages, dst_pages, report, stream, blocks);
}

void KvRoute::enqueue(Range layers, Range tokens, const PageTables& src_pages, const PageTables& dst_pages, const PutReport& report, CUstream_st* stream, int blocks) const {
  const Range from = pages_of(state_->src, tokens);
  const Range to = pages_of(state_->dst, tokens);
  // What is only read has one table.
  const int entries = from.size() + (state_->is_checksum ? 0 : to.size());
  if (entries > kMaxPages) refuse(std::to_string(entries) + " pages in one launch, at most " + std::to_string(kMaxPages) + " fit; put fewer tokens at a time");
  const auto launch = [&](auto& parameters) {
    parameters.checksums = report.sums;
    parameters.words = static_cast<uint32_t>(to.size() * state_->copies);
    parameters.begin = tokens.begin;
    parameters.end = tokens.end;
    parameters.first_src_page = from.begin;
    parameters.first_dst_page = to.begin;
    parameters.src_rank = src_pages.rank;
    parameters.dst_rank = dst_pages.rank;
    parameters.copies = state_->copies;
    parameters.dst_table = entries - to.size();
    int32_t* id = parameters.tables;
    if (!state_->is_checksum) {
      for (int page = from.begin; page < from.end; page++) *id++ = place_of(state_->src, src_pages, page).page;
    }
    for (int page = to.begin; page < to.end; page++) *id++ = place_of(state_->dst, dst_pages, page).page;
    int left = layers.size();
    for (const auto& pass : state_->passes) {
      const Range places = pass->places(layers);
      for (int first = places.begin; first < places.end; first += kMaxLayers) {
        parameters.first_place = first;
        parameters.layers = std::min(kMaxLayers, places.end - first);
        left -= parameters.layers;
        // What a stream was given before is done when its last is.
        parameters.report = left == 0 ? report : PutReport{report.sums, nullptr, nullptr, 0};
        pass->launch(parameters, blocks, stream);
      }
    }
  };
  if (entries <= kSmallTables) {
    Launch<kSmallTables> parameters;
    launch(parameters);
  } else {
    // Not zeroed.
    const std::unique_ptr<Launch<kMaxPages>> parameters(new Launch<kMaxPages>);
    launch(*parameters);
  }
}

}  // namespace tpla::cuda
