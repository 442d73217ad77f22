#pragma once
#include <cstdint>

namespace tpla::cpu {

// The BLAS that CMake found, loaded only when it is chosen. It serves processors that our own kernels are not written for; on x86 with AVX2 or
// better those read stored bf16 and fp8 directly and win.

// File name of the library; null: built without.
const char* blas_name();
// Loads it; false where it is gone or has no CBLAS interface.
bool blas_usable();

// C[m, n] = A[m, k] · B + (accumulate ? C : 0), all row-major fp32; B is [n, k] when `transposed`, else [k, n]. Single-threaded; only
// after blas_usable() was true.
void blas_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, bool transposed, float* c, int64_t ldc,
               bool accumulate);

}  // namespace tpla::cpu
