#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "transfer/messages/messenger.h"
#include "transfer/nixl/api.h"

namespace tpla::nixl {

// A notification between our agents carries what has piled up: a head, then items one after another, little-endian. Nothing of one is believed
// before NotificationReader has checked it.

struct NotificationHead {
  static constexpr uint32_t kMagic = 0x4e4c5054;  // TPLN
  uint32_t magic = kMagic;
  uint32_t items = 0;
  // Of the remote data in it; its sender hears of their end under this number.
  uint64_t batch = 0;
};

enum class ItemKind : uint32_t {
  // A message with its data.
  kMessage = 1,
  // A message whose data lie in memory of the sender's.
  kRemote,
  // Metadata of such memory, before the first message that names it.
  kMemory,
  // batch: the receiver of these data needs them no more.
  kFetched,
};

// Of an item; what a kind does not use is zero. Bytes of inline data or metadata follow.
struct ItemHead {
  ItemKind kind;
  MemoryType memory;
  uint64_t bytes;
  uint64_t address;
  uint64_t device;
  uint64_t batch;
  MessageHead message;
};
static_assert(sizeof(ItemHead) == 88);

inline bool is_inline(ItemKind kind) { return kind == ItemKind::kMessage || kind == ItemKind::kMemory; }

class NotificationWriter {
 public:
  // `data`: of an inline item, `item.bytes` of them.
  void add(const ItemHead& item, std::string_view data = {}) {
    text_.append(reinterpret_cast<const char*>(&item), sizeof(item)).append(data);
    head_.items++;
  }
  bool empty() const { return head_.items == 0; }
  uint32_t items() const { return head_.items; }
  size_t bytes() const { return text_.size(); }
  // The notification, and starts another.
  std::string take(uint64_t batch) {
    head_.batch = batch;
    std::string whole(reinterpret_cast<const char*>(&head_), sizeof(head_));
    whole += text_;
    text_.clear();
    head_ = {};
    return whole;
  }

 private:
  NotificationHead head_;
  std::string text_;
};

class NotificationReader {
 public:
  explicit NotificationReader(std::string_view text) : rest_(text) {
    is_good_ = take(&head_, sizeof(head_)) && head_.magic == NotificationHead::kMagic;
  }
  uint64_t batch() const { return head_.batch; }
  // The next item, and its inline data; false at the end, or where it does not make sense.
  bool next(ItemHead& item, std::string_view& data) {
    if (!is_good_ || head_.items == 0) return false;
    head_.items--;
    is_good_ = take(&item, sizeof(item));
    if (!is_good_ || !is_inline(item.kind)) return is_good_;
    is_good_ = item.bytes <= rest_.size();
    if (!is_good_) return false;
    data = rest_.substr(0, item.bytes);
    rest_.remove_prefix(item.bytes);
    return true;
  }

 private:
  bool take(void* to, size_t bytes) {
    if (rest_.size() < bytes) return false;
    std::memcpy(to, rest_.data(), bytes);
    rest_.remove_prefix(bytes);
    return true;
  }

  std::string_view rest_;
  NotificationHead head_;
  bool is_good_ = false;
};

}  // namespace tpla::nixl
