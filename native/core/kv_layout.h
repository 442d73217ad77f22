#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace tpla {

// KV pages as both the engine and the transfer engine see them.
//
// One rank's memory is [layer][page][token][row]. A row is one token of one layer on that rank: `width` latent values
// followed by `rope` rope values, where width is
//   mla, dcp, dp : latent
//   tpla         : shared + (latent - shared) / ranks, holding canonical columns [0, shared) then the rank's slice
// and the canonical latent is ordered [shared | slice 0 | ... | slice ranks-1]. Layers may differ in `shared`, and so in the width of
// their rows; canonical rows (mla) are as wide in every layer. Where shared is the whole latent, every rank holds the layer exactly.
//
// Bytes of a row:
//   f32  : (width + rope) * 4
//   bf16 : (width + rope) * 2
//   fp8  : width e4m3 | ceil(width / 128) fp32 power-of-two scales (value = e4m3 * scale) | rope bf16.
//          512 + 64 gives 656 B. Scale groups are cut from the rank's own columns, starting at its column 0, so that a rank's
//          row is self-contained; with shared = 0 and (latent / ranks) % 128 == 0 a slice's bytes are those of the canonical row.
//          The width is padded with zero bytes to a multiple of 4 before the scales where needed.

enum class KvDType : uint8_t { f32, bf16, fp8 };
enum class KvForm : uint8_t { mla, tpla, dcp, dp };

inline constexpr int kFp8ScaleGroup = 128;

// A row of one layer.
struct RowLayout {
  KvForm form = KvForm::mla;
  int ranks = 1;
  int latent = 0;
  int rope = 0;
  int shared = 0;
  KvDType dtype = KvDType::bf16;

  bool operator==(const RowLayout& other) const {
    return form == other.form && ranks == other.ranks && latent == other.latent && rope == other.rope && shared == other.shared && dtype == other.dtype;
  }

  int slice() const { return form == KvForm::tpla ? (latent - shared) / ranks : latent; }
  // Latent columns one rank holds.
  int width() const { return form == KvForm::tpla ? shared + slice() : latent; }
  // First canonical column of rank r's slice.
  int slice_begin(int rank) const { return form == KvForm::tpla ? shared + rank * slice() : 0; }

  size_t bytes() const {
    const size_t w = width();
    switch (dtype) {
      case KvDType::f32: return (w + rope) * 4;
      case KvDType::bf16: return (w + rope) * 2;
      case KvDType::fp8: return (w + 3) / 4 * 4 + (w + kFp8ScaleGroup - 1) / kFp8ScaleGroup * 4 + size_t(rope) * 2;
    }
    return 0;
  }
};

// Width of the shared subspace: the same in every layer, or one for each.
class SharedWidths {
 public:
  SharedWidths(int every = 0) : every_(every) {}
  explicit SharedWidths(std::vector<int> by_layer) : by_layer_(std::move(by_layer)) {
    const bool is_uniform = std::all_of(by_layer_.begin(), by_layer_.end(), [this](int width) { return width == by_layer_[0]; });
    if (!is_uniform) return;
    every_ = by_layer_.empty() ? 0 : by_layer_[0];
    by_layer_.clear();
  }

  bool is_uniform() const { return by_layer_.empty(); }
  // Of each layer; empty where all are the same.
  const std::vector<int>& by_layer() const { return by_layer_; }
  int operator[](int layer) const { return is_uniform() ? every_ : by_layer_[size_t(layer)]; }

 private:
  int every_ = 0;
  std::vector<int> by_layer_;
};

struct KvLayout {
  KvForm form = KvForm::mla;
  int ranks = 1;
  int layers = 0;
  int latent = 0;
  int rope = 0;
  SharedWidths shared;
  KvDType dtype = KvDType::bf16;
  int page_tokens = 64;

  RowLayout row(int layer) const { return {form, ranks, latent, rope, shared[layer], dtype}; }
  size_t row_bytes(int layer) const { return row(layer).bytes(); }
  size_t page_bytes(int layer) const { return row_bytes(layer) * page_tokens; }
  // A token's rows in layers [begin, end).
  size_t token_bytes(int begin, int end) const {
    if (shared.is_uniform()) return row_bytes(0) * size_t(end - begin);
    size_t bytes = 0;
    for (int layer = begin; layer < end; layer++) bytes += row_bytes(layer);
    return bytes;
  }
  size_t token_bytes() const { return token_bytes(0, layers); }
  size_t widest_row_bytes() const {
    size_t widest = row_bytes(0);
    for (int layer = 1; layer < int(shared.by_layer().size()); layer++) widest = std::max(widest, row_bytes(layer));
    return widest;
  }
  // Memories behind the ranks: with mla all ranks of one process share one copy.
  int memories() const { return form == KvForm::mla ? 1 : ranks; }
  size_t rank_bytes(int pages) const { return token_bytes() * page_tokens * size_t(pages); }
};

// Mapped memory of a whole worker, one base pointer per memory.
struct KvRegion {
  KvRegion(const KvLayout& of, int count) : layout(of), pages(count) {
    size_t offset = 0;
    for (int layer = 0; layer < layout.layers; layer++) {
      layers_.push_back({offset, layout.row_bytes(layer)});
      offset += layout.page_bytes(layer) * size_t(pages);
    }
  }

  const KvLayout layout;
  const int pages;
  std::byte* base[64] = {};
  // CUDA device whose addresses `base` holds (its own memory, a peer's, or registered host memory); -1 for plain host memory.
  int device = -1;

  // From a memory's base.
  size_t layer_offset(int layer) const { return layers_[size_t(layer)].offset; }
  std::byte* row(int memory, int layer, int page, int token) const {
    const Layer& at = layers_[size_t(layer)];
    return base[memory] + at.offset + (size_t(page) * layout.page_tokens + token) * at.row_bytes;
  }
  std::byte* page(int memory, int layer, int page_id) const { return row(memory, layer, page_id, 0); }

 private:
  struct Layer {
    size_t offset;
    size_t row_bytes;
  };
  std::vector<Layer> layers_;
};

}  // namespace tpla
