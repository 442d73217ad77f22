#include "kv_transfer.h"

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/kv_row.h"
#include "runtime.h"
#include "transfer/kv_checksum.h"
#include "transfer/reshard.h"

namespace tpla::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// A unit of work: tokens that start at a multiple of 16 and so lie in one page on both sides.
constexpr int kUnitTokens = 16;
constexpr int kParts = 4;
constexpr int kPartTokens = kUnitTokens / kParts;
constexpr int kOctet = 8;
constexpr int kGroupLanes = kFp8ScaleGroup / kOctet;
// Octets a lane loads before it uses the first.
constexpr int kAhead = 8;
// Rows are built in shared memory, two batches a warp: one leaves while the next is made. This is about what one batch takes.
constexpr size_t kBatchBytes = 5632;
// Shared memory holds, beside the batches, a key for each word of a row and a source for each of its chunks.
constexpr size_t kMaxRowBytes = 8 * 1024;
// Of one launch: a place for each in shared memory.
constexpr int kMaxLayers = 128;
// What a small launch carries in its parameters; a large one takes the 32 KiB of CUDA 12.1.
constexpr int kSmallTables = 800;

// Where a chunk of a destination row comes from: byte offset in a row of a source memory; kHolder is the memory of the token's page.
// For octets of fp8 latents `scale` is the offset of their scale.
struct Source {
  int32_t memory;
  int32_t offset;
  int32_t scale;
};

// The same as kernels use it: an address, to which the unit's place is added, and how far from there the scale is.
struct alignas(16) Origin {
  uint64_t at;
  int64_t to_scale;
};

// Shape of destination rows. Kernels take a copy: read through the plan it would be loaded again after every store to shared memory, which
// the compiler must assume to change it.
struct RowShape {
  uint32_t row_bytes;
  uint32_t words;
  uint32_t chunks;         // of a row, or octets where values convert
  uint32_t latent_octets;  // conversions only
  uint32_t octet_slots;    // octets of a row, rounded up so that a scale group never spans two rows
  uint32_t scales_offset;
  uint32_t rope_offset;
  uint32_t batch_rows;
  uint32_t batch_stride;   // bytes of one batch in shared memory
};

struct Side {
  std::byte* base[64];
  uint64_t page_stride;  // bytes of a page of one layer
  uint32_t row_bytes;
  uint32_t page_tokens;
  uint32_t ranks;
  KvForm form;
  KvDType dtype;
};

// Where a layer begins in the memories of either side.
struct alignas(8) LayerPlace {
  uint64_t src;
  uint64_t dst;
  uint32_t layer;
};

// Of the layers of one route whose rows are made alike, in device memory.
struct Plan {
  Side src;
  Side dst;
  RowShape rows;
  const LayerPlace* layers;
  const uint64_t* keys;     // [words]
  const Source* sources;    // [copies][chunks]
};

template <int kTables>
struct Launch {
  const Plan* plan;
  uint64_t* checksums;
  PutReport report;      // host null: nobody is told
  uint32_t words;        // of checksums
  uint32_t first_place;  // of the plan's layers
  uint32_t layers;
  uint32_t begin;
  uint32_t end;
  uint32_t first_src_page;
  uint32_t first_dst_page;
  uint32_t src_rank;
  uint32_t dst_rank;
  uint32_t copies;
  uint32_t dst_table;  // where the destination's page ids begin
  // Page ids of the touched logical pages, in order: the source's, then the destination's.
  int32_t tables[kTables];
};

struct Place {
  uint32_t memory;
  uint64_t offset;  // of the unit's first row
};

template <int kTables>
__device__ Place place_of(const Side& side, const Launch<kTables>& launch, uint32_t table, uint32_t first_page, uint32_t rank, uint64_t layer, uint32_t token) {
  const uint32_t page = token / side.page_tokens;
  Place place;
  place.memory = side.form == KvForm::dcp ? page % side.ranks : side.form == KvForm::dp ? rank : 0;
  const uint32_t id = launch.tables[table + page - first_page];
  place.offset = layer + id * side.page_stride + uint64_t(token - page * side.page_tokens) * side.row_bytes;
  return place;
}

__device__ uint64_t add_over_lanes(uint64_t value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <int kBytes>
struct Chunk;
template <>
struct Chunk<16> {
  using Type = uint4;
};
template <>
struct Chunk<8> {
  using Type = uint2;
};
template <>
struct Chunk<4> {
  using Type = uint32_t;
};

__device__ uint64_t term(uint64_t key, uint32_t word) { return key * word; }
__device__ uint64_t hash(const uint64_t* keys, uint4 v) { return term(keys[0], v.x) + term(keys[1], v.y) + term(keys[2], v.z) + term(keys[3], v.w); }
__device__ uint64_t hash(const uint64_t* keys, uint2 v) { return term(keys[0], v.x) + term(keys[1], v.y); }
__device__ uint64_t hash(const uint64_t* keys, uint32_t v) { return term(keys[0], v); }

// Work of one warp: the rows of a unit for one copy.
struct Unit {
  LayerPlace at;
  uint32_t begin;
  uint32_t end;
};

// How units are dealt to warps: one each as often as there is one for every warp, then what is left over in quarters, or most warps would wait a
// whole turn for the few that have another unit.
class Deal {
 public:
  template <int kTables>
  __device__ explicit Deal(const Launch<kTables>& launch)
      : per_layer_((launch.end + kUnitTokens - 1) / kUnitTokens - launch.begin / kUnitTokens), first_(launch.begin / kUnitTokens) {
    const uint32_t units = launch.layers * per_layer_;
    whole_ = units - units % (gridDim.x * kWarps);
    size_ = whole_ + (units - whole_) * kParts;
  }

  // The index of this warp's first, and how far it is to its next.
  __device__ static uint32_t begin() { return blockIdx.x * kWarps + threadIdx.x / 32; }
  __device__ static uint32_t step() { return gridDim.x * kWarps; }
  __device__ uint32_t end() const { return size_; }

  // Has no rows where the part lies outside the launch.
  template <int kTables>
  __device__ Unit operator()(const Launch<kTables>& launch, const LayerPlace* places, uint32_t index) const {
    const bool is_part = index >= whole_;
    const uint32_t rest = index - whole_;
    const uint32_t unit = is_part ? whole_ + rest / kParts : index;
    const uint32_t layer = unit / per_layer_;
    const uint32_t start = (first_ + unit - layer * per_layer_) * kUnitTokens + (is_part ? rest % kParts * kPartTokens : 0);
    const uint32_t begin = max(launch.begin, start);
    const uint32_t end = min(launch.end, start + (is_part ? kPartTokens : kUnitTokens));
    return {places[layer], begin, max(begin, end)};
  }

 private:
  uint32_t per_layer_;
  uint32_t first_;
  uint32_t whole_;
  uint32_t size_;
};

struct Shared {
  std::byte* batches;  // of this warp, two
  uint64_t* keys;
  Origin* origins;
  LayerPlace* places;  // of the launch's layers: from device memory each unit would wait for its own
};

template <int kTables>
__device__ Shared load_shared(const Plan& plan, const RowShape& rows, const Launch<kTables>& launch, uint32_t copy, bool builds) {
  extern __shared__ __align__(128) std::byte shared[];
  Shared views;
  views.batches = shared + threadIdx.x / 32 * 2 * rows.batch_stride;
  views.origins = reinterpret_cast<Origin*>(shared + (builds ? kWarps * 2 * rows.batch_stride : 0));
  views.keys = reinterpret_cast<uint64_t*>(views.origins + rows.chunks);
  views.places = reinterpret_cast<LayerPlace*>(views.keys + rows.words);
  for (uint32_t i = threadIdx.x; i < rows.words; i += kThreads) views.keys[i] = plan.keys[i];
  for (uint32_t i = threadIdx.x; i < launch.layers; i += kThreads) views.places[i] = plan.layers[launch.first_place + i];
  for (uint32_t i = threadIdx.x; i < rows.chunks; i += kThreads) {
    const Source source = plan.sources[copy * rows.chunks + i];
    const uint64_t base = source.memory == kHolder ? 0 : reinterpret_cast<uint64_t>(plan.src.base[source.memory]);
    views.origins[i] = {base + source.offset, int64_t(source.scale) - source.offset};
  }
  __syncthreads();
  return views;
}

// What a unit's place adds to an origin. Pages of dcp and dp are whole on their holder, so its memory serves every chunk.
__device__ uint64_t unit_address(const Side& src, const Place& place) {
  const bool has_holder = src.form == KvForm::dcp || src.form == KvForm::dp;
  return place.offset + (has_holder ? reinterpret_cast<uint64_t>(src.base[place.memory]) : 0);
}

// First destination row of a unit, for the memory that holds this copy. A copy past the hashed ones is a replica of mla.
__device__ std::byte* dst_base(const Side& dst, uint32_t copy, const Place& place) {
  const bool is_ranked = dst.form == KvForm::tpla || dst.form == KvForm::mla;
  return dst.base[is_ranked ? copy : place.memory] + place.offset;
}

__device__ uint32_t checksum_copy(const Side& dst, uint32_t copy) { return dst.form == KvForm::tpla ? copy : 0; }

template <int kTables>
__device__ void add_checksum(const Launch<kTables>& launch, const Side& dst, const Unit& unit, uint32_t copy, uint64_t sum, int lane) {
  if (lane != 0 || copy >= launch.copies) return;
  const uint32_t page = unit.begin / dst.page_tokens - launch.first_dst_page;
  atomicAdd(reinterpret_cast<unsigned long long*>(launch.checksums + page * launch.copies + copy), static_cast<unsigned long long>(sum));
}

// After a block's last put: the block that comes here last tells the host. What the others wrote, to whatever memory, is there by then: each
// has made its writes visible to the system before it took a ticket.
template <int kTables>
__device__ void tell_host(const Launch<kTables>& launch) {
  const PutReport& report = launch.report;
  if (report.host == nullptr) return;
  __shared__ bool is_last;
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    is_last = atomicAdd(report.ticket, 1) == gridDim.x * gridDim.y - 1;
    __threadfence_system();
  }
  __syncthreads();
  if (!is_last) return;
  for (uint32_t word = threadIdx.x; word < launch.words; word += kThreads) {
    report.host[1 + word] = __ldcg(reinterpret_cast<const unsigned long long*>(launch.checksums + word));
    launch.checksums[word] = 0;
  }
  if (threadIdx.x == 0) *report.ticket = 0;
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) *reinterpret_cast<volatile uint64_t*>(report.host) = report.turn;
}

// What leaves a warp: whole batches of rows that stand together at the destination, by the bulk copy engine where there is one (a few
// multiprocessors then fill a link), else by wide stores.
class Outbox {
 public:
  __device__ Outbox(std::byte* batches, uint32_t stride, int lane) : batches_(batches), stride_(stride), lane_(lane) {}

  // The batch to build next; what left it before has been read.
  __device__ std::byte* next() {
#if __CUDA_ARCH__ >= 900
    if (lane_ == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
#endif
    __syncwarp();
    turn_ ^= 1;
    return batches_ + turn_ * stride_;
  }

  // Sends the batch just built by all lanes. It may be read on, and not written before next() has come to it again.
  __device__ void send(const std::byte* batch, std::byte* to, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    if ((reinterpret_cast<uintptr_t>(to) | bytes) % 16 == 0) {
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncwarp();
      if (lane_ == 0) {
        const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(batch));
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
      return;
    }
#endif
    __syncwarp();
    const uintptr_t alignment = reinterpret_cast<uintptr_t>(to) | bytes;
    if (alignment % 16 == 0) store<uint4>(batch, to, bytes);
    else if (alignment % 8 == 0) store<uint2>(batch, to, bytes);
    else store<uint32_t>(batch, to, bytes);
#if __CUDA_ARCH__ >= 900
    // An empty group keeps next() counting batches.
    if (lane_ == 0) asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
  }

  __device__ void finish() {
#if __CUDA_ARCH__ >= 900
    if (lane_ == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
  }

 private:
  template <class Word>
  __device__ void store(const std::byte* from, std::byte* to, uint32_t bytes) const {
    for (uint32_t at = lane_ * sizeof(Word); at < bytes; at += 32 * sizeof(Word)) *reinterpret_cast<Word*>(to + at) = *reinterpret_cast<const Word*>(from + at);
  }

  std::byte* const batches_;
  const uint32_t stride_;
  const int lane_;
  uint32_t turn_ = 1;
};

// Lanes over rows: 128 bytes of a row at a time by 128 / kBytes lanes, the 32 lanes over several rows.
template <int kBytes>
struct RowLanes {
  static constexpr int kPerRow = 128 / kBytes;
  static constexpr int kRows = 32 / kPerRow;
  uint32_t row;
  uint32_t chunk;
  __device__ explicit RowLanes(int lane) : row(lane / kPerRow), chunk(lane % kPerRow) {}
};

// No value changes. Without kStores the rows are hashed where they are.
template <int kBytes, bool kStores, int kTables>
__global__ void __launch_bounds__(kThreads) copy_rows(const __grid_constant__ Launch<kTables> launch) {
  using Word = typename Chunk<kBytes>::Type;
  using Lanes = RowLanes<kBytes>;
  constexpr int kInFlight = 5;
  const Plan& plan = *launch.plan;
  const RowShape shape = plan.rows;
  const uint32_t copy = blockIdx.y;
  const uint32_t hashed_copy = checksum_copy(plan.dst, copy);
  const uint32_t src_row_bytes = plan.src.row_bytes;
  const Shared shared = load_shared(plan, shape, launch, copy, kStores);
  const int lane = threadIdx.x % 32;
  const Lanes lanes(lane);
  Outbox outbox(shared.batches, shape.batch_stride, lane);
  const Deal deal(launch);

  for (uint32_t index = Deal::begin(); index < deal.end(); index += Deal::step()) {
    const Unit unit = deal(launch, shared.places, index);
    if (unit.begin == unit.end) continue;
    const Place from = place_of(plan.src, launch, 0, launch.first_src_page, launch.src_rank, unit.at.src, unit.begin);
    const Place to = place_of(plan.dst, launch, launch.dst_table, launch.first_dst_page, launch.dst_rank, unit.at.dst, unit.begin);
    const uint64_t src_rows = unit_address(plan.src, from);
    std::byte* const dst_rows = dst_base(plan.dst, copy, to);
    const uint32_t rows = unit.end - unit.begin;
    uint64_t sum = 0;
    for (uint32_t batch = 0; batch < rows; batch += shape.batch_rows) {
      const uint32_t count = min(shape.batch_rows, rows - batch);
      std::byte* const built = kStores ? outbox.next() : nullptr;
      // All lanes of the warp take every turn: the hash is added up across them.
      for (uint32_t first = 0; first < count; first += Lanes::kRows) {
        const uint32_t row = first + lanes.row;
        const bool is_live = row < count;
        uint64_t row_hash = 0;
        if (is_live) {
          const uint64_t src_row = src_rows + (batch + row) * src_row_bytes;
          for (uint32_t chunk = lanes.chunk; chunk < shape.chunks; chunk += kInFlight * Lanes::kPerRow) {
            Word data[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; i++) {
              const uint32_t at = chunk + i * Lanes::kPerRow;
              if (at >= shape.chunks) break;
              data[i] = __ldcs(reinterpret_cast<const Word*>(shared.origins[at].at + src_row));
            }
#pragma unroll
            for (int i = 0; i < kInFlight; i++) {
              const uint32_t at = chunk + i * Lanes::kPerRow;
              if (at >= shape.chunks) break;
              if (kStores) *reinterpret_cast<Word*>(built + row * shape.row_bytes + at * kBytes) = data[i];
              row_hash += hash(shared.keys + at * (kBytes / 4), data[i]);
            }
          }
        }
        row_hash = add_over_lanes(row_hash, Lanes::kPerRow);
        if (is_live && lanes.chunk == 0) sum += row_value(row_hash, hashed_copy, unit.at.layer, unit.begin + batch + row);
      }
      if (kStores) outbox.send(built, dst_rows + batch * shape.row_bytes, count * shape.row_bytes);
    }
    add_checksum(launch, plan.dst, unit, copy, add_over_lanes(sum, 32), lane);
  }
  if (kStores) outbox.finish();
  tell_host(launch);
}

// Checksum of rows that stand together in shared memory; this lane's share.
template <int kBytes>
__device__ uint64_t hash_batch(const std::byte* batch, uint32_t rows, uint32_t row_bytes, const uint64_t* keys, uint32_t copy, uint32_t layer, uint32_t token, int lane) {
  using Word = typename Chunk<kBytes>::Type;
  using Lanes = RowLanes<kBytes>;
  const Lanes lanes(lane);
  uint64_t sum = 0;
  for (uint32_t first = 0; first < rows; first += Lanes::kRows) {
    const uint32_t row = first + lanes.row;
    const bool is_live = row < rows;
    uint64_t row_hash = 0;
    if (is_live) {
      for (uint32_t chunk = lanes.chunk; chunk < row_bytes / kBytes; chunk += Lanes::kPerRow) {
        row_hash += hash(keys + chunk * (kBytes / 4), *reinterpret_cast<const Word*>(batch + row * row_bytes + chunk * kBytes));
      }
    }
    row_hash = add_over_lanes(row_hash, Lanes::kPerRow);
    if (is_live && lanes.chunk == 0) sum += row_value(row_hash, copy, layer, token + row);
  }
  return sum;
}

// Consecutive words at an alignment known at compile time.
template <int kAlign, int kCount>
__device__ void load_words(const std::byte* from, uint32_t* words) {
  constexpr int kBytes = kAlign < kCount * 4 ? kAlign : kCount * 4;
  using Word = typename Chunk<kBytes>::Type;
#pragma unroll
  for (int i = 0; i < kCount; i += kBytes / 4) *reinterpret_cast<Word*>(&words[i]) = __ldcs(reinterpret_cast<const Word*>(from + i * 4));
}

// Eight values of a row as the source stores them.
template <KvDType kDType>
struct RawOctet {
  alignas(16) uint32_t words[kDType == KvDType::f32 ? 8 : 4];
  float scale;

  template <int kAlign>
  __device__ void load(const Origin& origin, uint64_t row, bool is_rope) {
    const auto* from = reinterpret_cast<const std::byte*>(origin.at + row);
    if constexpr (kDType == KvDType::f32) {
      load_words<kAlign, 8>(from, words);
    } else if (kDType == KvDType::bf16 || is_rope) {
      load_words<kAlign, 4>(from, words);
    } else {
      load_words<kAlign, 2>(from, words);
      scale = __ldg(reinterpret_cast<const float*>(from + origin.to_scale));
    }
  }

  __device__ void decode(bool is_rope, float (&values)[kOctet]) const {
    if constexpr (kDType == KvDType::f32) {
#pragma unroll
      for (int i = 0; i < kOctet; i++) values[i] = __uint_as_float(words[i]);
    } else if (kDType == KvDType::bf16 || is_rope) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        values[2 * i] = __uint_as_float(words[i] << 16);
        values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (i % 2 * 16)), __NV_E4M3);
        const float2 pair = __half22float2(__half2(halves));
        values[2 * i] = pair.x * scale;
        values[2 * i + 1] = pair.y * scale;
      }
    }
  }
};

__device__ uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Largest magnitude of the scale group that 16 lanes hold together; NaN counts for nothing.
__device__ float group_amax(const float (&values)[kOctet], bool counts) {
  float amax = 0;
  if (counts) {
#pragma unroll
    for (int i = 0; i < kOctet; i++) amax = fmaxf(amax, fabsf(values[i]));
  }
#pragma unroll
  for (int step = kGroupLanes / 2; step > 0; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
  return amax;
}

// core/numeric.h: smallest power of two s with amax / s <= 448.
__device__ float e4m3_scale_of(float amax) {
  if (!(amax > 0)) return 1.0f;
  const uint32_t bits = __float_as_uint(amax);
  const int exponent = int(bits >> 23) - 8 + ((bits & 0x7fffffu) > 0x600000u ? 1 : 0);
  return __uint_as_float(uint32_t(min(max(exponent, 1), 254)) << 23);
}

// Eight values into the row that is being built, where they stand in the destination's dtype.
template <KvDType kTo>
__device__ void encode_octet(const RowShape& shape, std::byte* row, uint32_t octet, bool is_live, const float (&values)[kOctet]) {
  constexpr int kValueBytes = kTo == KvDType::f32 ? 4 : 2;
  const bool is_rope = octet >= shape.latent_octets;
  if constexpr (kTo == KvDType::fp8) {
    const float scale = e4m3_scale_of(group_amax(values, is_live && !is_rope));
    if (is_live && !is_rope) {
      // Of a power of two between 2^-126 and 2^120.
      const float inverse = __uint_as_float((254u << 23) - __float_as_uint(scale));
      uint32_t codes[2] = {};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 pair = make_float2(values[2 * i] * inverse, values[2 * i + 1] * inverse);
        codes[i / 2] |= uint32_t(__nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3)) << (i % 2 * 16);
      }
      auto* at = reinterpret_cast<uint32_t*>(row + octet * kOctet);
      at[0] = codes[0];
      at[1] = codes[1];
      if (octet % kGroupLanes == 0) *reinterpret_cast<float*>(row + shape.scales_offset + octet / kGroupLanes * 4) = scale;
      return;
    }
  }
  if (!is_live) return;
  const uint32_t offset = is_rope ? shape.rope_offset + (octet - shape.latent_octets) * kOctet * kValueBytes : octet * kOctet * kValueBytes;
  auto* at = reinterpret_cast<uint32_t*>(row + offset);
#pragma unroll
  for (int i = 0; i < kOctet * kValueBytes / 4; i++) {
    if constexpr (kTo == KvDType::f32) at[i] = __float_as_uint(values[i]);
    else at[i] = bf16_pair(values[2 * i], values[2 * i + 1]);
  }
}

// Which octet of which row of a batch a lane works on.
struct Slot {
  uint32_t row;
  uint32_t octet;

  __device__ Slot(uint32_t index, uint32_t octet_slots) : row(index / octet_slots), octet(index - row * octet_slots) {}
  // By a warp's width; without a division, which costs as much as converting.
  __device__ void advance(uint32_t octet_slots) {
    for (octet += 32; octet >= octet_slots; octet -= octet_slots) row++;
  }
};

// Values change: eight a lane. kLoad is the alignment of the source's octets. Loads are volatile and stay in order with shuffles, so those of
// several turns are issued before the first value is used: one turn's alone would leave the warp waiting for memory.
template <int kLoad, KvDType kFrom, KvDType kTo, int kTables>
__global__ void __launch_bounds__(kThreads, 2) convert_rows(const __grid_constant__ Launch<kTables> launch) {
  const Plan& plan = *launch.plan;
  const RowShape shape = plan.rows;
  const uint32_t copy = blockIdx.y;
  const uint32_t hashed_copy = checksum_copy(plan.dst, copy);
  const uint32_t src_row_bytes = plan.src.row_bytes;
  const Shared shared = load_shared(plan, shape, launch, copy, true);
  const int lane = threadIdx.x % 32;
  Outbox outbox(shared.batches, shape.batch_stride, lane);
  const Deal deal(launch);

  for (uint32_t index = Deal::begin(); index < deal.end(); index += Deal::step()) {
    const Unit unit = deal(launch, shared.places, index);
    if (unit.begin == unit.end) continue;
    const Place from = place_of(plan.src, launch, 0, launch.first_src_page, launch.src_rank, unit.at.src, unit.begin);
    const Place to = place_of(plan.dst, launch, launch.dst_table, launch.first_dst_page, launch.dst_rank, unit.at.dst, unit.begin);
    const uint64_t src_rows = unit_address(plan.src, from);
    std::byte* const dst_rows = dst_base(plan.dst, copy, to);
    const uint32_t rows = unit.end - unit.begin;
    uint64_t sum = 0;
    for (uint32_t batch = 0; batch < rows; batch += shape.batch_rows) {
      const uint32_t count = min(shape.batch_rows, rows - batch);
      std::byte* const built = outbox.next();
      const uint32_t turns = (count * shape.octet_slots + 31) / 32;
      Slot slot(lane, shape.octet_slots);
      for (uint32_t turn = 0; turn < turns; turn += kAhead) {
        Slot next = slot;
        RawOctet<kFrom> raw[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++, next.advance(shape.octet_slots)) {
          if (next.row >= count || next.octet >= shape.chunks) continue;
          raw[i].template load<kLoad>(shared.origins[next.octet], src_rows + (batch + next.row) * src_row_bytes, next.octet >= shape.latent_octets);
        }
#pragma unroll
        for (int i = 0; i < kAhead; i++, slot.advance(shape.octet_slots)) {
          if (turn + i >= turns) break;
          float values[kOctet];
          raw[i].decode(slot.octet >= shape.latent_octets, values);
          encode_octet<kTo>(shape, built + slot.row * shape.row_bytes, slot.octet, slot.row < count && slot.octet < shape.chunks, values);
        }
      }
      __syncwarp();
      outbox.send(built, dst_rows + batch * shape.row_bytes, count * shape.row_bytes);
      const uint32_t token = unit.begin + batch;
      if (shape.row_bytes % 16 == 0) sum += hash_batch<16>(built, count, shape.row_bytes, shared.keys, hashed_copy, unit.at.layer, token, lane);
      else if (shape.row_bytes % 8 == 0) sum += hash_batch<8>(built, count, shape.row_bytes, shared.keys, hashed_copy, unit.at.layer, token, lane);
      else sum += hash_batch<4>(built, count, shape.row_bytes, shared.keys, hashed_copy, unit.at.layer, token, lane);
    }
    add_checksum(launch, plan.dst, unit, copy, add_over_lanes(sum, 32), lane);
  }
  outbox.finish();
  tell_host(launch);
}

[[noreturn]] void refuse(const std::string& message) { throw Error("REQUEST_INVALID", "KV transfer on GPU: " + message); }

int bases_of(const RowLayout& layout, int replicas) { return layout.form == KvForm::mla ? replicas : layout.ranks; }

Side side_of(const KvRegion& region, const RowLayout& row, int replicas) {
  Side side{};
  std::copy_n(region.base, bases_of(row, replicas), side.base);
  side.page_stride = row.bytes() * region.layout.page_tokens;
  side.row_bytes = static_cast<uint32_t>(row.bytes());
  side.page_tokens = region.layout.page_tokens;
  side.ranks = region.layout.ranks;
  side.form = region.layout.form;
  side.dtype = region.layout.dtype;
  return side;
}

// Largest of 16, 8 and 4 that divides all of it; 0 where not even 4 does.
class Alignment {
 public:
  void take(size_t value) { divisor_ = std::gcd(divisor_, value); }
  void take(const Side& side, int bases) {
    take(side.row_bytes);
    for (int i = 0; i < bases; i++) take(reinterpret_cast<uintptr_t>(side.base[i]));
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

}  // namespace

// Layers whose rows are made alike: one plan, one launch a put.
struct KvRoute::Group {
  Group(const State& route, const KvRegion& from, const KvRegion& to, RowGroup rows);
  ~Group() {
    const OnDevice on(device);
    cudaFree(plan);
    cudaFree(layers);
    cudaFree(keys);
    cudaFree(sources);
  }
  Group(const Group&) = delete;

  void plan_chunks(Plan& host, const std::vector<RowPlan>& plans, int replicas);
  void plan_octets(Plan& host, const std::vector<RowPlan>& plans, int replicas);
  template <int kTables>
  const void* kernel() const;
  // Of the layers in a range, those of this group: the first in its list, and how many.
  Range places(Range range) const;
  template <int kTables>
  void launch(Launch<kTables>& parameters, int blocks, CUstream_st* stream) const;

  const RowGroup rows;
  const int device;
  const int multiprocessors;
  const int copies;  // with replicas
  const bool is_checksum;
  bool is_copy = true;
  int chunk_bytes = 16;  // where no value changes
  int load_bytes = 16;   // of an octet's parts, where values convert
  size_t shared_bytes = 0;  // without the places of a launch's layers
  Plan* plan = nullptr;
  LayerPlace* layers = nullptr;
  uint64_t* keys = nullptr;
  Source* sources = nullptr;
};

struct KvRoute::State {
  int device = 0;
  int multiprocessors = 0;
  KvLayout src;
  KvLayout dst;
  int copies = 1;    // hashed
  int replicas = 1;  // of an mla page, written
  bool is_checksum = false;
  std::vector<std::unique_ptr<Group>> groups;

  void build(const KvRegion& from, const KvRegion& to);
};

void KvRoute::State::build(const KvRegion& from, const KvRegion& to) {
  const OnDevice on(device);
  check_runtime(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  src = from.layout;
  dst = to.layout;
  copies = copies_per_page(dst);
  for (RowGroup& rows : group_layers(src, dst)) groups.push_back(std::make_unique<Group>(*this, from, to, std::move(rows)));
}

KvRoute::Group::Group(const State& route, const KvRegion& from, const KvRegion& to, RowGroup of)
    : rows(std::move(of)), device(route.device), multiprocessors(route.multiprocessors), copies(route.copies * route.replicas), is_checksum(route.is_checksum) {
  const RowLayout& src = rows.src;
  const RowLayout& dst = rows.dst;
  const std::vector<RowPlan> plans = is_checksum ? plan_reading(dst) : plan_reshard(src, dst);
  is_copy = std::all_of(plans.begin(), plans.end(), [](const RowPlan& row) { return row.is_copy; });
  const size_t longest = std::max(src.bytes(), dst.bytes());
  if (longest > kMaxRowBytes) refuse("a row takes " + std::to_string(longest) + " bytes, at most " + std::to_string(kMaxRowBytes) + " are supported");

  Plan host{};
  host.src = side_of(from, src, 1);
  host.dst = side_of(to, dst, route.replicas);
  host.rows.row_bytes = host.dst.row_bytes;
  host.rows.words = host.dst.row_bytes / 4;
  if (src.dtype == dst.dtype && src.dtype != KvDType::fp8 && !is_copy) refuse("columns are cut within 32-bit words; this one needs the CPU path");
  if (is_copy) plan_chunks(host, plans, route.replicas);
  else plan_octets(host, plans, route.replicas);
  host.rows.batch_rows = kUnitTokens;
  while (host.rows.batch_rows > 1 && host.rows.batch_rows * dst.bytes() > kBatchBytes) host.rows.batch_rows /= 2;
  host.rows.batch_stride = static_cast<uint32_t>((host.rows.batch_rows * dst.bytes() + 127) / 128 * 128);

  std::vector<Source> table;
  for (const RowPlan& row : plans) {
    const std::vector<Source> one = is_copy ? chunk_sources(row, host.rows.chunks, chunk_bytes) : octet_sources(row, src, host.rows.latent_octets, host.rows.chunks - host.rows.latent_octets);
    for (int replica = 0; replica < route.replicas; replica++) table.insert(table.end(), one.begin(), one.end());
  }
  std::vector<uint64_t> key_table(host.rows.words);
  for (uint32_t word = 0; word < host.rows.words; word++) key_table[word] = checksum_key(word);
  std::vector<LayerPlace> places;
  for (const int layer : rows.layers) places.push_back({from.layer_offset(layer), to.layer_offset(layer), static_cast<uint32_t>(layer)});
  shared_bytes = (is_checksum ? 0 : kWarps * 2 * host.rows.batch_stride) + key_table.size() * sizeof(uint64_t) + host.rows.chunks * sizeof(Origin);
  host.layers = layers = upload(places);
  host.keys = keys = upload(key_table);
  host.sources = sources = upload(table);
  plan = upload(std::vector<Plan>{host});
}

void KvRoute::Group::plan_chunks(Plan& host, const std::vector<RowPlan>& plans, int replicas) {
  Alignment alignment;
  alignment.take(host.src, bases_of(rows.src, 1));
  alignment.take(host.dst, bases_of(rows.dst, replicas));
  for (const RowPlan& plan : plans) {
    for (const ByteSegment& segment : plan.segments) {
      for (const size_t offset : {segment.src_offset, segment.dst_offset, segment.bytes}) alignment.take(offset);
    }
  }
  chunk_bytes = alignment.bytes();
  if (chunk_bytes == 0) refuse("rows or memories are not aligned to 4 bytes");
  host.rows.chunks = host.rows.words * 4 / chunk_bytes;
}

void KvRoute::Group::plan_octets(Plan& host, const std::vector<RowPlan>& plans, int replicas) {
  const RowLayout& src = rows.src;
  const RowLayout& dst = rows.dst;
  for (const RowPlan& plan : plans) {
    for (const LatentPiece& piece : plan.pieces) {
      for (const int columns : {piece.src_column, piece.dst_column, piece.columns, src.rope}) {
        if (columns % kOctet == 0) continue;
        refuse("a conversion takes latent widths, slices, shared columns and rope in multiples of " + std::to_string(kOctet) + "; this one needs the CPU path");
      }
    }
  }
  Alignment loads;
  loads.take(host.src, bases_of(src, 1));
  loads.take(rope_offset(src));
  Alignment stores;
  stores.take(host.dst, bases_of(dst, replicas));
  load_bytes = loads.bytes();
  if (load_bytes == 0 || stores.bytes() == 0) refuse("rows or memories are not aligned to 4 bytes");
  host.rows.latent_octets = dst.width() / kOctet;
  host.rows.chunks = host.rows.latent_octets + dst.rope / kOctet;
  host.rows.octet_slots = (host.rows.chunks + kGroupLanes - 1) / kGroupLanes * kGroupLanes;
  host.rows.scales_offset = static_cast<uint32_t>(fp8_scales_offset(dst.width()));
  host.rows.rope_offset = static_cast<uint32_t>(rope_offset(dst));
}

Range KvRoute::Group::places(Range range) const {
  const auto at = [this](int layer) { return static_cast<int>(std::lower_bound(rows.layers.begin(), rows.layers.end(), layer) - rows.layers.begin()); };
  return {at(range.begin), at(range.end)};
}

template <int kTables, KvDType kFrom, KvDType kTo>
const void* convert_kernel(int load_bytes) {
  return load_bytes == 16 ? reinterpret_cast<const void*>(&convert_rows<16, kFrom, kTo, kTables>) : reinterpret_cast<const void*>(&convert_rows<4, kFrom, kTo, kTables>);
}

template <int kTables, bool kStores>
const void* copy_kernel(int chunk_bytes) {
  switch (chunk_bytes) {
    case 16: return reinterpret_cast<const void*>(&copy_rows<16, kStores, kTables>);
    case 8: return reinterpret_cast<const void*>(&copy_rows<8, kStores, kTables>);
    default: return reinterpret_cast<const void*>(&copy_rows<4, kStores, kTables>);
  }
}

template <int kTables>
const void* KvRoute::Group::kernel() const {
  if (is_checksum) return copy_kernel<kTables, false>(chunk_bytes);
  if (is_copy) return copy_kernel<kTables, true>(chunk_bytes);
  constexpr KvDType f32 = KvDType::f32, bf16 = KvDType::bf16, fp8 = KvDType::fp8;
  const KvDType from = rows.src.dtype, to = rows.dst.dtype;
  if (from == f32) return to == bf16 ? convert_kernel<kTables, f32, bf16>(load_bytes) : convert_kernel<kTables, f32, fp8>(load_bytes);
  if (from == bf16) return to == f32 ? convert_kernel<kTables, bf16, f32>(load_bytes) : convert_kernel<kTables, bf16, fp8>(load_bytes);
  if (to == f32) return convert_kernel<kTables, fp8, f32>(load_bytes);
  return to == bf16 ? convert_kernel<kTables, fp8, bf16>(load_bytes) : convert_kernel<kTables, fp8, fp8>(load_bytes);
}

template <int kTables>
void KvRoute::Group::launch(Launch<kTables>& parameters, int blocks, CUstream_st* stream) const {
  void* arguments[] = {&parameters};
  const uint32_t units = parameters.layers * ((parameters.end + kUnitTokens - 1) / kUnitTokens - parameters.begin / kUnitTokens);
  // Measured on H200: copies fill the link with one block a multiprocessor, conversions and hashing take two.
  const int wanted = blocks > 0 ? blocks : multiprocessors * (is_copy && !is_checksum ? 1 : 2);
  const dim3 grid(std::min<uint32_t>(wanted, (units * kParts + kWarps - 1) / kWarps), copies);
  const void* function = kernel<kTables>();
  const size_t bytes = shared_bytes + parameters.layers * sizeof(LayerPlace);
  if (bytes > 48 * 1024) check_runtime(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), "cudaFuncSetAttribute");
  check_runtime(cudaLaunchKernel(function, grid, dim3(kThreads), arguments, bytes, stream), "launching a KV transfer");
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
  const int entries = from.size() + to.size();
  if (entries > kMaxPages) refuse(std::to_string(entries) + " pages in one launch, at most " + std::to_string(kMaxPages) + " fit; put fewer tokens at a time");
  const auto fill = [&](auto& parameters) {
    parameters.checksums = report.sums;
    parameters.words = static_cast<uint32_t>(to.size() * state_->copies);
    parameters.begin = tokens.begin;
    parameters.end = tokens.end;
    parameters.first_src_page = from.begin;
    parameters.first_dst_page = to.begin;
    parameters.src_rank = src_pages.rank;
    parameters.dst_rank = dst_pages.rank;
    parameters.copies = state_->copies;
    parameters.dst_table = from.size();
    int32_t* id = parameters.tables;
    for (int page = from.begin; page < from.end; page++) *id++ = place_of(state_->src, src_pages, page).page;
    for (int page = to.begin; page < to.end; page++) *id++ = place_of(state_->dst, dst_pages, page).page;
    int left = layers.size();
    for (const auto& group : state_->groups) {
      const Range places = group->places(layers);
      parameters.plan = group->plan;
      for (int first = places.begin; first < places.end; first += kMaxLayers) {
        parameters.first_place = first;
        parameters.layers = std::min(kMaxLayers, places.end - first);
        left -= parameters.layers;
        // What a stream was given before is done when its last is.
        parameters.report = left == 0 ? report : PutReport{report.sums, nullptr, nullptr, 0};
        group->launch(parameters, blocks, stream);
      }
    }
  };
  if (entries <= kSmallTables) {
    Launch<kSmallTables> parameters;
    fill(parameters);
  } else {
    auto parameters = std::make_unique<Launch<kMaxPages>>();
    fill(*parameters);
  }
}

}  // namespace tpla::cuda
