#include "transfer/kv_put.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <string>

#include "core/error.h"
#include "transfer/kv_checksum.h"
#include "transfer/parallel.h"
#include "transfer/reshard.h"
#include "transfer/row_hash.h"
#include "transfer/row_kernels.h"
#include "transfer/row_mover.h"

namespace tpla {

namespace {

// Below this a second thread costs more than it brings.
constexpr size_t kBytesPerThread = 512 * 1024;
// What a thread takes at a time: it knows the pages that it reads next, and a gate that shuts waits for no more than this (a tenth of a millisecond).
constexpr size_t kGrainBytes = 1 << 20;
// Of smaller calls a thread takes as many parts at least, so that none waits long for the last.
constexpr size_t kPartsPerThread = 4;
// From here on written lines are of no use in this core's caches: the reader is another process, and there is more than L2 holds.
constexpr size_t kStreamBytes = 4 << 20;

[[noreturn]] void refuse(const std::string& message) { throw Error("REQUEST_INVALID", "KV transfer: " + message); }

std::string text(Range range) { return std::string("[").append(std::to_string(range.begin)).append(", ").append(std::to_string(range.end)).append(")"); }

// Tokens that stand together in one page of the source and one of the destination.
struct Run {
  Range tokens;
  PagePlace src;
  PagePlace dst;
  // Destination page, counted from the first touched.
  int page;
};

std::vector<Run> runs_of(const KvPut& put) {
  const int src_page = put.src->layout.page_tokens;
  const int dst_page = put.dst->layout.page_tokens;
  const int first = pages_of(put.dst->layout, put.tokens).begin;
  std::vector<Run> runs;
  for (int token = put.tokens.begin; token < put.tokens.end;) {
    const int end = std::min({put.tokens.end, (token / src_page + 1) * src_page, (token / dst_page + 1) * dst_page});
    runs.push_back({{token, end},
                    place_of(put.src->layout, put.src_pages, token / src_page),
                    place_of(put.dst->layout, put.dst_pages, token / dst_page),
                    token / dst_page - first});
    token = end;
  }
  return runs;
}

void check_row(const KvLayout& layout) {
  const size_t widest = layout.widest_row_bytes();
  if (widest > kMaxRowWords * 4) {
    refuse("a token takes " + std::to_string(widest) + " bytes per layer, at most " + std::to_string(kMaxRowWords * 4) + " are supported");
  }
}

void check_range(const char* what, Range range, int end) {
  if (range.begin < 0 || range.begin >= range.end || range.end > end) refuse(std::string(what) + " " + text(range) + " are not a range within " + text({0, end}));
}

// All ids are pages of the region. A bit a page, kept from call to call and all zero between them: a put is checked before it is sent off, and
// sorting the pages of a long prompt would hold it up for longer than launching it takes.
std::optional<int> page_named_twice(const KvRegion& region, const PageTables& tables, Range pages) {
  thread_local std::vector<uint64_t> seen;
  const size_t bits = size_t(region.layout.memories()) * region.pages;
  if (seen.size() * 64 < bits) seen.resize((bits + 63) / 64);
  const auto bit_of = [&](const PagePlace& place) { return size_t(place.memory) * region.pages + place.page; };
  std::optional<int> twice;
  for (int page = pages.begin; page < pages.end; page++) {
    const PagePlace place = place_of(region.layout, tables, page);
    const size_t bit = bit_of(place);
    if (seen[bit / 64] >> bit % 64 & 1) twice = place.page;
    seen[bit / 64] |= uint64_t(1) << bit % 64;
  }
  for (int page = pages.begin; page < pages.end; page++) seen[bit_of(place_of(region.layout, tables, page)) / 64] = 0;
  return twice;
}

int threads_for(size_t bytes) { return static_cast<int>(std::min<size_t>(1 + bytes / kBytesPerThread, transfer_threads())); }

// Pieces of one call that a thread takes at a time.
size_t grain_of(size_t bytes, size_t pieces, int threads) {
  const size_t grain_bytes = std::min(kGrainBytes, bytes / (threads == 1 ? 1 : kPartsPerThread * threads));
  return std::max<size_t>(1, grain_bytes * pieces / std::max<size_t>(bytes, 1));
}

}  // namespace

void check_compatible(const KvLayout& src, const KvLayout& dst) {
  const auto same = [](const char* field, int a, int b) {
    if (a != b) refuse(std::string("source and destination differ in ") + field + ": " + std::to_string(a) + " and " + std::to_string(b));
  };
  same("layers", src.layers, dst.layers);
  same("latent", src.latent, dst.latent);
  same("rope", src.rope, dst.rope);
}

Range pages_of(const KvLayout& layout, Range tokens) {
  return {tokens.begin / layout.page_tokens, (tokens.end + layout.page_tokens - 1) / layout.page_tokens};
}

PagePlace place_of(const KvLayout& layout, const PageTables& tables, int page) {
  switch (layout.form) {
    case KvForm::dcp: return {page % layout.ranks, tables.tables[page % layout.ranks][page / layout.ranks]};
    case KvForm::dp: return {tables.rank, tables.tables[0][page]};
    case KvForm::mla:
    case KvForm::tpla: return {0, tables.tables[0][page]};
  }
  return {};
}

void check_pages(const char* side, const KvRegion& region, const PageTables& tables, Range layers, Range tokens) {
  const KvLayout& layout = region.layout;
  check_row(layout);
  check_range("layers", layers, layout.layers);
  check_range("tokens", tokens, INT32_MAX - layout.page_tokens);
  const size_t wanted_tables = layout.form == KvForm::dcp ? layout.ranks : 1;
  if (tables.tables.size() != wanted_tables) {
    refuse(std::string(side) + ": " + std::to_string(tables.tables.size()) + " page tables, the layout takes " + std::to_string(wanted_tables));
  }
  if (layout.form == KvForm::dp && (tables.rank < 0 || tables.rank >= layout.ranks)) {
    refuse(std::string(side) + ": rank " + std::to_string(tables.rank) + " of " + std::to_string(layout.ranks));
  }
  const Range pages = pages_of(layout, tokens);
  for (int page = pages.begin; page < pages.end; page++) {
    const size_t table = layout.form == KvForm::dcp ? page % layout.ranks : 0;
    const size_t entry = layout.form == KvForm::dcp ? page / layout.ranks : page;
    if (entry >= tables.tables[table].size()) {
      refuse(std::string(side) + ": page table " + std::to_string(table) + " has " + std::to_string(tables.tables[table].size()) + " entries, tokens " +
             text(tokens) + " need more");
    }
    const PagePlace place = place_of(layout, tables, page);
    if (place.page < 0 || place.page >= region.pages) {
      refuse(std::string(side) + ": page id " + std::to_string(place.page) + " is outside [0, " + std::to_string(region.pages) + ")");
    }
  }
  if (const std::optional<int> twice = page_named_twice(region, tables, pages)) refuse(std::string(side) + ": page id " + std::to_string(*twice) + " appears twice");
}

KvPutResult kv_put(const KvPut& put) {
  check_compatible(put.src->layout, put.dst->layout);
  check_pages("source", *put.src, put.src_pages, put.layers, put.tokens);
  check_pages("destination", *put.dst, put.dst_pages, put.layers, put.tokens);

  const size_t copies = copies_per_page(put.dst->layout);
  KvPutResult result;
  result.bytes = result.wire_bytes = put.dst->layout.token_bytes(put.layers.begin, put.layers.end) * put.tokens.size() * copies;
  result.checksums.assign(pages_of(put.dst->layout, put.tokens).size() * copies, 0);

  const RowMover mover(*put.src, put.dst->layout, result.bytes >= kStreamBytes);
  const std::vector<Run> runs = runs_of(put);
  const size_t units = runs.size() * put.layers.size();
  const int threads = threads_for(result.bytes);
  const size_t grain = grain_of(result.bytes, units, threads);
  const auto rows_of = [&](size_t unit) {
    const Run& run = runs[unit % runs.size()];
    return RowMover::Rows{run.src, run.tokens, put.layers.begin + static_cast<int>(unit / runs.size())};
  };
  const auto place_for = [&](size_t unit, size_t copy) {
    const Run& run = runs[unit % runs.size()];
    const int memory = put.dst->layout.form == KvForm::tpla ? static_cast<int>(copy) : run.dst.memory;
    return put.dst->row(memory, put.layers.begin + static_cast<int>(unit / runs.size()), run.dst.page, run.tokens.begin % put.dst->layout.page_tokens);
  };
  parallel_for((units + grain - 1) / grain, threads, [&](size_t part) {
    const GatedWrite write(put.pass);
    const size_t begin = part * grain;
    const size_t end = std::min(units, begin + grain);
    // Added to those of other threads once the part is done: an atomic addition waits until every streamed line has left the core, which after each
    // piece of 18 KB took a twentieth of a put.
    thread_local std::vector<uint64_t> sums;
    sums.assign((end - begin) * copies, 0);
    RowMover::Rows rows = rows_of(begin);
    for (size_t unit = begin; unit < end; unit++) {
      const RowMover::Rows next = rows_of(std::min(unit + 1, end - 1));
      std::byte* to[kMaxCopies];
      for (size_t copy = 0; copy < copies; copy++) to[copy] = place_for(unit, copy);
      mover.move(rows, to, &sums[(unit - begin) * copies], unit + 1 < end ? &next : nullptr);
      rows = next;
    }
    mover.fence();
    for (size_t unit = begin; unit < end; unit++) {
      uint64_t* const totals = &result.checksums[runs[unit % runs.size()].page * copies];
      for (size_t copy = 0; copy < copies; copy++) std::atomic_ref(totals[copy]).fetch_add(sums[(unit - begin) * copies + copy], std::memory_order_relaxed);
    }
  });
  return result;
}

std::vector<uint64_t> kv_checksum(const KvRegion& region, const PageTables& pages, Range layers, Range tokens) {
  check_pages("region", region, pages, layers, tokens);
  const KvLayout& layout = region.layout;
  const Range touched = pages_of(layout, tokens);
  const int copies = copies_per_page(layout);
  std::vector<uint64_t> checksums(size_t(touched.size()) * copies, 0);
  const RowKernels& kernels = row_kernels();
  const size_t bytes = layout.token_bytes(layers.begin, layers.end) * tokens.size() * copies;
  const auto rows_of = [&](size_t unit) {
    const int copy = static_cast<int>(unit % copies);
    const int page = static_cast<int>(unit / copies % touched.size());
    const int layer = layers.begin + static_cast<int>(unit / copies / touched.size());
    const PagePlace place = place_of(layout, pages, touched.begin + page);
    const int first = (touched.begin + page) * layout.page_tokens;
    const int begin = std::max(tokens.begin, first);
    const int end = std::min(tokens.end, first + layout.page_tokens);
    return StandingRows{region.row(layout.form == KvForm::tpla ? copy : place.memory, layer, place.page, begin - first), layout.row_bytes(layer), end - begin, copy, layer, begin};
  };
  const size_t units = checksums.size() * layers.size();
  const int threads = threads_for(bytes);
  const size_t grain = grain_of(bytes, units, threads);
  parallel_for((units + grain - 1) / grain, threads, [&](size_t part) {
    const size_t end = std::min(units, (part + 1) * grain);
    StandingRows rows = rows_of(part * grain);
    for (size_t unit = part * grain; unit < end; unit++) {
      const StandingRows next = rows_of(std::min(unit + 1, end - 1));
      std::atomic_ref(checksums[unit % checksums.size()]).fetch_add(hash_rows(kernels, rows, next), std::memory_order_relaxed);
      rows = next;
    }
  });
  return checksums;
}

void kv_copy_page(const KvRegion& region, int from, int to, int rank) {
  const KvLayout& layout = region.layout;
  for (const int page : {from, to}) {
    if (page < 0 || page >= region.pages) refuse("page id " + std::to_string(page) + " is outside [0, " + std::to_string(region.pages) + ")");
  }
  const bool is_on_one_rank = layout.form == KvForm::dp || layout.form == KvForm::dcp;
  if (is_on_one_rank && (rank < 0 || rank >= layout.ranks)) refuse("rank " + std::to_string(rank) + " of " + std::to_string(layout.ranks));
  for (int memory = is_on_one_rank ? rank : 0; memory < (is_on_one_rank ? rank + 1 : layout.memories()); memory++) {
    for (int layer = 0; layer < layout.layers; layer++) std::memmove(region.page(memory, layer, to), region.page(memory, layer, from), layout.page_bytes(layer));
  }
}

}  // namespace tpla
