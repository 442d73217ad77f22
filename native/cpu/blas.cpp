#include "cpu/blas.h"

#include <dlfcn.h>

#include <cstring>
#include <initializer_list>

namespace tpla::cpu {

namespace {

#ifdef TPLA_BLAS_LIBRARY
constexpr const char* kLibrary = TPLA_BLAS_LIBRARY;
#else
constexpr const char* kLibrary = nullptr;
#endif

// Values of the CBLAS interface.
constexpr int kRowMajor = 101;
constexpr int kNoTranspose = 111;
constexpr int kTranspose = 112;
using Sgemm = void (*)(int layout, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
                       float beta, float* c, int ldc);

Sgemm load() {
  void* library = kLibrary ? dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (library == nullptr) return nullptr;
  // Our threads divide the work; a library that starts its own for every call would only get in their way.
  for (const char* setter : {"openblas_set_num_threads", "MKL_Set_Num_Threads", "bli_thread_set_num_threads"}) {
    if (void* function = dlsym(library, setter)) reinterpret_cast<void (*)(int)>(function)(1);
  }
  return reinterpret_cast<Sgemm>(dlsym(library, "cblas_sgemm"));
}

Sgemm sgemm() {
  static const Sgemm function = load();
  return function;
}

}  // namespace

const char* blas_name() {
  const char* slash = kLibrary ? std::strrchr(kLibrary, '/') : nullptr;
  return slash ? slash + 1 : kLibrary;
}

bool blas_usable() { return sgemm() != nullptr; }

void blas_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, bool transposed, float* c, int64_t ldc,
               bool accumulate) {
  sgemm()(kRowMajor, kNoTranspose, transposed ? kTranspose : kNoTranspose, int(m), int(n), int(k), 1.0f, a, int(lda), b, int(ldb),
          accumulate ? 1.0f : 0.0f, c, int(ldc));
}

}  // namespace tpla::cpu
