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

PutJob::PutJob(LinkPut put, const KvLayout& dst, LinkSender::Done done)
    : put_(checked(std::move(put), dst)), dst_(dst), mover_(*put_.src, dst, false), done_(std::move(done)) {
  const int most = static_cast<int>(unit_capacity(dst) / widest_token(dst));
  for (int begin = put_.tokens.begin; begin < put_.tokens.end; begin += most) {
    ranges_.push_back({begin, std::min(put_.tokens.end, begin + most)});
    pieces_ += size_t(pages_of(dst, ranges_.back()).size()) * copies_per_page(dst) * put_.layers.size();
  }
  result_.bytes = dst.token_bytes(put_.layers.begin, put_.layers.end) * copies_per_page(dst) * put_.tokens.size();
  result_.checksums.assign(size_t(pages_of(dst, put_.tokens).size()) * copies_per_page(dst), 0);
}

PutJob::Unit PutJob::unit(size_t index) const {
  return {put_.layers.begin + static_cast<int>(index / ranges_.size()), ranges_[index % ranges_.size()]};
}

std::vector<Piece> PutJob::pieces_of(const Unit& unit) const {
  std::vector<Piece> pieces;
  for (int copy = 0; copy < copies_per_page(dst_); copy++) {
    for (int token = unit.tokens.begin; token < unit.tokens.end;) {
      const int end = std::min(unit.tokens.end, (token / dst_.page_tokens + 1) * dst_.page_tokens);
      pieces.push_back({uint32_t(unit.layer), uint32_t(copy), uint32_t(token), uint32_t(end)});
      token = end;
    }
  }
  return pieces;
}

void PutJob::make(const Unit& unit, std::byte* to) {
  const KvLayout& src = put_.src->layout;
  const int copies = copies_per_page(dst_);
  const int first_page = pages_of(dst_, put_.tokens).begin;
  const size_t row_bytes = dst_.row_bytes(unit.layer);
  std::byte* rows[kMaxCopies];
  for (int copy = 0; copy < copies; copy++) rows[copy] = to + row_bytes * unit.tokens.size() * copy;
  for (int token = unit.tokens.begin; token < unit.tokens.end;) {
    const int end = std::min({unit.tokens.end, (token / src.page_tokens + 1) * src.page_tokens, (token / dst_.page_tokens + 1) * dst_.page_tokens});
    uint64_t sums[kMaxCopies] = {};
    mover_.move({place_of(src, put_.src_pages, token / src.page_tokens), {token, end}, unit.layer}, rows, sums);
    for (int copy = 0; copy < copies; copy++) {
      const size_t entry = size_t(token / dst_.page_tokens - first_page) * copies + copy;
      std::atomic_ref(result_.checksums[entry]).fetch_add(sums[copy], std::memory_order_relaxed);
      rows[copy] += row_bytes * (end - token);
    }
    token = end;
  }
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
