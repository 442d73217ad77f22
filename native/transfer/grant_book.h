#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "transfer/kv_link.h"

namespace tpla {

// Rows of consecutive tokens of one layer that stand together at the receiver: in one page of one memory.
struct Piece {
  uint32_t layer;
  uint32_t copy;
  uint32_t begin;
  uint32_t end;
};

// Which of a region's memories holds a piece, and where it stands there.
int memory_of_piece(const KvLayout& layout, const PageTables& pages, const Piece& piece);
std::byte* place_of_piece(const KvRegion& region, const PageTables& pages, const Piece& piece);

// Pages of one session, as the receiver has granted them.
struct Grant {
  uint32_t epoch;
  Range tokens;
  PageTables pages;
};

// What senders may write into a receiver's pages: by key a gate, by slot of the gate a grant. For any thread.
class GrantBook {
 public:
  // What belongs to one sender.
  class Client {
   public:
    Client(std::string key, std::shared_ptr<const WriteGate> gate) : key_(std::move(key)), gate_(std::move(gate)) {}
    const std::string& key() const { return key_; }
    const WriteGate& gate() const { return *gate_; }
    // Null where the slot was never granted.
    std::shared_ptr<const Grant> grant(uint32_t slot) const;

   private:
    friend class GrantBook;
    const std::string key_;
    const std::shared_ptr<const WriteGate> gate_;
    mutable std::mutex mutex_;
    std::map<uint32_t, std::shared_ptr<const Grant>> grants_;
  };

  explicit GrantBook(std::shared_ptr<const KvRegion> region) : region_(std::move(region)) {}
  const KvRegion& region() const { return *region_; }

  // As LinkReceiver's.
  void admit(const std::string& key, std::shared_ptr<const WriteGate> gate);
  void grant(const std::string& key, int slot, uint32_t epoch, Range tokens, PageTables pages);
  // Forgets the key; null where it is unknown.
  std::shared_ptr<Client> withdraw(const std::string& key);
  std::shared_ptr<Client> find(const std::string& key) const;
  std::vector<std::string> keys() const;

  // Whether a piece that came over the wire lies in the region and in what was granted.
  bool covers(const Grant& grant, const Piece& piece) const;
  size_t bytes_of(const Piece& piece) const { return size_t(piece.end - piece.begin) * region_->layout.row_bytes(int(piece.layer)); }
  // Where a covered piece belongs, and in which of the region's memories that is.
  std::byte* place(const Grant& grant, const Piece& piece) const { return place_of_piece(*region_, grant.pages, piece); }
  int memory_of(const Grant& grant, const Piece& piece) const { return memory_of_piece(region_->layout, grant.pages, piece); }

 private:
  const std::shared_ptr<const KvRegion> region_;
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Client>> clients_;
};

}  // namespace tpla
