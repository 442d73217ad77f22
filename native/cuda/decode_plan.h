// How a decode launch is divided into blocks, and the workspace that follows from it: the same for MLA and GQA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>

#include "mla_decode_kernel.h"

namespace tpla::cuda {

inline constexpr size_t kArrivalBytes = 4096;  // at the start of every workspace, so that calls of different shapes may share one

inline size_t align_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

struct DecodePlan {
  DecodeKernel kernel;
  int row_tiles = 0;
  int stacked = 1;
  int slots = 0;
  size_t partial_out_bytes = 0;
  size_t partial_sum_bytes = 0;

  // `rows` a sequence, of `columns` output values each, over `blocks` resident blocks. More than `most_row_tiles` are stacked.
  DecodePlan(const DecodeKernel& chosen, int rows, int blocks, int columns, int most_row_tiles) : kernel(chosen), row_tiles((rows + chosen.block_rows - 1) / chosen.block_rows) {
    if (row_tiles > most_row_tiles) {
      stacked = row_tiles;
      row_tiles = 1;
    }
    slots = blocks / row_tiles;
    const size_t rows_of_parts = static_cast<size_t>(this->blocks()) * 2 * kernel.block_rows;
    partial_out_bytes = rows_of_parts * columns * sizeof(float);
    partial_sum_bytes = rows_of_parts * sizeof(float2);
  }

  int blocks() const { return row_tiles * slots; }
  dim3 grid() const { return dim3(row_tiles, slots); }
  size_t workspace_bytes() const { return kArrivalBytes + align_up(partial_out_bytes) + align_up(partial_sum_bytes); }

  // The fields of a kernel's arguments that the plan decides.
  template <class Args>
  void bind(Args& args, void* workspace) const {
    uint8_t* bytes = static_cast<uint8_t*>(workspace);
    args.row_tiles = row_tiles;
    if constexpr (Args::kStacks) args.stacked = stacked;
    args.slots = slots;
    args.arrivals = reinterpret_cast<int*>(bytes);
    args.partial_out = reinterpret_cast<float*>(bytes + kArrivalBytes);
    args.partial_sum = reinterpret_cast<float2*>(bytes + kArrivalBytes + align_up(partial_out_bytes));
  }
};

}  // namespace tpla::cuda
