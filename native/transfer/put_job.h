#pragma once
#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "transfer/grant_book.h"
#include "transfer/kv_link.h"
#include "transfer/reshard.h"
#include "transfer/row_mover.h"

namespace tpla {

// One put on a link's sending side, cut into units that are made and sent independently: some tokens of one layer, all copies,
// as rows in the receiver's layout [copy][token][row]; or, where a GPU makes them, some pages of all layers.
class PutJob {
 public:
  // Small enough that what one core makes is still in its cache when the next reads it.
  static constexpr size_t kUnitBytes = 256 * 1024;
  // A unit holds at least one token.
  static constexpr size_t kMaxUnitBytes = size_t(4) << 20;

  struct Unit {
    int layer;
    Range tokens;
    // From `layer` on.
    int layers = 1;
  };

  // Bytes that hold any unit of this layout. Throws REQUEST_INVALID where a token takes more than kMaxUnitBytes.
  static size_t unit_capacity(const KvLayout& dst);

  // Units of about `unit_bytes` of one layer; or, where `unit_pages` is not 0, of so many pages of the receiver and all layers. Throws
  // REQUEST_INVALID.
  PutJob(LinkPut put, const KvLayout& dst, size_t unit_bytes, LinkSender::Done done, int unit_pages = 0);

  const LinkPut& what() const { return put_; }
  size_t units() const { return ranges_.size() * (unit_pages_ > 0 ? 1 : put_.layers.size()); }
  Unit unit(size_t index) const;
  size_t bytes_of(const Unit& unit) const { return dst_.row_bytes(unit.layer) * copies_per_page(dst_) * unit.tokens.size(); }
  // The unit cut where pages of the receiver end, in the order in which its rows stand.
  std::vector<Piece> pieces_of(const Unit& unit) const;
  // Makes the rows of a unit of one layer and adds their checksums to the result.
  void make(const Unit& unit, std::byte* to);
  // Whether the unit's rows are the same on both sides, so that they can be sent from where they stand.
  bool keeps_rows(const Unit& unit) const { return mover_.keeps_rows(unit.layer); }
  // The same for rows that are kept: appends where they stand, in order.
  void find(const Unit& unit, std::vector<std::span<const std::byte>>& rows);
  // Of rows that somebody else made: [page of the receiver from the unit's first][copy].
  void add_checksums(const Unit& unit, const std::vector<uint64_t>& sums);

  // The next unit to make; false when none is left, or the job is over.
  bool take(size_t& index);
  bool is_over() const { return is_over_; }
  // Counts pieces that the receiver has in its pages; true with the last.
  bool confirm(size_t pieces);
  size_t count_pieces(const Unit& unit) const;
  void add_wire_bytes(size_t bytes) { wire_bytes_ += bytes; }
  // Reports the result, or the error; only the first call does.
  void end(std::unique_ptr<Error> error);

 private:
  // Part of a unit that stands in one page on either side, and its rows at the source.
  RowMover::Rows rows_from(const Unit& unit, int token) const;
  void add_sums(int token, const uint64_t* sums);

  const LinkPut put_;
  const KvLayout dst_;
  const int unit_pages_;
  const RowMover mover_;
  const LinkSender::Done done_;
  std::vector<Range> ranges_;
  size_t pieces_ = 0;
  KvPutResult result_;
  std::atomic<size_t> next_{0};
  std::atomic<size_t> confirmed_{0};
  std::atomic<size_t> wire_bytes_{0};
  std::atomic<bool> is_over_{false};
};

}  // namespace tpla
