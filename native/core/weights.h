#pragma once
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/weight_view.h"

namespace tpla {

struct TensorEntry {
  std::string name;
  int file = 0;
  WeightDType dtype = WeightDType::f32;
  std::vector<int64_t> shape;
  size_t begin = 0;
  size_t end = 0;
};

struct Tensor {
  WeightDType dtype;
  std::vector<int64_t> shape;
  const std::byte* data;

  int64_t elements() const;
};

// Tensors of a checkpoint, mapped read-only. A page is read from disk when it is first computed with and the kernel may drop it
// again, so a checkpoint larger than memory still loads.
class Weights {
 public:
  // Throws IO_FAILED for a file that cannot be mapped, CHECKPOINT_INVALID for a tensor outside its file.
  Weights(const std::vector<std::string>& files, const std::vector<TensorEntry>& tensors);
  ~Weights();
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  size_t bytes() const { return bytes_; }
  // Gives the mapped pages back to the kernel; they are read again when used.
  void release() const;
  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  // Throws CHECKPOINT_INVALID when it is missing.
  const Tensor& get(const std::string& name) const;

  // Whole tensor in fp32, row-major; fp8 needs the scale tensor's name.
  std::vector<float> read(const std::string& name, const std::string& scale_name, int block_rows, int block_cols) const;

  // Block scales [ceil(rows / block_rows), ceil(cols / block_cols)] of a matrix, in fp32. Throws CHECKPOINT_INVALID on another shape.
  std::vector<float> read_scales(const std::string& name, int64_t rows, int64_t cols, int block_rows, int block_cols) const;

 private:
  struct Mapping {
    std::byte* data;
    size_t size;
  };
  void unmap();

  std::vector<Mapping> mappings_;
  std::unordered_map<std::string, Tensor> tensors_;
  size_t bytes_ = 0;
};

// Converts `count` stored elements to fp32 without any scale.
void convert_to_float(WeightDType dtype, const std::byte* data, int64_t count, float* out);

}  // namespace tpla
