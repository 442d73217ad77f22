#include "core/weights.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/error.h"
#include "core/numeric.h"

namespace tpla {

namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

template <typename T>
T load(const std::byte* data, int64_t index) {
  T value;
  std::memcpy(&value, data + size_t(index) * sizeof(T), sizeof(T));
  return value;
}

}  // namespace

int64_t Tensor::elements() const {
  int64_t count = 1;
  for (const int64_t dim : shape) count *= dim;
  return count;
}

void convert_to_float(WeightDType dtype, const std::byte* data, int64_t count, float* out) {
  switch (dtype) {
    case WeightDType::f32:
      std::memcpy(out, data, size_t(count) * 4);
      return;
    case WeightDType::bf16:
      for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_float(load<uint16_t>(data, i));
      return;
    case WeightDType::f16:
      for (int64_t i = 0; i < count; ++i) out[i] = f16_to_float(load<uint16_t>(data, i));
      return;
    case WeightDType::f8_e4m3:
      for (int64_t i = 0; i < count; ++i) out[i] = e4m3_to_float(uint8_t(data[i]));
      return;
  }
}

Weights::Weights(const std::vector<std::string>& files, const std::vector<TensorEntry>& tensors) {
  try {
    for (const std::string& path : files) {
      const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
      if (fd < 0) throw Error("IO_FAILED", path + ": " + std::strerror(errno));
      struct stat status {};
      const bool known = fstat(fd, &status) == 0;
      const size_t size = known ? size_t(status.st_size) : 0;
      void* at = size > 0 ? mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
      const int error = errno;
      close(fd);
      if (at == MAP_FAILED) {
        throw Error("IO_FAILED", path + ": " + (known && size == 0 ? "the file is empty" : std::string("cannot map: ") + std::strerror(error)));
      }
      mappings_.push_back({static_cast<std::byte*>(at), size});
    }
    for (const TensorEntry& entry : tensors) {
      if (entry.file < 0 || size_t(entry.file) >= mappings_.size()) {
        throw Error("CHECKPOINT_INVALID", "tensor " + entry.name + " names file " + std::to_string(entry.file) + " of " + std::to_string(files.size()));
      }
      const Mapping& mapping = mappings_[entry.file];
      if (entry.begin > entry.end || entry.end > mapping.size) {
        throw Error("CHECKPOINT_INVALID", files[entry.file] + ": tensor " + entry.name + " needs bytes " + std::to_string(entry.begin) + " to " +
                                              std::to_string(entry.end) + ", the file has " + std::to_string(mapping.size));
      }
      // Counted so that no shape can overflow past the range check.
      size_t expected = dtype_bytes(entry.dtype);
      const size_t available = entry.end - entry.begin;
      for (const int64_t dim : entry.shape) {
        if (dim < 0 || __builtin_mul_overflow(expected, size_t(dim), &expected)) expected = SIZE_MAX;
      }
      if (expected != available) {
        throw Error("CHECKPOINT_INVALID", files[entry.file] + ": tensor " + entry.name + " of shape " + shape_text(entry.shape) + " needs " +
                                              std::to_string(expected) + " bytes, its range has " + std::to_string(available));
      }
      tensors_.insert_or_assign(entry.name, Tensor{entry.dtype, entry.shape, mapping.data + entry.begin});
      bytes_ += available;
    }
  } catch (...) {
    unmap();
    throw;
  }
}

Weights::~Weights() { unmap(); }

void Weights::unmap() {
  for (const Mapping& mapping : mappings_) munmap(mapping.data, mapping.size);
  mappings_.clear();
}

void Weights::release() const {
  for (const Mapping& mapping : mappings_) madvise(mapping.data, mapping.size, MADV_DONTNEED);
}

const Tensor& Weights::get(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw Error("CHECKPOINT_INVALID", "tensor " + name + " is missing from the checkpoint");
  return found->second;
}

std::vector<float> Weights::read_scales(const std::string& name, int64_t rows, int64_t cols, int block_rows, int block_cols) const {
  const Tensor& tensor = get(name);
  const std::vector<int64_t> expected = {(rows + block_rows - 1) / block_rows, (cols + block_cols - 1) / block_cols};
  if (tensor.shape != expected) {
    throw Error("CHECKPOINT_INVALID", "tensor " + name + " has shape " + shape_text(tensor.shape) + ", expected " + shape_text(expected));
  }
  std::vector<float> scales(size_t(tensor.elements()));
  convert_to_float(tensor.dtype, tensor.data, tensor.elements(), scales.data());
  return scales;
}

std::vector<float> Weights::read(const std::string& name, const std::string& scale_name, int block_rows, int block_cols) const {
  const Tensor& tensor = get(name);
  std::vector<float> out(size_t(tensor.elements()));
  convert_to_float(tensor.dtype, tensor.data, tensor.elements(), out.data());
  if (scale_name.empty()) return out;
  if (tensor.shape.size() != 2 || block_rows < 1 || block_cols < 1) {
    throw Error("REQUEST_INVALID", "block scales apply to a matrix; " + name + " has shape " + shape_text(tensor.shape));
  }
  const int64_t rows = tensor.shape[0];
  const int64_t cols = tensor.shape[1];
  const std::vector<float> scales = read_scales(scale_name, rows, cols, block_rows, block_cols);
  const int64_t scale_ld = (cols + block_cols - 1) / block_cols;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) out[size_t(i * cols + j)] *= scales[size_t(i / block_rows * scale_ld + j / block_cols)];
  }
  return out;
}

}  // namespace tpla
