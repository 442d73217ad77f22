// The few entry points of cuBLASLt that are needed, found at run time: machines without it lose nothing but its speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

struct CUstream_st;

namespace tpla::cuda {

// C[i][m, n] = A[i][m, k] · B[i][n, k]ᵀ, or without transpose_b · B[i][k, n], for `count` products: row-major bf16, fp32 accumulation. Leading
// dimensions (0: dense) and the steps from one matrix to the next, which may be 0 for A and B, are in values.
struct Bf16Product {
  const void* a = nullptr;
  const void* b = nullptr;
  void* c = nullptr;
  int64_t m = 0, n = 0, k = 0;
  int64_t lda = 0, ldb = 0, ldc = 0;
  int64_t step_a = 0, step_b = 0, step_c = 0;
  int64_t count = 1;
  bool transpose_b = true;
};

// C[i] = alpha · op(A[i]) · op(B[i]) + beta · C[i] for `count` products, row-major fp32 with fp32 arithmetic throughout (no TF32).
// op(A) is [m, k], op(B) [k, n]; steps are from one matrix to the next, in floats, and may be 0 for A and B.
struct Fp32Product {
  const float* a = nullptr;
  const float* b = nullptr;
  float* c = nullptr;
  int64_t m = 0, n = 0, k = 0;
  int64_t lda = 0, ldb = 0, ldc = 0;
  int64_t step_a = 0, step_b = 0, step_c = 0;
  int64_t count = 1;
  bool transpose_a = false, transpose_b = false;
  float alpha = 1, beta = 0;
};

// Not for use by several threads at a time.
class CublasLt {
 public:
  // Null where the library is not there or lacks a function; `why` then says so.
  static std::unique_ptr<CublasLt> open(std::string* why = nullptr);
  ~CublasLt();

  // "cuBLASLt 13.1.0"
  const std::string& name() const;
  // Enqueues a product; `workspace` must stay untouched until it has run. How the library computes a shape is asked once. False where it refuses.
  bool multiply(const Bf16Product& product, void* workspace, size_t workspace_bytes, CUstream_st* stream);
  bool multiply(const Fp32Product& product, void* workspace, size_t workspace_bytes, CUstream_st* stream);

 private:
  struct Library;
  explicit CublasLt(std::unique_ptr<Library> library);
  std::unique_ptr<Library> library_;
};

}  // namespace tpla::cuda
