#include "core/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tpla {

namespace {

// Pair index whose wavelength makes `rotations` turns over the original context.
double correction_index(double rotations, int dim, double theta, double context) {
  return dim * std::log(context / (rotations * 2 * std::numbers::pi)) / (2 * std::log(theta));
}

}  // namespace

// Frequencies and angles are rounded to fp32 where PyTorch rounds them, so that long positions agree with published logits.
Rope::Rope(const RopeSpec& spec, int dim) : dim_(dim), interleaved_(spec.interleaved), inverse_frequencies_(dim / 2) {
  double low = 0;
  double high = 0;
  if (spec.yarn) {
    cos_scale_ = float(spec.yarn->cos_scale);
    low = std::max(std::floor(correction_index(spec.yarn->beta_fast, dim, spec.theta, spec.yarn->original_context)), 0.0);
    high = std::min(std::ceil(correction_index(spec.yarn->beta_slow, dim, spec.theta, spec.yarn->original_context)), dim - 1.0);
    if (low == high) high += 0.001;
  }
  for (int i = 0; i < dim / 2; ++i) {
    const float wavelength = float(std::pow(spec.theta, double(float(2 * i) / float(dim))));
    const float extrapolated = 1.0f / wavelength;
    if (!spec.yarn) {
      inverse_frequencies_[i] = extrapolated;
      continue;
    }
    const float interpolated = 1.0f / (float(spec.yarn->factor) * wavelength);
    const float ramp = std::clamp(float((i - low) / (high - low)), 0.0f, 1.0f);
    inverse_frequencies_[i] = interpolated * ramp + extrapolated * (1.0f - ramp);
  }
}

void Rope::tables(const int32_t* positions, int count, float* out) const {
  const int half = dim_ / 2;
  for (int t = 0; t < count; ++t, out += dim_) {
    for (int i = 0; i < half; ++i) {
      const float angle = float(positions[t]) * inverse_frequencies_[i];
      out[i] = float(std::cos(double(angle))) * cos_scale_;
      out[half + i] = float(std::sin(double(angle))) * cos_scale_;
    }
  }
}

void Rope::rotate(float* x, const float* table) const {
  const int half = dim_ / 2;
  const int stride = interleaved_ ? 2 : 1;
  const int partner = interleaved_ ? 1 : half;
  for (int i = 0; i < half; ++i) {
    float& a = x[i * stride];
    float& b = x[i * stride + partner];
    const float cosine = table[i];
    const float sine = table[half + i];
    const float rotated = a * cosine - b * sine;
    b = b * cosine + a * sine;
    a = rotated;
  }
}

}  // namespace tpla
