#include "bench/page_tables.h"

#include <algorithm>
#include <numeric>
#include <random>

namespace tpla::bench {

namespace {

constexpr int kUnusedPages = 3;

}  // namespace

int64_t pages_needed(const std::vector<int32_t>& kv_lens, int page_tokens) {
  int64_t pages = 0;
  for (const int32_t len : kv_lens) pages += (len + page_tokens - 1) / page_tokens;
  return pages;
}

PageTables draw_page_tables(const std::vector<int32_t>& kv_lens, int page_tokens, int sets, uint64_t seed) {
  PageTables result;
  result.sets = sets;
  result.pages = static_cast<int>(pages_needed(kv_lens, page_tokens) * sets + kUnusedPages);
  for (const int32_t len : kv_lens) result.stride = std::max(result.stride, (len + page_tokens - 1) / page_tokens);
  std::vector<int32_t> order(static_cast<size_t>(result.pages));
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(seed);
  std::shuffle(order.begin(), order.end(), random);
  result.table.assign(static_cast<size_t>(sets) * kv_lens.size() * static_cast<size_t>(result.stride), kNowhere);
  auto next = order.begin();
  auto row = result.table.begin();
  for (int set = 0; set < sets; ++set) {
    for (const int32_t len : kv_lens) {
      const int pages = (len + page_tokens - 1) / page_tokens;
      std::copy(next, next + pages, row);
      next += pages;
      row += result.stride;
    }
  }
  return result;
}

std::vector<int32_t> prefix_sums(const std::vector<int32_t>& lens) {
  std::vector<int32_t> sums{0};
  for (const int32_t len : lens) sums.push_back(sums.back() + len);
  return sums;
}

}  // namespace tpla::bench
