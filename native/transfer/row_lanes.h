#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "transfer/kv_checksum.h"
#include "transfer/row_kernels.h"
#include "transfer/row_loops.h"

namespace tpla {

// The loop that hashes rows and copies them, over one instruction set's vectors. Internal linkage, for the reason of row_loops.h.

inline constexpr size_t kLineBytes = 64;

enum class Store { none, cached, streamed };

// `Set` is an instruction set: its Vector of 64-bit lanes, and what is done to it. Words are taken in pairs; the halves of a key are multiplied
// apart, and the high half's product counts 2^32 times. Keys are read once for all rows.
template <class Set, Store store, size_t rows>
static void run_rows(LanesTo to, Lanes from, size_t words, size_t first, Lanes ahead, uint64_t* hashes) {
  using Vector = typename Set::Vector;
  constexpr size_t kWords = sizeof(Vector) / 4;
  constexpr size_t kVectors = kLineBytes / sizeof(Vector);
  const KeyTable& keys = checksum_keys();
  Vector low[rows];
  Vector high[rows];
  for (size_t row = 0; row < rows; row++) {
    low[row] = high[row] = Set::zero();
    hashes[row] = 0;
  }
  size_t i = 0;
  const auto scalar = [&] {
    for (size_t row = 0; row < rows; row++) {
      hashes[row] += word_term(from[row] + i * 4, first + i);
      if constexpr (store != Store::none) std::memcpy(to[row] + i * 4, from[row] + i * 4, 4);
    }
    i++;
  };
  // Up to an even word, and for streaming up to a line of the caches.
  while (i < words && ((first + i) % 2 != 0 || (store == Store::streamed && reinterpret_cast<uintptr_t>(to.at + i * 4) % kLineBytes != 0))) scalar();
  for (; i + kLineBytes / 4 <= words; i += kLineBytes / 4) {
    Vector even_low[kVectors], odd_low[kVectors], even_high[kVectors], odd_high[kVectors];
    for (size_t v = 0; v < kVectors; v++) {
      const size_t pair = (first + i + v * kWords) / 2;
      even_low[v] = Set::load(keys.even + pair);
      odd_low[v] = Set::load(keys.odd + pair);
      even_high[v] = Set::high_half(even_low[v]);
      odd_high[v] = Set::high_half(odd_low[v]);
    }
    for (size_t row = 0; row < rows; row++) {
      if constexpr (rows > 1) __builtin_prefetch(ahead[row] + i * 4);
      // A line whole before the next lane's: half of one that is streamed waits in the core for the other.
      for (size_t v = 0; v < kVectors; v++) {
        const Vector even = Set::load(from[row] + (i + v * kWords) * 4);
        if constexpr (store == Store::cached) Set::store(to[row] + (i + v * kWords) * 4, even);
        if constexpr (store == Store::streamed) Set::stream(to[row] + (i + v * kWords) * 4, even);
        const Vector odd = Set::high_half(even);
        low[row] = Set::add(low[row], Set::add(Set::multiply(even, even_low[v]), Set::multiply(odd, odd_low[v])));
        high[row] = Set::add(high[row], Set::add(Set::multiply(even, even_high[v]), Set::multiply(odd, odd_high[v])));
      }
    }
  }
  while (i < words) scalar();
  for (size_t row = 0; row < rows; row++) hashes[row] += Set::sum(Set::add(low[row], Set::low_half_up(high[row])));
}

template <class Set>
static uint64_t hash(const std::byte* from, size_t words, size_t first) {
  uint64_t hash;
  run_rows<Set, Store::none, 1>({}, {from, 0}, words, first, {}, &hash);
  return hash;
}

template <class Set>
static uint64_t copy(std::byte* to, const std::byte* from, size_t words, size_t first) {
  uint64_t hash;
  run_rows<Set, Store::cached, 1>({to, 0}, {from, 0}, words, first, {}, &hash);
  return hash;
}

// An address that never becomes aligned at an even word is copied through the caches.
template <class Set>
static uint64_t stream(std::byte* to, const std::byte* from, size_t words, size_t first) {
  if ((reinterpret_cast<uintptr_t>(to) / 4 + first) % 2 != 0 || reinterpret_cast<uintptr_t>(to) % 4 != 0) return copy<Set>(to, from, words, first);
  uint64_t hash;
  run_rows<Set, Store::streamed, 1>({to, 0}, {from, 0}, words, first, {}, &hash);
  return hash;
}

template <class Set>
static void hash_lanes(Lanes from, size_t words, size_t first, Lanes ahead, uint64_t* hashes) {
  run_rows<Set, Store::none, kLanes>({}, from, words, first, ahead, hashes);
}

template <class Set>
static void copy_lanes(LanesTo to, Lanes from, size_t words, size_t first, Lanes ahead, uint64_t* hashes) {
  run_rows<Set, Store::cached, kLanes>(to, from, words, first, ahead, hashes);
}

// Lanes that are not aligned alike are streamed one by one.
template <class Set>
static void stream_lanes(LanesTo to, Lanes from, size_t words, size_t first, Lanes ahead, uint64_t* hashes) {
  const bool is_aligned_alike = to.stride % kLineBytes == 0 && (reinterpret_cast<uintptr_t>(to.at) / 4 + first) % 2 == 0 && reinterpret_cast<uintptr_t>(to.at) % 4 == 0;
  if (is_aligned_alike) return run_rows<Set, Store::streamed, kLanes>(to, from, words, first, ahead, hashes);
  for (size_t lane = 0; lane < kLanes; lane++) hashes[lane] = stream<Set>(to[lane], from[lane], words, first);
}

}  // namespace tpla
