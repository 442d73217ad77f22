#pragma once
#include <cstddef>
#include <cstdint>

#include "core/weight_view.h"

namespace tpla::cpu {

// C[m, n] (+)= A[m, k] · B[k, n] in fp32. A is read with any strides; B in panels of Kernels::panel columns, whole vectors at a
// time, so the memory behind a panel must be readable up to the next multiple of the panel width.
struct Gemm {
  int64_t m, n, k;
  const float* a;
  int64_t a_row, a_col;
  const float* b;
  int64_t b_panel;  // from one panel to the next
  int64_t b_row;    // from one k to the next inside a panel
  float* c;
  int64_t ldc;
  bool accumulate;
};

// Single-threaded building blocks for one instruction set; callers divide the work. Every product is accumulated in fp32.
struct Kernels {
  const char* name;
  int panel;

  void (*gemm)(const Gemm& gemm);

  // B = W[row0 : row0 + n, col0 : col0 + k]ᵀ as panels [ceil(n / panel)][k][panel], padded with zeros.
  void (*pack_transposed)(const WeightView& w, int64_t row0, int64_t n, int64_t col0, int64_t k, float* panels);
  // B = W[row0 : row0 + k, col0 : col0 + n] as panels, the same way.
  void (*pack)(const WeightView& w, int64_t row0, int64_t k, int64_t col0, int64_t n, float* panels);

  // y[i, j] (+)= x[i, :] · W[j, :] for j in [row0, row1): reads each weight once for a few rows of x.
  void (*dot_rows)(const WeightView& w, int64_t row0, int64_t row1, const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy, bool accumulate);
  // y[i, j] (+)= x[i, :] · W[:, j] for j in [col0, col1).
  void (*dot_cols)(const WeightView& w, int64_t col0, int64_t col1, const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy, bool accumulate);

  // out[i] = stored[i] * scale.
  void (*widen)(WeightDType dtype, const std::byte* stored, int64_t count, float scale, float* out);

  // Online softmax down the columns of s[keys, cols]: s becomes exp(scale * s - max), where max and sum run over all calls;
  // correction[j] is what earlier weighted sums of column j must be multiplied by. `cols` is rounded up to whole vectors.
  void (*softmax_columns)(float* s, int64_t keys, int64_t cols, int64_t ld, float scale, float* max, float* sum, float* correction);

  // out[i] = e^((x[i] - shift) * factor), 0 far below; returns the sum.
  double (*exp_shifted)(const float* x, int64_t count, float shift, float factor, float* out);
  void (*rms_norm)(const float* x, const float* gamma, int64_t count, float eps, float* out);
  void (*silu_mul)(const float* gate, const float* up, int64_t count, float* out);
  void (*add)(float* x, const float* y, int64_t count);
  // y += a * x
  void (*axpy)(float a, const float* x, int64_t count, float* y);
  void (*scale)(float* x, float factor, int64_t count);

  // For measuring the machine: nothing but fused multiply-adds, returning how many operations (2 each) were made, and a pass over memory.
  int64_t (*multiply_add_loop)(int64_t rounds);
  float (*sum)(const float* x, int64_t count);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

struct TileKernels;

// Everything chosen at run time for one processor.
struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  // Products on bf16 hardware (bf16_tiles.h), or null.
  const TileKernels* tiles;
  // Whether the tiles beat fp32 arithmetic even when activations go through them in several parts.
  bool tiles_for_fp32;
  // Whether larger products go to the BLAS that was found when this was built.
  bool blas;
};

// The best this CPU runs, or the one named: portable, blas, avx2, avx512, avx512_bf16 or amx. Throws CONFIG_INVALID for a name that is unknown
// or beyond this CPU.
const InstructionSet& select_instruction_set(const char* name);
inline const Kernels& select_kernels(const char* name) { return *select_instruction_set(name).kernels; }

}  // namespace tpla::cpu
