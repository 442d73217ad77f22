#pragma once
#include <cstddef>
#include <cstdint>

namespace tpla {

// KV pages as both the engine and the transfer engine see them.
//
// One rank's memory is [layer][page][token][row]. A row is one token of one layer on that rank: `width` latent values
// followed by `rope` rope values, where width is
//   mla, dcp, dp : latent
//   tpla         : shared + (latent - shared) / ranks, holding canonical columns [0, shared) then the rank's slice
// and the canonical latent is ordered [shared | slice 0 | ... | slice ranks-1].
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

struct KvLayout {
  KvForm form = KvForm::mla;
  int ranks = 1;
  int layers = 0;
  int latent = 0;
  int rope = 0;
  int shared = 0;
  KvDType dtype = KvDType::bf16;
  int page_tokens = 64;

  int slice() const { return form == KvForm::tpla ? (latent - shared) / ranks : latent; }
  // Latent columns one rank holds.
  int width() const { return form == KvForm::tpla ? shared + slice() : latent; }
  // First canonical column of rank r's slice.
  int slice_begin(int rank) const { return form == KvForm::tpla ? shared + rank * slice() : 0; }

  size_t row_bytes() const {
    const size_t w = width();
    switch (dtype) {
      case KvDType::f32: return (w + rope) * 4;
      case KvDType::bf16: return (w + rope) * 2;
      case KvDType::fp8: return (w + 3) / 4 * 4 + (w + kFp8ScaleGroup - 1) / kFp8ScaleGroup * 4 + size_t(rope) * 2;
    }
    return 0;
  }
  size_t page_bytes() const { return row_bytes() * page_tokens; }
  // Memories behind the ranks: with mla all ranks of one process share one copy.
  int memories() const { return form == KvForm::mla ? 1 : ranks; }
  size_t rank_bytes(int pages) const { return page_bytes() * size_t(pages) * size_t(layers); }
};

// Mapped memory of a whole worker, one base pointer per memory.
struct KvRegion {
  KvLayout layout;
  int pages = 0;
  std::byte* base[64] = {};
  // CUDA device whose addresses `base` holds (its own memory, a peer's, or registered host memory); -1 for plain host memory.
  int device = -1;

  std::byte* row(int memory, int layer, int page, int token) const {
    return base[memory] + ((size_t(layer) * pages + page) * layout.page_tokens + token) * layout.row_bytes();
  }
  std::byte* page(int memory, int layer, int page_id) const { return row(memory, layer, page_id, 0); }
};

}  // namespace tpla
