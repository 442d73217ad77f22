#include "cuda/cublaslt.h"

#include <algorithm>
#include <array>
#include <map>

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
constexpr int kBatchCount = 5;  // attributes of a matrix layout
constexpr int kBatchStep = 6;
constexpr int kMaxWorkspaceBytes = 1;  // attributes of a preference
constexpr int kMinAlignmentA = 5;      // of A, B, C and D, one after the other

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
  Status (*layout_set)(Descriptor, int, const void*, size_t) = library.symbol<Status(Descriptor, int, const void*, size_t)>("cublasLtMatrixLayoutSetAttribute");
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

  // How products of one shape are computed; `usable` is false where the library refuses.
  struct Plan {
    Descriptor desc = nullptr, a = nullptr, b = nullptr, c = nullptr;
    Algorithm algorithm{};
    bool usable = false;
  };
  using Shape = std::array<int64_t, 15>;
  std::map<Shape, Plan> plans;

  template <class Product>
  const Plan& plan(const Product& product, int type, int value_bytes, size_t workspace_bytes);
  template <class Product>
  bool multiply(const Product& product, int type, int value_bytes, void* workspace, size_t workspace_bytes, CUstream_st* stream);
  void release(const Plan& plan) {
    for (const Descriptor layout : {plan.a, plan.b, plan.c}) {
      if (layout) layout_destroy(layout);
    }
    if (plan.desc) desc_destroy(plan.desc);
  }

  ~Library() {
    for (const auto& [shape, known] : plans) release(known);
    if (handle) destroy(handle);
  }
  bool complete() const {
    return create && destroy && version && desc_create && desc_destroy && desc_set && layout_create && layout_set && layout_destroy && preference_create && preference_destroy &&
           preference_set && heuristic && matmul;
  }
};

template <class Product>
bool CublasLt::Library::multiply(const Product& p, int type, int value_bytes, void* workspace, size_t workspace_bytes, CUstream_st* stream) {
  const Plan& known = plan(p, type, value_bytes, workspace_bytes);
  return known.usable && matmul(handle, known.desc, &p.alpha, p.b, known.b, p.a, known.a, &p.beta, p.c, known.c, p.c, known.c, &known.algorithm, workspace, workspace_bytes, stream) == 0;
}

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

// The largest power of two, up to 16, that divides addresses and distances, in bytes.
static uint32_t alignment_of(const void* data, int64_t ld, int64_t step, int value_bytes) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(ld * value_bytes) | static_cast<uint64_t>(step * value_bytes) | 16;
  return static_cast<uint32_t>(bits & -bits);
}

template <class Product>
const CublasLt::Library::Plan& CublasLt::Library::plan(const Product& p, int type, int value_bytes, size_t workspace_bytes) {
  const std::array<uint32_t, 3> alignments = {alignment_of(p.b, p.ldb, p.step_b, value_bytes), alignment_of(p.a, p.lda, p.step_a, value_bytes),
                                              alignment_of(p.c, p.ldc, p.step_c, value_bytes)};
  const Shape shape = {p.m, p.n, p.k, p.lda, p.ldb, p.ldc, p.step_a, p.step_b, p.step_c, p.count, p.transpose_a, p.transpose_b, p.beta != 0, type,
                       int64_t{alignments[0]} << 16 | alignments[1] << 8 | alignments[2]};
  const auto [entry, fresh] = plans.try_emplace(shape);
  Plan& made = entry->second;
  if (!fresh) return made;
  // Row-major is the transpose of cuBLAS's column-major: Cᵀ = op(B)ᵀ · op(A)ᵀ, where what is stored as rows [r, c] is a column-major [c, r].
  const int32_t count = static_cast<int32_t>(p.count);
  const int32_t of_b = p.transpose_b ? kTransposed : kNotTransposed, of_a = p.transpose_a ? kTransposed : kNotTransposed;
  const auto layout = [&](Descriptor* out, int64_t rows, int64_t cols, int64_t ld, int64_t step) {
    return layout_create(out, type, static_cast<uint64_t>(cols), static_cast<uint64_t>(rows), ld) == 0 && layout_set(*out, kBatchCount, &count, sizeof count) == 0 &&
           layout_set(*out, kBatchStep, &step, sizeof step) == 0;
  };
  Descriptor preference = nullptr;
  Heuristic found{};
  int results = 0;
  const auto prefer = [&](int attribute, const auto& value) { return preference_set(preference, attribute, &value, sizeof value) == 0; };
  made.usable = desc_create(&made.desc, kCompute32F, kTypeF32) == 0 && desc_set(made.desc, kTransposeA, &of_b, sizeof of_b) == 0 &&
                desc_set(made.desc, kTransposeB, &of_a, sizeof of_a) == 0 &&
                layout(&made.b, p.transpose_b ? p.n : p.k, p.transpose_b ? p.k : p.n, p.ldb, p.step_b) &&
                layout(&made.a, p.transpose_a ? p.k : p.m, p.transpose_a ? p.m : p.k, p.lda, p.step_a) && layout(&made.c, p.m, p.n, p.ldc, p.step_c) &&
                preference_create(&preference) == 0 && prefer(kMaxWorkspaceBytes, workspace_bytes) && prefer(kMinAlignmentA, alignments[0]) &&
                prefer(kMinAlignmentA + 1, alignments[1]) && prefer(kMinAlignmentA + 2, alignments[2]) && prefer(kMinAlignmentA + 3, alignments[2]) &&
                heuristic(handle, made.desc, made.b, made.a, made.c, made.c, preference, 1, &found, &results) == 0 && results == 1;
  made.algorithm = found.algorithm;
  if (preference) preference_destroy(preference);
  return made;
}

bool CublasLt::multiply(const Bf16Product& product, void* workspace, size_t workspace_bytes, CUstream_st* stream) {
  struct Complete : Bf16Product {
    bool transpose_a = false;
    float alpha = 1, beta = 0;
  };
  Complete p;
  static_cast<Bf16Product&>(p) = product;
  if (p.lda == 0) p.lda = p.k;
  if (p.ldb == 0) p.ldb = p.transpose_b ? p.k : p.n;
  if (p.ldc == 0) p.ldc = p.n;
  return library_->multiply(p, kTypeBf16, 2, workspace, workspace_bytes, stream);
}

bool CublasLt::multiply(const Fp32Product& product, void* workspace, size_t workspace_bytes, CUstream_st* stream) {
  return library_->multiply(product, kTypeF32, 4, workspace, workspace_bytes, stream);
}

}  // namespace tpla::cuda
