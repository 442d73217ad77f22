#include "cuda/cublaslt.h"

#include "core/dynamic_library.h"

namespace tpla::cuda {

namespace {

// Declared here as in cuBLASLt's stable C interface, so that its headers are not needed.
using Status = int;
using Handle = void*;
using Descriptor = void*;
constexpr int kCompute32F = 68;
constexpr int kTypeF32 = 0;
constexpr int kTypeBf16 = 14;
constexpr int kTransposeA = 3;  // attributes of a matmul descriptor
constexpr int kTransposeB = 4;
constexpr int32_t kTransposed = 1;
constexpr int32_t kNotTransposed = 0;
constexpr int kMaxWorkspaceBytes = 1;  // attribute of a preference

struct Algorithm {
  uint64_t data[8];
};

struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

}  // namespace

struct CublasLt::Library {
  DynamicLibrary library{"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so", "/usr/local/cuda/lib64/libcublasLt.so"};
  Status (*create)(Handle*) = library.symbol<Status(Handle*)>("cublasLtCreate");
  Status (*destroy)(Handle) = library.symbol<Status(Handle)>("cublasLtDestroy");
  size_t (*version)() = library.symbol<size_t()>("cublasLtGetVersion");
  Status (*desc_create)(Descriptor*, int, int) = library.symbol<Status(Descriptor*, int, int)>("cublasLtMatmulDescCreate");
  Status (*desc_destroy)(Descriptor) = library.symbol<Status(Descriptor)>("cublasLtMatmulDescDestroy");
  Status (*desc_set)(Descriptor, int, const void*, size_t) = library.symbol<Status(Descriptor, int, const void*, size_t)>("cublasLtMatmulDescSetAttribute");
  Status (*layout_create)(Descriptor*, int, uint64_t, uint64_t, int64_t) = library.symbol<Status(Descriptor*, int, uint64_t, uint64_t, int64_t)>("cublasLtMatrixLayoutCreate");
  Status (*layout_destroy)(Descriptor) = library.symbol<Status(Descriptor)>("cublasLtMatrixLayoutDestroy");
  Status (*preference_create)(Descriptor*) = library.symbol<Status(Descriptor*)>("cublasLtMatmulPreferenceCreate");
  Status (*preference_destroy)(Descriptor) = library.symbol<Status(Descriptor)>("cublasLtMatmulPreferenceDestroy");
  Status (*preference_set)(Descriptor, int, const void*, size_t) =
      library.symbol<Status(Descriptor, int, const void*, size_t)>("cublasLtMatmulPreferenceSetAttribute");
  Status (*heuristic)(Handle, Descriptor, Descriptor, Descriptor, Descriptor, Descriptor, Descriptor, int, Heuristic*, int*) =
      library.symbol<Status(Handle, Descriptor, Descriptor, Descriptor, Descriptor, Descriptor, Descriptor, int, Heuristic*, int*)>("cublasLtMatmulAlgoGetHeuristic");
  Status (*matmul)(Handle, Descriptor, const void*, const void*, Descriptor, const void*, Descriptor, const void*, const void*, Descriptor, void*, Descriptor,
                   const Algorithm*, void*, size_t, CUstream_st*) =
      library.symbol<Status(Handle, Descriptor, const void*, const void*, Descriptor, const void*, Descriptor, const void*, const void*, Descriptor, void*,
                            Descriptor, const Algorithm*, void*, size_t, CUstream_st*)>("cublasLtMatmul");
  Handle handle = nullptr;
  std::string name;

  ~Library() {
    if (handle) destroy(handle);
  }
  bool complete() const {
    return create && destroy && version && desc_create && desc_destroy && desc_set && layout_create && layout_destroy && preference_create && preference_destroy &&
           preference_set && heuristic && matmul;
  }
};

CublasLt::CublasLt(std::unique_ptr<Library> library) : library_(std::move(library)) {}
CublasLt::~CublasLt() = default;

std::unique_ptr<CublasLt> CublasLt::open(std::string* why) {
  auto library = std::make_unique<Library>();
  const auto fail = [&](const std::string& reason) {
    if (why) *why = reason;
    return nullptr;
  };
  if (!library->library) return fail(library->library.error());
  if (!library->complete()) return fail(library->library.path() + " lacks functions of cuBLASLt");
  if (const Status status = library->create(&library->handle); status != 0) {
    library->handle = nullptr;
    return fail("cublasLtCreate failed with status " + std::to_string(status));
  }
  // 130100 is 13.1.0
  const size_t version = library->version();
  library->name = "cuBLASLt " + std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." + std::to_string(version % 100);
  return std::unique_ptr<CublasLt>(new CublasLt(std::move(library)));
}

const std::string& CublasLt::name() const { return library_->name; }

bool CublasLt::multiply(const Bf16Product& p, void* workspace, size_t workspace_bytes, CUstream_st* stream) {
  Library& lt = *library_;
  // Row-major is the transpose of cuBLAS's column-major: Cᵀ[n, m] = B[n, k] · A[m, k]ᵀ, where B and A are stored as columns of k.
  Descriptor desc = nullptr, a = nullptr, b = nullptr, c = nullptr, preference = nullptr;
  const float one = 1, zero = 0;
  Heuristic found{};
  int count = 0;
  const bool ok = lt.desc_create(&desc, kCompute32F, kTypeF32) == 0 && lt.desc_set(desc, kTransposeA, &kTransposed, sizeof kTransposed) == 0 &&
                  lt.desc_set(desc, kTransposeB, &kNotTransposed, sizeof kNotTransposed) == 0 &&
                  lt.layout_create(&b, kTypeBf16, static_cast<uint64_t>(p.k), static_cast<uint64_t>(p.n), p.k) == 0 &&
                  lt.layout_create(&a, kTypeBf16, static_cast<uint64_t>(p.k), static_cast<uint64_t>(p.m), p.k) == 0 &&
                  lt.layout_create(&c, kTypeBf16, static_cast<uint64_t>(p.n), static_cast<uint64_t>(p.m), p.n) == 0 && lt.preference_create(&preference) == 0 &&
                  lt.preference_set(preference, kMaxWorkspaceBytes, &workspace_bytes, sizeof workspace_bytes) == 0 &&
                  lt.heuristic(lt.handle, desc, b, a, c, c, preference, 1, &found, &count) == 0 && count == 1 &&
                  lt.matmul(lt.handle, desc, &one, p.b, b, p.a, a, &zero, p.c, c, p.c, c, &found.algorithm, workspace, workspace_bytes, stream) == 0;
  if (preference) lt.preference_destroy(preference);
  for (const Descriptor layout : {a, b, c}) {
    if (layout) lt.layout_destroy(layout);
  }
  if (desc) lt.desc_destroy(desc);
  return ok;
}

}  // namespace tpla::cuda
