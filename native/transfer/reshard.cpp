#include "transfer/reshard.h"

#include <algorithm>

#include "core/kv_row.h"

namespace tpla {

namespace {

struct Columns {
  int begin;
  int end;
};

// Canonical latent columns of a destination rank, in the order of its row.
std::vector<Columns> columns_of(const RowLayout& layout, int rank) {
  if (layout.form != KvForm::tpla) return {{0, layout.latent}};
  std::vector<Columns> ranges;
  if (layout.shared > 0) ranges.push_back({0, layout.shared});
  if (layout.slice() > 0) ranges.push_back({layout.slice_begin(rank), layout.slice_begin(rank) + layout.slice()});
  return ranges;
}

// The source rank asked for what every rank holds: spreads reads where there are several.
int replica_for(const RowLayout& src, int copy) { return src.form == KvForm::tpla ? copy % src.ranks : src.form == KvForm::mla ? 0 : kHolder; }

// Appends the pieces of canonical columns `range`, which land from `dst_column` on.
void append_pieces(const RowLayout& src, int copy, Columns range, int dst_column, std::vector<LatentPiece>& pieces) {
  const auto append = [&](LatentPiece piece) {
    if (!pieces.empty()) {
      LatentPiece& last = pieces.back();
      const bool continues = last.src_memory == piece.src_memory && last.src_column + last.columns == piece.src_column &&
                             last.dst_column + last.columns == piece.dst_column;
      if (continues) {
        last.columns += piece.columns;
        return;
      }
    }
    pieces.push_back(piece);
  };
  for (int at = range.begin; at < range.end;) {
    LatentPiece piece{replica_for(src, copy), at, dst_column + at - range.begin, range.end - at};
    if (src.form == KvForm::tpla && at < src.shared) piece.columns = std::min(range.end, src.shared) - at;
    if (src.form == KvForm::tpla && at >= src.shared) {
      const int rank = (at - src.shared) / src.slice();
      piece.src_memory = rank;
      piece.src_column = src.shared + at - src.slice_begin(rank);
      piece.columns = std::min(range.end, src.slice_begin(rank) + src.slice()) - at;
    }
    append(piece);
    at += piece.columns;
  }
}

// An fp8 piece keeps its bytes where its scale groups are whole groups of the destination too.
bool keeps_scale_groups(const LatentPiece& piece, int src_width, int dst_width) {
  if (piece.src_column % kFp8ScaleGroup != 0 || piece.dst_column % kFp8ScaleGroup != 0) return false;
  if (piece.columns % kFp8ScaleGroup == 0) return true;
  return piece.src_column + piece.columns == src_width && piece.dst_column + piece.columns == dst_width;
}

void append_segment(ByteSegment segment, std::vector<ByteSegment>& segments) {
  if (segment.bytes == 0) return;
  if (!segments.empty()) {
    ByteSegment& last = segments.back();
    if (last.src_memory == segment.src_memory && last.src_offset + last.bytes == segment.src_offset && last.dst_offset + last.bytes == segment.dst_offset) {
      last.bytes += segment.bytes;
      return;
    }
  }
  segments.push_back(segment);
}

std::vector<ByteSegment> segments_of(const RowLayout& src, const RowLayout& dst, const RowPlan& plan) {
  std::vector<ByteSegment> segments;
  const bool is_whole_row = plan.pieces.size() == 1 && plan.pieces[0].src_memory == plan.rope_memory && src.width() == dst.width();
  if (is_whole_row) return {{plan.rope_memory, 0, 0, dst.bytes()}};
  const size_t value_bytes = src.dtype == KvDType::f32 ? 4 : src.dtype == KvDType::bf16 ? 2 : 1;
  for (const LatentPiece& piece : plan.pieces) {
    append_segment({piece.src_memory, piece.src_column * value_bytes, piece.dst_column * value_bytes, piece.columns * value_bytes}, segments);
  }
  if (src.dtype == KvDType::fp8) {
    for (const LatentPiece& piece : plan.pieces) {
      const size_t groups = (piece.columns + kFp8ScaleGroup - 1) / kFp8ScaleGroup;
      append_segment({piece.src_memory, fp8_scales_offset(src.width()) + size_t(piece.src_column / kFp8ScaleGroup) * 4,
                      fp8_scales_offset(dst.width()) + size_t(piece.dst_column / kFp8ScaleGroup) * 4, groups * 4},
                     segments);
    }
  }
  append_segment({plan.rope_memory, rope_offset(src), rope_offset(dst), size_t(src.rope) * (src.dtype == KvDType::f32 ? 4 : 2)}, segments);
  return segments;
}

// Segments tile the row in 32-bit words; padding between codes and scales, or 16-bit columns cut at an odd one, do not.
bool tiles_row_in_words(const std::vector<ByteSegment>& segments, size_t row_bytes) {
  size_t covered = 0;
  for (const ByteSegment& segment : segments) {
    if (segment.dst_offset != covered || segment.bytes % 4 != 0) return false;
    covered += segment.bytes;
  }
  return covered == row_bytes;
}

RowPlan plan_copy(const RowLayout& src, const RowLayout& dst, int copy) {
  RowPlan plan;
  plan.rope_memory = replica_for(src, copy);
  int dst_column = 0;
  for (const Columns range : columns_of(dst, copy)) {
    append_pieces(src, copy, range, dst_column, plan.pieces);
    dst_column += range.end - range.begin;
  }
  if (src.dtype != dst.dtype) return plan;
  const bool keeps_values = src.dtype != KvDType::fp8 || std::all_of(plan.pieces.begin(), plan.pieces.end(), [&](const LatentPiece& piece) {
    return keeps_scale_groups(piece, src.width(), dst.width());
  });
  if (!keeps_values) return plan;
  plan.segments = segments_of(src, dst, plan);
  plan.is_copy = tiles_row_in_words(plan.segments, dst.bytes());
  return plan;
}

}  // namespace

std::vector<RowGroup> group_layers(const KvLayout& src, const KvLayout& dst) {
  std::vector<RowGroup> groups;
  for (int layer = 0; layer < src.layers; layer++) {
    const RowLayout from = src.row(layer);
    const RowLayout to = dst.row(layer);
    const auto found = std::find_if(groups.begin(), groups.end(), [&](const RowGroup& group) { return group.src == from && group.dst == to; });
    if (found == groups.end()) groups.push_back({from, to, {layer}});
    else found->layers.push_back(layer);
  }
  return groups;
}

std::vector<RowPlan> plan_reshard(const RowLayout& src, const RowLayout& dst) {
  std::vector<RowPlan> plans;
  for (int copy = 0; copy < copies_per_page(dst); copy++) plans.push_back(plan_copy(src, dst, copy));
  return plans;
}

size_t rope_offset(const RowLayout& layout) {
  switch (layout.dtype) {
    case KvDType::f32: return size_t(layout.width()) * 4;
    case KvDType::bf16: return size_t(layout.width()) * 2;
    case KvDType::fp8: return fp8_rope_offset(layout.width());
  }
  return 0;
}

}  // namespace tpla
