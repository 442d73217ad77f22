// The one kernel of the hand-off: a warp gathers rows of a unit, makes them as the destination has them, sends them off, and hashes them on the way.
// kv_transfer.cu plans and launches it; how rows are made is a parameter (CopiedRows, ConvertedRows).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/kv_layout.h"
#include "e4m3.cuh"
#include "kv_transfer.h"
#include "transfer/kv_checksum.h"
#include "transfer/reshard.h"

namespace tpla::cuda {

namespace put_rows {

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

// Where a chunk of a destination row comes from: byte offset in a row of a source memory; kHolder is the memory of the token's page.
// For octets of fp8 latents `scale` is the offset of their scale.
struct Source {
  int32_t memory;
  int32_t offset;
  int32_t scale;
};

// The same as the kernel uses it: an address, to which the unit's place is added, and how far from there the scale is.
struct alignas(16) Origin {
  uint64_t at;
  int64_t to_scale;
};

// Rows that are made alike: layers may differ in the width of their rows. Kept in shared memory; a warp takes a copy with each unit, as what is read
// from there is read again after every store, which the compiler must assume to change it.
struct RowShape {
  uint64_t src_page_stride;  // bytes of a page of one layer
  uint64_t dst_page_stride;
  uint32_t src_row_bytes;
  uint32_t row_bytes;
  uint32_t chunks;         // of a row, or octets where values convert
  uint32_t first_origin;   // of its chunks, among those of all shapes
  uint32_t latent_octets;  // conversions only
  uint32_t octet_slots;    // octets of a row, rounded up so that a scale group never spans two rows
  uint32_t scales_offset;
  uint32_t rope_offset;
  uint32_t batch_rows;
};

struct Side {
  std::byte* base[64];
  uint32_t page_tokens;
  uint32_t ranks;
  KvForm form;
};

// Where a layer begins in the memories of either side, and how its rows are made.
struct LayerPlace {
  uint64_t src;
  uint64_t dst;
  uint32_t layer;
  uint32_t shape;
};

// Layers that one launch can take, in device memory.
struct Plan {
  Side src;
  Side dst;
  uint32_t words;         // of the longest row
  uint32_t origins;       // chunks of all shapes together
  uint32_t shapes;
  uint32_t batch_stride;  // bytes of one batch in shared memory
  const LayerPlace* layers;
  const uint64_t* keys;         // [words]
  const Source* sources;        // [copies][origins]
  const RowShape* row_shapes;   // [shapes]
};

// Of a block's dynamic shared memory: what it knows of rows, and with its batches (none where rows are only hashed) and layers all of it.
inline size_t table_bytes(const Plan& plan) { return plan.origins * sizeof(Origin) + plan.words * sizeof(uint64_t) + plan.shapes * sizeof(RowShape); }
inline size_t shared_bytes(const Plan& plan, uint32_t layers, bool builds) {
  return (builds ? kWarps * 2 * plan.batch_stride : 0) + table_bytes(plan) + layers * sizeof(LayerPlace);
}

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
  // Page ids of the touched logical pages, in order: the source's, then the destination's, unless they are the same.
  int32_t tables[kTables];
};

struct Place {
  uint32_t memory;
  uint64_t offset;  // of the unit's first row
};

template <int kTables>
__device__ Place place_of(const Side& side, const Launch<kTables>& launch, uint32_t table, uint32_t first_page, uint32_t rank, uint64_t layer, uint64_t page_stride,
                          uint32_t row_bytes, uint32_t token) {
  const uint32_t page = token / side.page_tokens;
  Place place;
  place.memory = side.form == KvForm::dcp ? page % side.ranks : side.form == KvForm::dp ? rank : 0;
  const uint32_t id = launch.tables[table + page - first_page];
  place.offset = layer + id * page_stride + uint64_t(token - page * side.page_tokens) * row_bytes;
  return place;
}

__device__ inline uint64_t add_over_lanes(uint64_t value, int lanes) {
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

__device__ inline uint64_t term(uint64_t key, uint32_t word) { return key * word; }
__device__ inline uint64_t hash(const uint64_t* keys, uint4 v) { return term(keys[0], v.x) + term(keys[1], v.y) + term(keys[2], v.z) + term(keys[3], v.w); }
__device__ inline uint64_t hash(const uint64_t* keys, uint2 v) { return term(keys[0], v.x) + term(keys[1], v.y); }
__device__ inline uint64_t hash(const uint64_t* keys, uint32_t v) { return term(keys[0], v); }

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
  Origin* origins;
  uint64_t* keys;
  LayerPlace* places;  // of the launch's layers: from device memory each unit would wait for its own
  RowShape* shapes;
};

template <int kTables>
__device__ Shared load_shared(const Plan& plan, const Launch<kTables>& launch, uint32_t copy, bool builds) {
  extern __shared__ __align__(128) std::byte shared[];
  Shared views;
  views.batches = shared + threadIdx.x / 32 * 2 * plan.batch_stride;
  views.origins = reinterpret_cast<Origin*>(shared + (builds ? kWarps * 2 * plan.batch_stride : 0));
  views.keys = reinterpret_cast<uint64_t*>(views.origins + plan.origins);
  views.places = reinterpret_cast<LayerPlace*>(views.keys + plan.words);
  views.shapes = reinterpret_cast<RowShape*>(views.places + launch.layers);
  for (uint32_t i = threadIdx.x; i < plan.words; i += kThreads) views.keys[i] = plan.keys[i];
  for (uint32_t i = threadIdx.x; i < launch.layers; i += kThreads) views.places[i] = plan.layers[launch.first_place + i];
  for (uint32_t i = threadIdx.x; i < plan.shapes; i += kThreads) views.shapes[i] = plan.row_shapes[i];
  for (uint32_t i = threadIdx.x; i < plan.origins; i += kThreads) {
    const Source source = plan.sources[copy * plan.origins + i];
    const uint64_t base = source.memory == kHolder ? 0 : reinterpret_cast<uint64_t>(plan.src.base[source.memory]);
    views.origins[i] = {base + source.offset, int64_t(source.scale) - source.offset};
  }
  __syncthreads();
  return views;
}

// What a unit's place adds to an origin. Pages of dcp and dp are whole on their holder, so its memory serves every chunk.
__device__ inline uint64_t unit_address(const Side& src, const Place& place) {
  const bool has_holder = src.form == KvForm::dcp || src.form == KvForm::dp;
  return place.offset + (has_holder ? reinterpret_cast<uint64_t>(src.base[place.memory]) : 0);
}

// First destination row of a unit, for the memory that holds this copy. A copy past the hashed ones is a replica of mla.
__device__ inline std::byte* dst_base(const Side& dst, uint32_t copy, const Place& place) {
  const bool is_ranked = dst.form == KvForm::tpla || dst.form == KvForm::mla;
  return dst.base[is_ranked ? copy : place.memory] + place.offset;
}

__device__ inline uint32_t checksum_copy(const Side& dst, uint32_t copy) { return dst.form == KvForm::tpla ? copy : 0; }

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

// Launches of a stream overlap at their edges: the next begins where this one's blocks run out of work, and ends after this one has ended. They share
// nothing but checksums of one put, which are told of by the last of its launches.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void await_last() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
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

// Rows of a batch, as far as a warp makes or hashes them: what they are made from, and what their checksums are bound to.
struct Batch {
  uint64_t src_rows;  // added to an origin
  uint32_t rows;
  uint32_t copy;
  uint32_t layer;
  uint32_t token;
};

// No value changes. Without kStores the rows are hashed where they are.
template <int kBytes, bool kStores>
struct CopiedRows {
  static constexpr bool kBuilds = kStores;
  // Hashing alone takes little shared memory: as many blocks as the grid has for a multiprocessor where there are two copies.
  static constexpr int kBlocksPerProcessor = kStores ? 1 : 4;

  // This lane's share of the checksum.
  __device__ static uint64_t build(const RowShape& shape, const Origin* origins, const uint64_t* keys, const Batch& batch, std::byte* built, int lane) {
    using Word = typename Chunk<kBytes>::Type;
    using Lanes = RowLanes<kBytes>;
    constexpr int kInFlight = 5;
    const Lanes lanes(lane);
    uint64_t sum = 0;
    // All lanes of the warp take every turn: the hash is added up across them.
    for (uint32_t first = 0; first < batch.rows; first += Lanes::kRows) {
      const uint32_t row = first + lanes.row;
      const bool is_live = row < batch.rows;
      uint64_t row_hash = 0;
      if (is_live) {
        const uint64_t src_row = batch.src_rows + row * shape.src_row_bytes;
        for (uint32_t chunk = lanes.chunk; chunk < shape.chunks; chunk += kInFlight * Lanes::kPerRow) {
          Word data[kInFlight];
#pragma unroll
          for (int i = 0; i < kInFlight; i++) {
            const uint32_t at = chunk + i * Lanes::kPerRow;
            if (at >= shape.chunks) break;
            data[i] = __ldcs(reinterpret_cast<const Word*>(origins[at].at + src_row));
          }
#pragma unroll
          for (int i = 0; i < kInFlight; i++) {
            const uint32_t at = chunk + i * Lanes::kPerRow;
            if (at >= shape.chunks) break;
            if (kStores) *reinterpret_cast<Word*>(built + row * shape.row_bytes + at * kBytes) = data[i];
            row_hash += hash(keys + at * (kBytes / 4), data[i]);
          }
        }
      }
      row_hash = add_over_lanes(row_hash, Lanes::kPerRow);
      if (is_live && lanes.chunk == 0) sum += row_value(row_hash, batch.copy, batch.layer, batch.token + row);
    }
    return sum;
  }
  __device__ static uint64_t hash_built(const RowShape&, const uint64_t*, const Batch&, const std::byte*, int) { return 0; }
};

// Checksum of rows that stand together in shared memory; this lane's share.
template <int kBytes>
__device__ uint64_t hash_batch(const std::byte* built, const Batch& batch, uint32_t row_bytes, const uint64_t* keys, int lane) {
  using Word = typename Chunk<kBytes>::Type;
  using Lanes = RowLanes<kBytes>;
  const Lanes lanes(lane);
  uint64_t sum = 0;
  for (uint32_t first = 0; first < batch.rows; first += Lanes::kRows) {
    const uint32_t row = first + lanes.row;
    const bool is_live = row < batch.rows;
    uint64_t row_hash = 0;
    if (is_live) {
      for (uint32_t chunk = lanes.chunk; chunk < row_bytes / kBytes; chunk += Lanes::kPerRow) {
        row_hash += hash(keys + chunk * (kBytes / 4), *reinterpret_cast<const Word*>(built + row * row_bytes + chunk * kBytes));
      }
    }
    row_hash = add_over_lanes(row_hash, Lanes::kPerRow);
    if (is_live && lanes.chunk == 0) sum += row_value(row_hash, batch.copy, batch.layer, batch.token + row);
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

__device__ inline uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Eight values into the row that is being built, where they stand in the destination's dtype.
template <KvDType kTo>
__device__ void encode_octet(const RowShape& shape, std::byte* row, uint32_t octet, bool is_live, const float (&values)[kOctet]) {
  constexpr int kValueBytes = kTo == KvDType::f32 ? 4 : 2;
  const bool is_rope = octet >= shape.latent_octets;
  if constexpr (kTo == KvDType::fp8) {
    const float scale = e4m3_scale_of(scale_group_amax(values, is_live && !is_rope));
    if (is_live && !is_rope) {
      const uint2 codes = encode_e4m3(values, scale);
      auto* at = reinterpret_cast<uint32_t*>(row + octet * kOctet);
      at[0] = codes.x;
      at[1] = codes.y;
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

// Values change: eight a lane. Loads are volatile and stay in order with shuffles, so those of several turns are issued before the first value is used:
// one turn's alone would leave the warp waiting for memory. Rows are hashed once they have been sent.
template <int kLoad, KvDType kFrom, KvDType kTo>
struct ConvertedRows {
  static constexpr bool kBuilds = true;
  static constexpr int kBlocksPerProcessor = 2;

  __device__ static uint64_t build(const RowShape& shape, const Origin* origins, const uint64_t*, const Batch& batch, std::byte* built, int lane) {
    const uint32_t turns = (batch.rows * shape.octet_slots + 31) / 32;
    Slot slot(lane, shape.octet_slots);
    for (uint32_t turn = 0; turn < turns; turn += kAhead) {
      Slot next = slot;
      RawOctet<kFrom> raw[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; i++, next.advance(shape.octet_slots)) {
        if (next.row >= batch.rows || next.octet >= shape.chunks) continue;
        raw[i].template load<kLoad>(origins[next.octet], batch.src_rows + next.row * shape.src_row_bytes, next.octet >= shape.latent_octets);
      }
#pragma unroll
      for (int i = 0; i < kAhead; i++, slot.advance(shape.octet_slots)) {
        if (turn + i >= turns) break;
        float values[kOctet];
        raw[i].decode(slot.octet >= shape.latent_octets, values);
        encode_octet<kTo>(shape, built + slot.row * shape.row_bytes, slot.octet, slot.row < batch.rows && slot.octet < shape.chunks, values);
      }
    }
    return 0;
  }
  __device__ static uint64_t hash_built(const RowShape& shape, const uint64_t* keys, const Batch& batch, const std::byte* built, int lane) {
    if (shape.row_bytes % 16 == 0) return hash_batch<16>(built, batch, shape.row_bytes, keys, lane);
    if (shape.row_bytes % 8 == 0) return hash_batch<8>(built, batch, shape.row_bytes, keys, lane);
    return hash_batch<4>(built, batch, shape.row_bytes, keys, lane);
  }
};

// One launch over all layers, tokens and destination memories of a put: grid (blocks, copies).
template <class Rows, int kTables>
__global__ void __launch_bounds__(kThreads, Rows::kBlocksPerProcessor) put(const __grid_constant__ Launch<kTables> launch) {
  const Plan& plan = *launch.plan;
  const uint32_t copy = blockIdx.y;
  const uint32_t hashed_copy = checksum_copy(plan.dst, copy);
  const Shared shared = load_shared(plan, launch, copy, Rows::kBuilds);
  const int lane = threadIdx.x % 32;
  Outbox outbox(shared.batches, plan.batch_stride, lane);
  const Deal deal(launch);

  for (uint32_t index = Deal::begin(); index < deal.end(); index += Deal::step()) {
    const Unit unit = deal(launch, shared.places, index);
    if (unit.begin == unit.end) continue;
    const RowShape shape = shared.shapes[unit.at.shape];
    const Place from = place_of(plan.src, launch, 0, launch.first_src_page, launch.src_rank, unit.at.src, shape.src_page_stride, shape.src_row_bytes, unit.begin);
    const Place to = place_of(plan.dst, launch, launch.dst_table, launch.first_dst_page, launch.dst_rank, unit.at.dst, shape.dst_page_stride, shape.row_bytes, unit.begin);
    const Origin* const origins = shared.origins + shape.first_origin;
    const uint64_t src_rows = unit_address(plan.src, from);
    std::byte* const dst_rows = dst_base(plan.dst, copy, to);
    const uint32_t rows = unit.end - unit.begin;
    uint64_t sum = 0;
    for (uint32_t first = 0; first < rows; first += shape.batch_rows) {
      const Batch batch{src_rows + first * shape.src_row_bytes, min(shape.batch_rows, rows - first), hashed_copy, unit.at.layer, unit.begin + first};
      std::byte* const built = Rows::kBuilds ? outbox.next() : nullptr;
      sum += Rows::build(shape, origins, shared.keys, batch, built, lane);
      if (Rows::kBuilds) outbox.send(built, dst_rows + first * shape.row_bytes, batch.rows * shape.row_bytes);
      sum += Rows::hash_built(shape, shared.keys, batch, built, lane);
    }
    add_checksum(launch, plan.dst, unit, copy, add_over_lanes(sum, 32), lane);
  }
  let_next_begin();
  if (Rows::kBuilds) outbox.finish();
  await_last();
  tell_host(launch);
}

}  // namespace put_rows

}  // namespace tpla::cuda
