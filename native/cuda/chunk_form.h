// Which form of a chunk behind cached latents is faster: absorbed or un-absorbed. Arithmetic over rates that were measured once, on an H100 and, over fp8 KV, an
// H200 (docs/kernels.md); no CUDA in it, so that it can be asked, and tested, anywhere.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"

namespace tpla::cuda {

// Of the whole batch, for DeepSeek's dimensions: latent 512, rope 64, heads of 128 + 64 columns and values of 128.
struct ChunkWork {
  int heads = 0;
  int64_t sequences = 0;
  int64_t query_tokens = 0;
  int64_t key_tokens = 0;  // cached and new
  bool fp8 = false;        // KV
  bool sm80 = false;       // the generic kernels
};

struct ChunkEstimate {
  double absorbed_us = 0;
  double unabsorbed_us = 0;
};

constexpr ChunkEstimate estimate_chunk(const ChunkWork& work) {
  constexpr double kLatent = 512, kRope = 64, kHead = 128;
  constexpr double kProjection = 300e6, kUp = 520e6;            // operations per microsecond: 1e6 is 1 TFLOP/s
  const double absorbed = work.sm80 ? 46e6 : work.fp8 ? 345e6 : 580e6;
  constexpr double kAbsorbedStart = 25, kUnabsorbedStart = 17;  // microseconds, however little there is to do
  constexpr double kTile = 128, kMultiprocessors = 132;         // query rows and keys of a step of un-absorbed prefill
  const double step_alone = work.sm80 ? 4.6 : 1.3, step_together = work.sm80 ? 3.6 : 2.0;  // microseconds, when few multiprocessors are busy and when all are

  const double heads = work.heads, keys = static_cast<double>(work.key_tokens), queries = static_cast<double>(work.query_tokens);
  const double sequences = std::max<double>(static_cast<double>(work.sequences), 1);
  const double of_each = queries / sequences;
  const double seen = std::max(keys / sequences - of_each / 2, 0.0);  // by a query, on average

  // Few query rows leave multiprocessors idle in prefill, which gives a tile of rows to one of them for all its keys.
  const double row_tiles = static_cast<double>(static_cast<int64_t>((of_each + kTile - 1) / kTile));
  const double rounds = heads * sequences * row_tiles / kMultiprocessors;
  const double step = step_alone + (step_together - step_alone) * std::min(rounds, 1.0);

  ChunkEstimate estimate{};
  estimate.absorbed_us = kAbsorbedStart + heads * queries * seen * 2 * (2 * kLatent + kRope) / absorbed + heads * queries * 2 * 2 * kHead * kLatent / kProjection;
  estimate.unabsorbed_us = kUnabsorbedStart + keys * heads * 2 * kLatent * 2 * kHead / kUp + std::max(rounds, 1.0) * (seen / kTile + 1) * step;
  return estimate;
}

constexpr ChunkForm faster_chunk_form(const ChunkWork& work) {
  const ChunkEstimate estimate = estimate_chunk(work);
  return estimate.absorbed_us <= estimate.unabsorbed_us ? ChunkForm::absorbed : ChunkForm::unabsorbed;
}

// Measured: 128 heads change over at 190 to 200 query tokens, 16 heads near 280, whatever is cached; over fp8 KV near 110 and 180; with the generic kernels far earlier.
static_assert(faster_chunk_form({128, 1, 128, 4096 + 128}) == ChunkForm::absorbed && faster_chunk_form({128, 1, 256, 4096 + 256}) == ChunkForm::unabsorbed);
static_assert(faster_chunk_form({128, 1, 192, 16384 + 192}) == ChunkForm::absorbed && faster_chunk_form({128, 1, 256, 16384 + 256}) == ChunkForm::unabsorbed);
static_assert(faster_chunk_form({128, 1, 192, 32768 + 192}) == ChunkForm::absorbed && faster_chunk_form({128, 1, 1024, 4096 + 1024}) == ChunkForm::unabsorbed);
static_assert(faster_chunk_form({16, 1, 256, 4096 + 256}) == ChunkForm::absorbed && faster_chunk_form({16, 1, 512, 4096 + 512}) == ChunkForm::unabsorbed);
static_assert(faster_chunk_form({16, 1, 256, 32768 + 256}) == ChunkForm::absorbed && faster_chunk_form({16, 1, 512, 32768 + 512}) == ChunkForm::unabsorbed);
static_assert(faster_chunk_form({128, 1, 64, 16384 + 64, true}) == ChunkForm::absorbed && faster_chunk_form({128, 1, 192, 16384 + 192, true}) == ChunkForm::unabsorbed);
static_assert(faster_chunk_form({16, 1, 64, 16384 + 64, true}) == ChunkForm::absorbed && faster_chunk_form({16, 1, 192, 16384 + 192, true}) == ChunkForm::unabsorbed);
static_assert(faster_chunk_form({128, 1, 64, 4096 + 64, false, true}) == ChunkForm::unabsorbed);
static_assert(faster_chunk_form({16, 1, 16, 4096 + 16, false, true}) == ChunkForm::absorbed && faster_chunk_form({16, 1, 64, 4096 + 64, false, true}) == ChunkForm::unabsorbed);

}  // namespace tpla::cuda
