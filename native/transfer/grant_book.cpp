#include "transfer/grant_book.h"

#include <algorithm>

#include "transfer/reshard.h"

namespace tpla {

namespace {

// In time that does not depend on where they differ.
bool same_key(const std::string& a, const std::string& b) {
  if (a.size() != b.size()) return false;
  unsigned char difference = 0;
  for (size_t i = 0; i < a.size(); i++) difference |= static_cast<unsigned char>(a[i] ^ b[i]);
  return difference == 0;
}

}  // namespace

int memory_of_piece(const KvLayout& layout, const PageTables& pages, const Piece& piece) {
  return layout.form == KvForm::tpla ? static_cast<int>(piece.copy) : place_of(layout, pages, static_cast<int>(piece.begin / layout.page_tokens)).memory;
}

std::byte* place_of_piece(const KvRegion& region, const PageTables& pages, const Piece& piece) {
  const KvLayout& layout = region.layout;
  const int page = place_of(layout, pages, static_cast<int>(piece.begin / layout.page_tokens)).page;
  return region.row(memory_of_piece(layout, pages, piece), static_cast<int>(piece.layer), page, static_cast<int>(piece.begin % layout.page_tokens));
}

std::shared_ptr<const Grant> GrantBook::Client::grant(uint32_t slot) const {
  const std::lock_guard lock(mutex_);
  const auto found = grants_.find(slot);
  return found == grants_.end() ? nullptr : found->second;
}

void GrantBook::admit(const std::string& key, std::shared_ptr<const WriteGate> gate) {
  if (key.size() != kLinkKeyBytes) throw Error("REQUEST_INVALID", "a link's key has " + std::to_string(kLinkKeyBytes) + " bytes");
  const std::lock_guard lock(mutex_);
  clients_.push_back(std::make_shared<Client>(key, std::move(gate)));
}

void GrantBook::grant(const std::string& key, int slot, uint32_t epoch, Range tokens, PageTables pages) {
  check_pages("grant", *region_, pages, {0, region_->layout.layers}, tokens);
  const auto client = find(key);
  if (!client) throw Error("REQUEST_INVALID", "no sender was admitted under this key");
  const std::lock_guard lock(client->mutex_);
  client->grants_[slot] = std::make_shared<const Grant>(Grant{epoch, tokens, std::move(pages)});
}

std::shared_ptr<GrantBook::Client> GrantBook::withdraw(const std::string& key) {
  const std::lock_guard lock(mutex_);
  const auto found = std::find_if(clients_.begin(), clients_.end(), [&](const auto& known) { return same_key(known->key(), key); });
  if (found == clients_.end()) return nullptr;
  const std::shared_ptr<Client> client = *found;
  clients_.erase(found);
  return client;
}

std::shared_ptr<GrantBook::Client> GrantBook::find(const std::string& key) const {
  const std::lock_guard lock(mutex_);
  for (const auto& client : clients_) {
    if (same_key(client->key(), key)) return client;
  }
  return nullptr;
}

std::vector<std::string> GrantBook::keys() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> keys;
  for (const auto& client : clients_) keys.push_back(client->key());
  return keys;
}

bool GrantBook::covers(const Grant& grant, const Piece& piece) const {
  const KvLayout& layout = region_->layout;
  if (piece.layer >= uint32_t(layout.layers) || piece.copy >= uint32_t(copies_per_page(layout)) || piece.begin >= piece.end) return false;
  if (piece.begin < uint32_t(grant.tokens.begin) || piece.end > uint32_t(grant.tokens.end)) return false;
  return piece.begin / layout.page_tokens == (piece.end - 1) / layout.page_tokens;
}

}  // namespace tpla
