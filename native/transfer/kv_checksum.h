#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define TPLA_HOST_DEVICE __host__ __device__
#else
#define TPLA_HOST_DEVICE
#endif

namespace tpla {

// The 64-bit checksum of KV pages, the same on every CPU and GPU.
//
//   row hash   H = sum over the row's 32-bit words w_i of K_i * w_i                     mod 2^64, K_i odd
//   row value  V = mix(H + position(copy, layer, token))                                mix: a bijection of 64-bit words
//   checksum     = sum of V over the rows                                               mod 2^64
//
// A sum over rows adds up over layers, over parts of a page and over threads in any order. What it catches:
// - any change within one 32-bit word of one row, so every single flipped bit, with certainty: K_i is odd, so d * K_i is not 0 mod
//   2^64 for 0 < |d| < 2^32, and mix is a bijection;
// - any two flipped bits of one row up to kCheckedWords words, with certainty: no two of those keys are equal or opposite mod 2^33
//   (test/native/transfer.test.ts proves it for the table);
// - other changes within one row: missed with probability at most 2^-32 over the choice of keys (multilinear hashing, Lemire and Kaser,
//   "Strongly universal string hashing is fast", 2014);
// - rows, pages, layers or ranks exchanged, shifted or left stale: the position of each row goes through mix, so a miss needs a
//   64-bit coincidence.
// It guards against faults, not against a peer that forges both bytes and checksum.

// Longest row, in 32-bit words: 64 KiB.
inline constexpr size_t kMaxRowWords = 16384;
// Row length for which the two-bit guarantee is proven.
inline constexpr size_t kCheckedWords = 4096;

TPLA_HOST_DEVICE constexpr uint64_t mix64(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  x ^= x >> 33;
  return x;
}

// K_i of word i of a row.
TPLA_HOST_DEVICE constexpr uint64_t checksum_key(uint32_t word) { return mix64((uint64_t(word) + 1) * 0x9e3779b97f4a7c15ULL) | 1; }

// Distinct for every (copy < 64, layer < 4096, token < 2^31). `copy` is the rank where each rank holds its own part of the row (tpla), else 0.
TPLA_HOST_DEVICE constexpr uint64_t row_position(uint32_t copy, uint32_t layer, uint32_t token) {
  return (uint64_t(token) << 18 | uint64_t(layer) << 6 | copy) * 0x9e3779b97f4a7c15ULL;
}

TPLA_HOST_DEVICE constexpr uint64_t row_value(uint64_t row_hash, uint32_t copy, uint32_t layer, uint32_t token) {
  return mix64(row_hash + row_position(copy, layer, token));
}

}  // namespace tpla
