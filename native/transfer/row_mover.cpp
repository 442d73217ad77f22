#include "transfer/row_mover.h"

#include <algorithm>
#include <cstring>

#include "core/kv_row.h"
#include "transfer/kv_checksum.h"
#include "transfer/prefetch.h"
#include "transfer/row_hash.h"

namespace tpla {

namespace {

void decode_latent(const RowKernels& kernels, KvDType dtype, int width, const std::byte* row, Range columns, float* out) {
  const size_t count = columns.size();
  switch (dtype) {
    case KvDType::f32:
      std::memcpy(out, row + size_t(columns.begin) * 4, count * 4);
      return;
    case KvDType::bf16:
      kernels.bf16_to_f32(row + size_t(columns.begin) * 2, count, out);
      return;
    case KvDType::fp8: {
      const std::byte* scales = row + fp8_scales_offset(width);
      for (int at = columns.begin; at < columns.end;) {
        const int end = std::min(columns.end, (at / kFp8ScaleGroup + 1) * kFp8ScaleGroup);
        float scale;
        std::memcpy(&scale, scales + size_t(at / kFp8ScaleGroup) * 4, 4);
        kernels.e4m3_to_f32(row + at, end - at, scale, out + at - columns.begin);
        at = end;
      }
      return;
    }
  }
}

void encode_latent(const RowKernels& kernels, KvDType dtype, int width, const float* latent, std::byte* row) {
  switch (dtype) {
    case KvDType::f32:
      std::memcpy(row, latent, size_t(width) * 4);
      return;
    case KvDType::bf16:
      kernels.f32_to_bf16(latent, width, row);
      return;
    case KvDType::fp8: {
      std::byte* scales = row + fp8_scales_offset(width);
      for (int at = 0; at < width; at += kFp8ScaleGroup) {
        const float scale = kernels.f32_to_e4m3(latent + at, std::min(kFp8ScaleGroup, width - at), row + at);
        std::memcpy(scales + size_t(at / kFp8ScaleGroup) * 4, &scale, 4);
      }
      std::memset(row + width, 0, fp8_scales_offset(width) - width);
      return;
    }
  }
}

}  // namespace

RowMover::Making::Making(const RowGroup& group)
    : src(group.src), dst(group.dst), src_bytes(src.bytes()), dst_bytes(dst.bytes()), plans(plan_reshard(src, dst)),
      is_copy(std::all_of(plans.begin(), plans.end(), [](const RowPlan& plan) { return plan.is_copy; })),
      ahead(rows_ahead(src_bytes)) {}

RowMover::RowMover(const KvRegion& src, const KvLayout& dst, bool streams)
    : region_(src), copies_(copies_per_page(dst)), making_of_layer_(size_t(dst.layers)), kernels_(row_kernels()), write_(streams ? kernels_.stream : kernels_.copy),
      write_lanes_(streams ? kernels_.stream_lanes : kernels_.copy_lanes) {
  for (const RowGroup& group : group_layers(src.layout, dst)) {
    for (const int layer : group.layers) making_of_layer_[size_t(layer)] = static_cast<uint16_t>(makings_.size());
    makings_.emplace_back(group);
  }
}

void RowMover::move(const Rows& rows, std::byte* const* to, uint64_t* sums, const Rows* next) const {
  const Making& making = making_of(rows.layer);
  if (making.is_copy) return copy_rows(making, rows, next, to, sums);
  for (int token = rows.tokens.begin; token < rows.tokens.end; token++) {
    const size_t offset = size_t(token - rows.tokens.begin) * making.dst_bytes;
    for (int copy = 0; copy < copies_; copy++) sums[copy] += row_value(convert_row(making, making.plans[size_t(copy)], rows, token, to[copy] + offset), copy, rows.layer, token);
  }
}

const std::byte* RowMover::first_row(const Rows& rows, int memory) const {
  return region_.row(memory == kHolder ? rows.from.memory : memory, rows.layer, rows.from.page, rows.tokens.begin % region_.layout.page_tokens);
}

bool RowMover::keeps_rows(int layer) const {
  const Making& making = making_of(layer);
  if (copies_ != 1 || !making.is_copy || making.src_bytes != making.dst_bytes) return false;
  const std::vector<ByteSegment>& segments = making.plans[0].segments;
  return segments.size() == 1 && segments[0].src_offset == 0 && segments[0].bytes == making.dst_bytes;
}

const std::byte* RowMover::hash(const Rows& rows, uint64_t& sum, const Rows* next) const {
  const Making& making = making_of(rows.layer);
  const int memory = making.plans[0].segments[0].src_memory;
  const auto standing = [&](const Rows& at) {
    return StandingRows{first_row(at, memory), making.src_bytes, at.tokens.size(), 0, at.layer, at.tokens.begin};
  };
  const StandingRows found = standing(rows);
  sum += hash_rows(kernels_, found, next == nullptr ? found : standing(*next));
  return found.at;
}

void RowMover::copy_rows(const Making& making, const Rows& rows, const Rows* next, std::byte* const* to, uint64_t* sums) const {
  // Where a segment of the first row is, and of the first row to come.
  struct Track {
    const ByteSegment* segment;
    int copy;
    const std::byte* at;
    const std::byte* next;
  };
  thread_local std::vector<Track> tracks;
  tracks.clear();
  for (int copy = 0; copy < copies_; copy++) {
    for (const ByteSegment& segment : making.plans[size_t(copy)].segments) {
      const std::byte* at = first_row(rows, segment.src_memory) + segment.src_offset;
      tracks.push_back({&segment, copy, at, next == nullptr ? at : first_row(*next, segment.src_memory) + segment.src_offset});
    }
  }
  const int count = rows.tokens.size();
  const int depth = count / static_cast<int>(kLanes);
  const int next_depth = next == nullptr ? 0 : next->tokens.size() / static_cast<int>(kLanes);
  const size_t src_bytes = making.src_bytes;
  const size_t dst_bytes = making.dst_bytes;
  // Copies inside: what they share of a source row is read while it is in the nearest cache.
  for (int row = 0; row < depth; row++) {
    for (auto track = tracks.begin(); track != tracks.end();) {
      const int copy = track->copy;
      uint64_t hashes[kLanes] = {};
      for (; track != tracks.end() && track->copy == copy; ++track) {
        const ByteSegment& segment = *track->segment;
        uint64_t parts[kLanes];
        write_lanes_({to[copy] + row * dst_bytes + segment.dst_offset, depth * dst_bytes}, {track->at + row * src_bytes, depth * src_bytes}, segment.bytes / 4,
                     segment.dst_offset / 4, lanes_ahead(row + making.ahead, track->at, depth, track->next, next_depth, src_bytes), parts);
        for (size_t lane = 0; lane < kLanes; lane++) hashes[lane] += parts[lane];
      }
      for (size_t lane = 0; lane < kLanes; lane++) sums[copy] += row_value(hashes[lane], copy, rows.layer, rows.tokens.begin + static_cast<int>(lane) * depth + row);
    }
  }
  for (int row = depth * static_cast<int>(kLanes); row < count; row++) {
    for (auto track = tracks.begin(); track != tracks.end();) {
      const int copy = track->copy;
      uint64_t row_hash = 0;
      for (; track != tracks.end() && track->copy == copy; ++track) {
        const ByteSegment& segment = *track->segment;
        row_hash += write_(to[copy] + row * dst_bytes + segment.dst_offset, track->at + row * src_bytes, segment.bytes / 4, segment.dst_offset / 4);
      }
      sums[copy] += row_value(row_hash, copy, rows.layer, rows.tokens.begin + row);
    }
  }
}

uint64_t RowMover::convert_row(const Making& making, const RowPlan& plan, const Rows& rows, int token, std::byte* to) const {
  thread_local std::vector<float> values;
  thread_local std::vector<std::byte> row;
  const RowLayout& src = making.src;
  const RowLayout& dst = making.dst;
  values.resize(size_t(dst.width()) + dst.rope);
  row.resize(making.dst_bytes);
  const size_t offset = size_t(token - rows.tokens.begin) * making.src_bytes;
  for (const LatentPiece& piece : plan.pieces) {
    decode_latent(kernels_, src.dtype, src.width(), first_row(rows, piece.src_memory) + offset, {piece.src_column, piece.src_column + piece.columns},
                  values.data() + piece.dst_column);
  }
  encode_latent(kernels_, dst.dtype, dst.width(), values.data(), row.data());
  convert_rope(making, first_row(rows, plan.rope_memory) + offset + rope_offset(src), row.data() + rope_offset(dst), values.data());
  return write_(to, row.data(), row.size() / 4, 0);
}

// The rope key is fp32 with fp32 latents and bf16 else.
void RowMover::convert_rope(const Making& making, const std::byte* from, std::byte* to, float* values) const {
  const int rope = making.src.rope;
  const bool from_f32 = making.src.dtype == KvDType::f32;
  const bool to_f32 = making.dst.dtype == KvDType::f32;
  if (from_f32 == to_f32) {
    std::memcpy(to, from, size_t(rope) * (from_f32 ? 4 : 2));
  } else if (to_f32) {
    kernels_.bf16_to_f32(from, rope, values);
    std::memcpy(to, values, size_t(rope) * 4);
  } else {
    std::memcpy(values, from, size_t(rope) * 4);
    kernels_.f32_to_bf16(values, rope, to);
  }
}

}  // namespace tpla
