// The few entry points of cuBLASLt that are needed, found at run time: machines without it lose nothing but its speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

struct CUstream_st;

namespace tpla::cuda {

// C[m, n] = A[m, k] · B[n, k]ᵀ, row-major bf16, fp32 accumulation.
struct Bf16Product {
  const void* a = nullptr;
  const void* b = nullptr;
  void* c = nullptr;
  int64_t m = 0, n = 0, k = 0;
};

class CublasLt {
 public:
  // Null where the library is not there or lacks a function; `why` then says so.
  static std::unique_ptr<CublasLt> open(std::string* why = nullptr);
  ~CublasLt();

  // "cuBLASLt 13.1.0"
  const std::string& name() const;
  // Enqueues a product; `workspace` must stay untouched until it has run. False where the library refuses.
  bool multiply(const Bf16Product& product, void* workspace, size_t workspace_bytes, CUstream_st* stream);

 private:
  struct Library;
  explicit CublasLt(std::unique_ptr<Library> library);
  std::unique_ptr<Library> library_;
};

}  // namespace tpla::cuda
