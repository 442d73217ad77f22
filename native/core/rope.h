#pragma once
#include <cstdint>
#include <vector>

#include "core/model_spec.h"

namespace tpla {

// Rotary position embedding with YaRN (Peng et al. 2023, "NTK-by-parts") as DeepSeek uses it.
class Rope {
 public:
  Rope(const RopeSpec& spec, int dim);

  int dim() const { return dim_; }
  bool interleaved() const { return interleaved_; }

  // cos and sin of every pair, [count][2][dim / 2]: first all cosines, then all sines.
  void tables(const int32_t* positions, int count, float* out) const;

  // Rotates one vector [dim] in place with one row of tables().
  void rotate(float* x, const float* table) const;

 private:
  int dim_;
  bool interleaved_;
  float cos_scale_ = 1;
  std::vector<float> inverse_frequencies_;
};

}  // namespace tpla
