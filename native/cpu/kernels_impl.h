// The kernels of kernels.h over a vector type `Simd` that the including file defines. Each instruction set compiles this once;
// everything has internal linkage, so that no function built for a newer instruction set is ever called on an older CPU.
//
// Simd: V, width, zero, set1, load, store, add, sub, mul, div, fma(a, b, c) = a * b + c, max, min, reduce_add,
//       load_as<dtype>(bytes), pow2(n) = 2^n for whole n in [-126, 127], transpose(V[width]).

#include <cstring>

#include "core/numeric.h"
#include "cpu/kernels.h"

namespace tpla::cpu {
namespace {

using V = Simd::V;
constexpr int kWidth = Simd::width;
constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kWidth;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---------------------------------------------------------------- stored values

template <WeightDType D>
constexpr size_t kBytes = D == WeightDType::f32 ? 4 : D == WeightDType::f8_e4m3 ? 1 : 2;

template <WeightDType D>
float load_scalar(const std::byte* at) {
  if constexpr (D == WeightDType::f32) {
    float value;
    std::memcpy(&value, at, 4);
    return value;
  } else if constexpr (D == WeightDType::f8_e4m3) {
    return e4m3_to_float(uint8_t(*at));
  } else {
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    return D == WeightDType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
  }
}

// Calls f<dtype>().
template <typename F>
void with_dtype(WeightDType dtype, F&& f) {
  switch (dtype) {
    case WeightDType::f32: return f.template operator()<WeightDType::f32>();
    case WeightDType::bf16: return f.template operator()<WeightDType::bf16>();
    case WeightDType::f16: return f.template operator()<WeightDType::f16>();
    case WeightDType::f8_e4m3: return f.template operator()<WeightDType::f8_e4m3>();
  }
}

float block_scale(const WeightView& w, int64_t row, int64_t col) {
  return w.scale ? w.scale[(w.row0 + row) / w.block_rows * w.scale_ld + (w.col0 + col) / w.block_cols] : 1.0f;
}

// First column after `col` whose scale may differ.
int64_t block_end(const WeightView& w, int64_t col, int64_t end) {
  return w.scale ? smaller(end, ((w.col0 + col) / w.block_cols + 1) * w.block_cols - w.col0) : end;
}
int64_t block_row_end(const WeightView& w, int64_t row, int64_t end) {
  return w.scale ? smaller(end, ((w.row0 + row) / w.block_rows + 1) * w.block_rows - w.row0) : end;
}

template <WeightDType D>
const std::byte* element(const WeightView& w, int64_t row, int64_t col) {
  return w.data + size_t(row * w.ld + col) * kBytes<D>;
}

template <WeightDType D>
void widen_as(const std::byte* stored, int64_t count, float scale, float* out) {
  const V factor = Simd::set1(scale);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Simd::store(out + i, Simd::mul(Simd::template load_as<D>(stored + size_t(i) * kBytes<D>), factor));
  for (; i < count; ++i) out[i] = load_scalar<D>(stored + size_t(i) * kBytes<D>) * scale;
}

void widen(WeightDType dtype, const std::byte* stored, int64_t count, float scale, float* out) {
  with_dtype(dtype, [&]<WeightDType D>() { widen_as<D>(stored, count, scale, out); });
}

// One row's columns [col0, col0 + count) with their scales.
template <WeightDType D>
void widen_row(const WeightView& w, int64_t row, int64_t col0, int64_t count, float* out) {
  for (int64_t col = col0; col < col0 + count;) {
    const int64_t end = block_end(w, col, col0 + count);
    widen_as<D>(element<D>(w, row, col), end - col, block_scale(w, row, col), out + (col - col0));
    col = end;
  }
}

// ---------------------------------------------------------------- matrix product

// Rows x vectors of one register tile: as many accumulators as the register file holds beside B and a broadcast of A.
constexpr int kTileRows = Simd::tile_rows;

template <int Rows, int Vectors>
void tile(const Gemm& g, const float* a, const float* b, float* c, int64_t columns) {
  V acc[Rows][Vectors];
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) acc[i][v] = Simd::zero();
  }
  for (int64_t k = 0; k < g.k; ++k) {
    V row[Vectors];
    for (int v = 0; v < Vectors; ++v) row[v] = Simd::load(b + k * g.b_row + v * kWidth);
    const float* at = a + k * g.a_col;
    for (int i = 0; i < Rows; ++i) {
      const V x = Simd::set1(at[i * g.a_row]);
      for (int v = 0; v < Vectors; ++v) acc[i][v] = Simd::fma(x, row[v], acc[i][v]);
    }
  }
  if (columns == Vectors * kWidth) {
    for (int i = 0; i < Rows; ++i) {
      for (int v = 0; v < Vectors; ++v) {
        float* out = c + i * g.ldc + v * kWidth;
        Simd::store(out, g.accumulate ? Simd::add(Simd::load(out), acc[i][v]) : acc[i][v]);
      }
    }
    return;
  }
  for (int i = 0; i < Rows; ++i) {
    alignas(64) float buffer[Vectors * kWidth];
    for (int v = 0; v < Vectors; ++v) Simd::store(buffer + v * kWidth, acc[i][v]);
    float* out = c + i * g.ldc;
    for (int64_t j = 0; j < columns; ++j) out[j] = g.accumulate ? out[j] + buffer[j] : buffer[j];
  }
}

using Tile = void (*)(const Gemm&, const float*, const float*, float*, int64_t);

template <int Vectors, int... Rows>
struct TileTable {
  static constexpr Tile at[] = {nullptr, tile<Rows + 1, Vectors>...};
};
template <int Vectors, typename Sequence>
struct TileTableOf;
template <int Vectors, int... Rows>
struct TileTableOf<Vectors, std::integer_sequence<int, Rows...>> : TileTable<Vectors, Rows...> {};

template <int Vectors>
void gemm_panel(const Gemm& g, const float* b, float* c, int64_t columns) {
  using Tiles = TileTableOf<Vectors, std::make_integer_sequence<int, kTileRows>>;
  for (int64_t i = 0; i < g.m;) {
    // Rows are shared out evenly, so that a remainder of one or two never runs alone.
    const int64_t left = g.m - i;
    const int64_t tiles = (left + kTileRows - 1) / kTileRows;
    const int64_t rows = (left + tiles - 1) / tiles;
    Tiles::at[rows](g, g.a + i * g.a_row, b, c + i * g.ldc, columns);
    i += rows;
  }
}

void gemm(const Gemm& g) {
  for (int64_t j = 0; j < g.n; j += kPanel) {
    const float* b = g.b + j / kPanel * g.b_panel;
    const int64_t columns = smaller(kPanel, g.n - j);
    if (columns <= kWidth) {
      gemm_panel<1>(g, b, g.c + j, columns);
    } else {
      gemm_panel<kPanelVectors>(g, b, g.c + j, columns);
    }
  }
}

// ---------------------------------------------------------------- packing

template <WeightDType D>
void pack_transposed_as(const WeightView& w, int64_t row0, int64_t n, int64_t col0, int64_t k, float* panels) {
  for (int64_t j = 0; j < n; j += kWidth) {
    // Half a panel: kWidth rows of W become kWidth columns of B.
    float* out = panels + j / kPanel * (k * kPanel) + j % kPanel;
    const int64_t rows = smaller(kWidth, n - j);
    for (int64_t kk = 0; kk < k; kk += kWidth) {
      const int64_t depth = smaller(kWidth, k - kk);
      alignas(64) float edge[kWidth];
      V lanes[kWidth];
      for (int r = 0; r < kWidth; ++r) {
        if (r >= rows) {
          lanes[r] = Simd::zero();
          continue;
        }
        const int64_t row = row0 + j + r;
        const int64_t col = col0 + kk;
        if (depth == kWidth && block_end(w, col, col + kWidth) == col + kWidth) {
          lanes[r] = Simd::template load_as<D>(element<D>(w, row, col));
          if constexpr (D == WeightDType::f8_e4m3) lanes[r] = Simd::mul(lanes[r], Simd::set1(block_scale(w, row, col)));
        } else {
          std::memset(edge, 0, sizeof(edge));
          widen_row<D>(w, row, col, depth, edge);
          lanes[r] = Simd::load(edge);
        }
      }
      Simd::transpose(lanes);
      for (int d = 0; d < depth; ++d) Simd::store(out + (kk + d) * kPanel, lanes[d]);
    }
  }
  // Columns of the last panel beyond the last vector written.
  const int64_t written = (n + kWidth - 1) / kWidth * kWidth;
  for (int64_t j = written; j % kPanel != 0; j += kWidth) {
    float* out = panels + j / kPanel * (k * kPanel) + j % kPanel;
    for (int64_t kk = 0; kk < k; ++kk) Simd::store(out + kk * kPanel, Simd::zero());
  }
}

void pack_transposed(const WeightView& w, int64_t row0, int64_t n, int64_t col0, int64_t k, float* panels) {
  with_dtype(w.dtype, [&]<WeightDType D>() { pack_transposed_as<D>(w, row0, n, col0, k, panels); });
}

template <WeightDType D>
void pack_as(const WeightView& w, int64_t row0, int64_t k, int64_t col0, int64_t n, float* panels) {
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t columns = smaller(kPanel, n - j);
    float* out = panels + j / kPanel * (k * kPanel);
    for (int64_t kk = 0; kk < k; ++kk, out += kPanel) {
      if (columns < kPanel) std::memset(out, 0, sizeof(float) * kPanel);
      widen_row<D>(w, row0 + kk, col0 + j, columns, out);
    }
  }
}

void pack(const WeightView& w, int64_t row0, int64_t k, int64_t col0, int64_t n, float* panels) {
  with_dtype(w.dtype, [&]<WeightDType D>() { pack_as<D>(w, row0, k, col0, n, panels); });
}

// ---------------------------------------------------------------- few rows of x: weights are read once and not packed

// sums[r][i] = x[i, :] · W[row + r, :]
template <WeightDType D, int R, int M>
void dot_block(const WeightView& w, int64_t row, const float* x, int64_t ldx, float (&sums)[R][M]) {
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < M; ++i) sums[r][i] = 0;
  }
  for (int64_t begin = 0; begin < w.cols;) {
    const int64_t end = block_end(w, begin, w.cols);
    V acc[R][M];
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < M; ++i) acc[r][i] = Simd::zero();
    }
    const std::byte* at[R];
    for (int r = 0; r < R; ++r) at[r] = element<D>(w, row + r, 0);
    int64_t k = begin;
    for (; k + kWidth <= end; k += kWidth) {
      V in[M];
      for (int i = 0; i < M; ++i) in[i] = Simd::load(x + i * ldx + k);
      for (int r = 0; r < R; ++r) {
        const V weight = Simd::template load_as<D>(at[r] + size_t(k) * kBytes<D>);
        for (int i = 0; i < M; ++i) acc[r][i] = Simd::fma(weight, in[i], acc[r][i]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const float scale = D == WeightDType::f8_e4m3 ? block_scale(w, row + r, begin) : 1.0f;
      for (int i = 0; i < M; ++i) {
        float sum = Simd::reduce_add(acc[r][i]);
        for (int64_t t = k; t < end; ++t) sum += load_scalar<D>(at[r] + size_t(t) * kBytes<D>) * x[i * ldx + t];
        sums[r][i] += sum * scale;
      }
    }
    begin = end;
  }
}

template <WeightDType D, int R, int M>
void dot_block_store(const WeightView& w, int64_t row, const float* x, int64_t ldx, float* y, int64_t ldy, bool accumulate) {
  float sums[R][M];
  dot_block<D, R, M>(w, row, x, ldx, sums);
  for (int i = 0; i < M; ++i) {
    for (int r = 0; r < R; ++r) {
      float& out = y[i * ldy + row + r];
      out = accumulate ? out + sums[r][i] : sums[r][i];
    }
  }
}

template <WeightDType D, int R>
void dot_block_any(const WeightView& w, int64_t row, const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy, bool accumulate) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) dot_block_store<D, R, 4>(w, row, x + i * ldx, ldx, y + i * ldy, ldy, accumulate);
  switch (m - i) {
    case 3: return dot_block_store<D, R, 3>(w, row, x + i * ldx, ldx, y + i * ldy, ldy, accumulate);
    case 2: return dot_block_store<D, R, 2>(w, row, x + i * ldx, ldx, y + i * ldy, ldy, accumulate);
    case 1: return dot_block_store<D, R, 1>(w, row, x + i * ldx, ldx, y + i * ldy, ldy, accumulate);
  }
}

void dot_rows(const WeightView& w, int64_t row0, int64_t row1, const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy, bool accumulate) {
  with_dtype(w.dtype, [&]<WeightDType D>() {
    int64_t row = row0;
    for (; row + 4 <= row1; row += 4) dot_block_any<D, 4>(w, row, x, ldx, m, y, ldy, accumulate);
    for (; row < row1; ++row) dot_block_any<D, 1>(w, row, x, ldx, m, y, ldy, accumulate);
  });
}

// y[i, col : col + Vectors * width]; the columns lie inside one scale block.
template <WeightDType D, int Vectors, int M>
void column_block(const WeightView& w, int64_t col, const float* x, int64_t ldx, float* y, int64_t ldy, bool accumulate) {
  V acc[M][Vectors];
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < Vectors; ++v) acc[i][v] = accumulate ? Simd::load(y + i * ldy + col + v * kWidth) : Simd::zero();
  }
  for (int64_t begin = 0; begin < w.rows;) {
    const int64_t end = block_row_end(w, begin, w.rows);
    const float scale = D == WeightDType::f8_e4m3 ? block_scale(w, begin, col) : 1.0f;
    for (int64_t k = begin; k < end; ++k) {
      const std::byte* at = element<D>(w, k, col);
      V weight[Vectors];
      for (int v = 0; v < Vectors; ++v) weight[v] = Simd::template load_as<D>(at + size_t(v * kWidth) * kBytes<D>);
      for (int i = 0; i < M; ++i) {
        const V in = Simd::set1(x[i * ldx + k] * scale);
        for (int v = 0; v < Vectors; ++v) acc[i][v] = Simd::fma(in, weight[v], acc[i][v]);
      }
    }
    begin = end;
  }
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < Vectors; ++v) Simd::store(y + i * ldy + col + v * kWidth, acc[i][v]);
  }
}

template <WeightDType D>
void column_scalar(const WeightView& w, int64_t col, const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy, bool accumulate) {
  for (int64_t i = 0; i < m; ++i) {
    float sum = 0;
    for (int64_t k = 0; k < w.rows; ++k) sum += x[i * ldx + k] * load_scalar<D>(element<D>(w, k, col)) * block_scale(w, k, col);
    float& out = y[i * ldy + col];
    out = accumulate ? out + sum : sum;
  }
}

template <WeightDType D, int Vectors>
void column_block_any(const WeightView& w, int64_t col, const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy, bool accumulate) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) column_block<D, Vectors, 4>(w, col, x + i * ldx, ldx, y + i * ldy, ldy, accumulate);
  switch (m - i) {
    case 3: return column_block<D, Vectors, 3>(w, col, x + i * ldx, ldx, y + i * ldy, ldy, accumulate);
    case 2: return column_block<D, Vectors, 2>(w, col, x + i * ldx, ldx, y + i * ldy, ldy, accumulate);
    case 1: return column_block<D, Vectors, 1>(w, col, x + i * ldx, ldx, y + i * ldy, ldy, accumulate);
  }
}

void dot_cols(const WeightView& w, int64_t col0, int64_t col1, const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy, bool accumulate) {
  with_dtype(w.dtype, [&]<WeightDType D>() {
    for (int64_t col = col0; col < col1;) {
      const int64_t end = block_end(w, col, col1);
      for (; col + 4 * kWidth <= end; col += 4 * kWidth) column_block_any<D, 4>(w, col, x, ldx, m, y, ldy, accumulate);
      for (; col + kWidth <= end; col += kWidth) column_block_any<D, 1>(w, col, x, ldx, m, y, ldy, accumulate);
      for (; col < end; ++col) column_scalar<D>(w, col, x, ldx, m, y, ldy, accumulate);
    }
  });
}

// ---------------------------------------------------------------- elementwise

// e^x to about one unit in the last place; below -87.3 the result is 0 (also for -inf), above 88 it stays finite.
V exp_vector(V x) {
  const V clamped = Simd::min(Simd::max(x, Simd::set1(-87.33654f)), Simd::set1(88.0f));
  const V magic = Simd::set1(0x1.8p23f);
  const V n = Simd::sub(Simd::fma(clamped, Simd::set1(1.44269504f), magic), magic);
  V r = Simd::fma(n, Simd::set1(-0.693359375f), clamped);
  r = Simd::fma(n, Simd::set1(2.12194440e-4f), r);
  V p = Simd::set1(1.9875691500e-4f);
  p = Simd::fma(p, r, Simd::set1(1.3981999507e-3f));
  p = Simd::fma(p, r, Simd::set1(8.3334519073e-3f));
  p = Simd::fma(p, r, Simd::set1(4.1665795894e-2f));
  p = Simd::fma(p, r, Simd::set1(1.6666665459e-1f));
  p = Simd::fma(p, r, Simd::set1(5.0000001201e-1f));
  p = Simd::add(Simd::fma(Simd::mul(p, r), r, r), Simd::set1(1.0f));
  return Simd::zero_below(Simd::mul(p, Simd::pow2(n)), x, -87.33654f);
}

float exp_scalar(float x) {
  alignas(64) float lanes[kWidth];
  Simd::store(lanes, exp_vector(Simd::set1(x)));
  return lanes[0];
}

void softmax_columns(float* s, int64_t keys, int64_t cols, int64_t ld, float scale, float* max, float* sum, float* correction) {
  const V factor = Simd::set1(scale);
  const V lowest = Simd::set1(-3.0e38f);
  for (int64_t j = 0; j < cols; j += kWidth) {
    const V before = Simd::load(max + j);
    V top = Simd::set1(-__builtin_inff());
    for (int64_t t = 0; t < keys; ++t) top = Simd::max(top, Simd::load(s + t * ld + j));
    // A column that has seen no key keeps max -inf, which the clamp keeps out of the differences.
    const V now = Simd::max(before, Simd::mul(top, factor));
    const V shift = Simd::max(now, lowest);
    const V fade = exp_vector(Simd::sub(Simd::max(before, lowest), shift));
    V total = Simd::mul(Simd::load(sum + j), fade);
    for (int64_t t = 0; t < keys; ++t) {
      const V p = exp_vector(Simd::sub(Simd::mul(Simd::load(s + t * ld + j), factor), shift));
      Simd::store(s + t * ld + j, p);
      total = Simd::add(total, p);
    }
    Simd::store(max + j, now);
    Simd::store(sum + j, total);
    Simd::store(correction + j, fade);
  }
}

double exp_shifted(const float* x, int64_t count, float shift, float factor, float* out) {
  constexpr int64_t kBlock = 1024;
  const V s = Simd::set1(shift);
  const V f = Simd::set1(factor);
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = smaller(count, begin + kBlock);
    V acc = Simd::zero();
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
      const V e = exp_vector(Simd::mul(Simd::sub(Simd::load(x + i), s), f));
      Simd::store(out + i, e);
      acc = Simd::add(acc, e);
    }
    for (; i < end; ++i) total += out[i] = exp_scalar((x[i] - shift) * factor);
    total += Simd::reduce_add(acc);
  }
  return total;
}

void rms_norm(const float* x, const float* gamma, int64_t count, float eps, float* out) {
  V acc = Simd::zero();
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const V v = Simd::load(x + i);
    acc = Simd::fma(v, v, acc);
  }
  float squares = Simd::reduce_add(acc);
  for (; i < count; ++i) squares += x[i] * x[i];
  const float inverse = 1.0f / __builtin_sqrtf(squares / float(count) + eps);
  const V factor = Simd::set1(inverse);
  for (i = 0; i + kWidth <= count; i += kWidth) Simd::store(out + i, Simd::mul(Simd::mul(Simd::load(x + i), factor), Simd::load(gamma + i)));
  for (; i < count; ++i) out[i] = x[i] * inverse * gamma[i];
}

void silu_mul(const float* gate, const float* up, int64_t count, float* out) {
  const V one = Simd::set1(1.0f);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const V g = Simd::load(gate + i);
    const V sigmoid = Simd::div(one, Simd::add(one, exp_vector(Simd::sub(Simd::zero(), g))));
    Simd::store(out + i, Simd::mul(Simd::mul(g, sigmoid), Simd::load(up + i)));
  }
  for (; i < count; ++i) out[i] = gate[i] / (1.0f + exp_scalar(-gate[i])) * up[i];
}

void add(float* x, const float* y, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Simd::store(x + i, Simd::add(Simd::load(x + i), Simd::load(y + i)));
  for (; i < count; ++i) x[i] += y[i];
}

void axpy(float a, const float* x, int64_t count, float* y) {
  const V factor = Simd::set1(a);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Simd::store(y + i, Simd::fma(factor, Simd::load(x + i), Simd::load(y + i)));
  for (; i < count; ++i) y[i] += a * x[i];
}

void scale(float* x, float factor, int64_t count) {
  const V f = Simd::set1(factor);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Simd::store(x + i, Simd::mul(Simd::load(x + i), f));
  for (; i < count; ++i) x[i] *= factor;
}

int64_t multiply_add_loop(int64_t rounds) {
  // Enough independent chains for two units of latency four; few enough for the compiler to keep them in registers.
  constexpr int kChains = 12;
  V acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = Simd::set1(float(i));
  const V factor = Simd::set1(0.5f);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = Simd::fma(acc[i], factor, factor);
  }
  V total = Simd::zero();
  for (int i = 0; i < kChains; ++i) total = Simd::add(total, acc[i]);
  return Simd::reduce_add(total) != 0 ? rounds * kChains * kWidth * 2 : 0;
}

float sum(const float* x, int64_t count) {
  V acc[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    for (int v = 0; v < 4; ++v) acc[v] = Simd::add(acc[v], Simd::load(x + i + v * kWidth));
  }
  return Simd::reduce_add(Simd::add(Simd::add(acc[0], acc[1]), Simd::add(acc[2], acc[3])));
}

constexpr Kernels kKernels = {
    Simd::name, kPanel, gemm, pack_transposed, pack, dot_rows, dot_cols, widen, softmax_columns, exp_shifted, rms_norm, silu_mul, add, axpy, scale, multiply_add_loop, sum,
};

}  // namespace
}  // namespace tpla::cpu
