// The hand-off on GPUs: gather pages, reshard, convert and put into memory of any GPU or host that this one reaches, in one launch. Where layers differ
// in their shared subspace so much that some rows are copied and others converted, or copied at another alignment, these are launches of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/kv_layout.h"
#include "transfer/kv_put.h"

struct CUstream_st;

namespace tpla::cuda {

// How a put tells the host that every byte of it is in place: its last block writes the checksums, then `turn`, into pinned memory, and leaves the
// GPU's part as it found it. That comes 10 us before the host would know by an event, and leaves no gap to the put that follows in the stream.
struct PutReport {
  uint64_t* sums;    // of this GPU, a word a checksum: zeros, and zeros again after
  uint32_t* ticket;  // of this GPU: zero, and zero again after
  uint64_t* host;    // pinned: the first word becomes `turn`, from the second on stand the checksums
  uint64_t turn;     // not what the first word is
};

// From one region to another, seen from one GPU. Base pointers are addresses that this GPU can use: its own memory, a peer's over NVLink or
// PCIe, or registered host memory. Plans live in device memory, so that a put costs launches alone.
//
// Bytes and checksums are those of the CPU path (transfer/kv_put.h), but for NaN payloads in conversions. Rows are taken in 16-byte chunks
// where every offset allows, else in 8 or 4; conversions take widths, slices and rope in multiples of 8 values.
class KvRoute {
 public:
  // `replicas`: mla keeps a whole copy per GPU; the destination then has so many bases. 1 otherwise.
  // Throws REQUEST_INVALID for shapes it does not take.
  KvRoute(int device, const KvRegion& src, const KvRegion& dst, int replicas = 1);
  // Reads and hashes `region` only: put() then takes its pages as source and destination both.
  static KvRoute checksum(int device, const KvRegion& region);
  KvRoute(KvRoute&&) noexcept;
  ~KvRoute();

  // Enqueues one rectangle of (layer, token). `checksums`: device memory of this GPU, set to KvPutResult.checksums: pages_of(dst, tokens) * copies.
  // Tables were checked with check_pages. At most kMaxPages pages in both tables together; blocks: of the grid, 0 for the default.
  void put(Range layers, Range tokens, const PageTables& src_pages, const PageTables& dst_pages, uint64_t* checksums, CUstream_st* stream,
           int blocks = 0) const;

  // The same, told to the host.
  void put(Range layers, Range tokens, const PageTables& src_pages, const PageTables& dst_pages, const PutReport& report, CUstream_st* stream,
           int blocks = 0) const;

  static constexpr int kMaxPages = 7600;
  int copies() const;

 private:
  void enqueue(Range layers, Range tokens, const PageTables& src_pages, const PageTables& dst_pages, const PutReport& report, CUstream_st* stream, int blocks) const;

  class Pass;
  struct State;
  explicit KvRoute(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace tpla::cuda
