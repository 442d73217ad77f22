#include "transfer/put_job.h"

#include <algorithm>
#include <string>

#include "transfer/reshard.h"

namespace tpla {

namespace {

// Of the widest layer, over all copies.
size_t widest_token(const KvLayout& layout) { return layout.widest_row_bytes() * copies_per_page(layout); }

// Before anything is derived from them.
LinkPut checked(LinkPut put, const KvLayout& dst) {
  check_compatible(put.src->layout, dst);
  check_pages("source", *put.src, put.src_pages, put.layers, put.tokens);
  return put;
}

}  // namespace

size_t PutJob::unit_capacity(const KvLayout& dst) {
  const size_t token = widest_token(dst);
  if (token > kMaxUnitBytes) throw Error("REQUEST_INVALID", "a token takes " + std::to_string(token) + " bytes per layer, a link carries at most " + std::to_string(kMaxUnitBytes));
  return std::max(kUnitBytes, token);
}

PutJob::PutJob(LinkPut put, const KvLayout& dst, size_t unit_bytes, LinkSender::Done done, int unit_pages)
    : put_(checked(std::move(put), dst)), dst_(dst), unit_pages_(unit_pages), mover_(*put_.src, dst, false), done_(std::move(done)) {
  const size_t most_bytes = std::min(unit_bytes, unit_capacity(dst));
  const int most = std::max<int>(1, static_cast<int>(most_bytes / widest_token(dst)));
  for (int begin = put_.tokens.begin; begin < put_.tokens.end; begin = ranges_.back().end) {
    const int end = unit_pages_ > 0 ? (begin / dst.page_tokens + unit_pages_) * dst.page_tokens : begin + most;
    ranges_.push_back({begin, std::min(put_.tokens.end, end)});
    pieces_ += size_t(pages_of(dst, ranges_.back()).size()) * copies_per_page(dst) * put_.layers.size();
  }
  result_.bytes = dst.token_bytes(put_.layers.begin, put_.layers.end) * copies_per_page(dst) * put_.tokens.size();
  result_.checksums.assign(size_t(pages_of(dst, put_.tokens).size()) * copies_per_page(dst), 0);
}

PutJob::Unit PutJob::unit(size_t index) const {
  if (unit_pages_ > 0) return {put_.layers.begin, ranges_[index], put_.layers.size()};
  return {put_.layers.begin + static_cast<int>(index / ranges_.size()), ranges_[index % ranges_.size()]};
}

std::vector<Piece> PutJob::pieces_of(const Unit& unit) const {
  std::vector<Piece> pieces;
  for (int layer = unit.layer; layer < unit.layer + unit.layers; layer++) {
    for (int copy = 0; copy < copies_per_page(dst_); copy++) {
      for (int token = unit.tokens.begin; token < unit.tokens.end;) {
        const int end = std::min(unit.tokens.end, (token / dst_.page_tokens + 1) * dst_.page_tokens);
        pieces.push_back({uint32_t(layer), uint32_t(copy), uint32_t(token), uint32_t(end)});
        token = end;
      }
    }
  }
  return pieces;
}

size_t PutJob::count_pieces(const Unit& unit) const { return size_t(pages_of(dst_, unit.tokens).size()) * copies_per_page(dst_); }

RowMover::Rows PutJob::rows_from(const Unit& unit, int token) const {
  const KvLayout& src = put_.src->layout;
  const int end = std::min({unit.tokens.end, (token / src.page_tokens + 1) * src.page_tokens, (token / dst_.page_tokens + 1) * dst_.page_tokens});
  return {place_of(src, put_.src_pages, token / src.page_tokens), {token, end}, unit.layer};
}

void PutJob::add_sums(int token, const uint64_t* sums) {
  const int copies = copies_per_page(dst_);
  const size_t entry = size_t(token / dst_.page_tokens - pages_of(dst_, put_.tokens).begin) * copies;
  for (int copy = 0; copy < copies; copy++) std::atomic_ref(result_.checksums[entry + copy]).fetch_add(sums[copy], std::memory_order_relaxed);
}

void PutJob::make(const Unit& unit, std::byte* to) {
  const int copies = copies_per_page(dst_);
  const size_t row_bytes = dst_.row_bytes(unit.layer);
  std::byte* rows[kMaxCopies];
  for (int copy = 0; copy < copies; copy++) rows[copy] = to + row_bytes * unit.tokens.size() * copy;
  for (RowMover::Rows part = rows_from(unit, unit.tokens.begin);;) {
    const bool is_last = part.tokens.end == unit.tokens.end;
    const RowMover::Rows next = is_last ? part : rows_from(unit, part.tokens.end);
    uint64_t sums[kMaxCopies];
    std::fill_n(sums, copies, 0);
    mover_.move(part, rows, sums, is_last ? nullptr : &next);
    add_sums(part.tokens.begin, sums);
    for (int copy = 0; copy < copies; copy++) rows[copy] += row_bytes * part.tokens.size();
    if (is_last) return;
    part = next;
  }
}

void PutJob::find(const Unit& unit, std::vector<std::span<const std::byte>>& rows) {
  const size_t row_bytes = dst_.row_bytes(unit.layer);
  for (RowMover::Rows part = rows_from(unit, unit.tokens.begin);;) {
    const bool is_last = part.tokens.end == unit.tokens.end;
    const RowMover::Rows next = is_last ? part : rows_from(unit, part.tokens.end);
    uint64_t sum = 0;
    rows.emplace_back(mover_.hash(part, sum, is_last ? nullptr : &next), row_bytes * part.tokens.size());
    add_sums(part.tokens.begin, &sum);
    if (is_last) return;
    part = next;
  }
}

void PutJob::add_checksums(const Unit& unit, const std::vector<uint64_t>& sums) {
  const int copies = copies_per_page(dst_);
  const int first = pages_of(dst_, unit.tokens).begin;
  for (size_t page = 0; page < sums.size() / copies; page++) add_sums((first + static_cast<int>(page)) * dst_.page_tokens, &sums[page * copies]);
}

bool PutJob::take(size_t& index) {
  if (is_over_) return false;
  index = next_.fetch_add(1);
  return index < units();
}

bool PutJob::confirm(size_t pieces) { return confirmed_.fetch_add(pieces) + pieces == pieces_; }

void PutJob::end(std::unique_ptr<Error> error) {
  if (is_over_.exchange(true)) return;
  KvPutResult result;
  // After an error other threads may still be making a unit of it.
  if (!error) {
    result = std::move(result_);
    result.wire_bytes = result.bytes + wire_bytes_;
  }
  done_(std::move(result), std::move(error));
}

}  // namespace tpla
