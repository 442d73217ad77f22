#pragma once
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_team.h"
#include "reparam/matrix.h"

namespace tpla::reparam {

struct LayerShape {
  int heads = 0;
  int nope = 0;
  int rope = 0;
  int v = 0;
  int latent = 0;
  int hidden = 0;
  float softmax_scale = 1;
};

// What calibration saw of one layer in one sequence. Latents are normalised, without the norm's gain; rope parts are rotated.
struct Sequence {
  Matrix latents;                // [tokens, latent]
  Matrix rope_keys;              // [tokens, rope]
  std::vector<int> query_token;  // ascending; a query attends to tokens 0..query_token of its sequence
  std::vector<Matrix> queries;   // per head [nope + rope, queries]
};

// One rank's share: u = basis · latent is what it caches, a head's logit is q_nope · uk · u + q_pe · k_pe, and its term of the head's
// value is uv · Σ p u.
struct RankDesign {
  Matrix basis;  // [width, latent]
  Matrix uk;     // [heads * nope, width]
  Matrix uv;     // [heads * v, width]
};
using Design = std::vector<RankDesign>;

// Sums over all heads and sampled queries, [latent, latent], in the latent's coordinates.
struct Sensitivity {
  Matrix token_covariance;      // centred, over tokens
  Matrix attention_covariance;  // mean over heads and queries of Cov_p(latent), p the exact attention
  Matrix key;                   // Σ_h weight_h W_UK,hᵀ E[q qᵀ] W_UK,h: how much logits depend on a direction
  Matrix value;                 // Σ_h W_UV,hᵀ W_O,hᵀ W_O,h W_UV,h: how much the layer's output depends on it
  Matrix output_moment;         // mean over heads and queries of o oᵀ, o = Σ p latent
};

struct RefineOptions {
  int steps = 0;
  float rate = 0.01f;  // relative to a parameter's root mean square
  bool basis = true;   // move the basis too
  int shared = 0;      // leading columns of every rank that are the same
  uint64_t seed = 0;
};

// Fits what decode ranks compute to what exact MLA computes, for one layer, on calibration sequences.
// Sequences [0, train) are fitted on; the rest only measure.
class LayerFit {
 public:
  LayerFit(const LayerShape& shape, Matrix uk, Matrix uv, Matrix wo, std::vector<Sequence> sequences, int train, int threads);

  Sensitivity sensitivity();

  // ‖layer output with `design` − exact‖² / ‖exact‖² over the sequences [begin, end).
  double error(const Design& design, int begin, int end);
  double train_error(const Design& design) { return error(design, 0, train_); }
  double test_error(const Design& design) { return error(design, train_ < sequence_count() ? train_ : 0, sequence_count()); }
  int sequence_count() const { return int(sequences_.size()); }

  // Multiplies each rank's uk by the factor that fits its logits best to the exact ones, in the variance under exact attention:
  // one factor per head, or one for all heads.
  void fit_scales(Design& design, bool per_head);
  // Replaces uk by the regression of the exact absorbed logit on the rank's columns, under attention-weighted covariance.
  void fit_queries(Design& design);
  // Replaces uv by the ridge regression of the exact head value on all ranks' attention outputs, drawn towards the given uv.
  void fit_values(Design& design, double ridge);
  // Descends the squared output error over uk, uv and, if asked for, the bases.
  void refine(Design& design, const RefineOptions& options);

 private:
  struct Exact {
    Matrix values;  // [heads * v, queries]
    Matrix output;  // [hidden, queries]
  };
  struct Attended {
    Matrix probabilities;  // [tokens, queries], columns sum to 1
    Matrix outputs;        // [width, queries]
    Matrix keys_query;     // a = ukᵀ q, [width, queries]
  };

  Left head_rows(const Matrix& m, int head, int per_head) const { return Left(m, int64_t(head) * per_head, int64_t(head + 1) * per_head); }
  // Attention of one head over columns `cached` [tokens, width] with `uk` [nope, width].
  void attend(const Sequence& sequence, int head, const Matrix& cached, const Left& uk, Attended& out) const;
  void exact(const Sequence& sequence, Exact& out);
  std::vector<Matrix> cached_columns(const Sequence& sequence, const Design& design);
  // Rank outputs of all heads, [rank][head].
  std::vector<std::vector<Attended>> attend_all(const Sequence& sequence, const Design& design, const std::vector<Matrix>& cached);
  void values_of(const Design& design, const std::vector<std::vector<Attended>>& attended, Matrix& values);
  // Per head: attention-weighted covariance over the training sequences.
  void head_covariance(int head, Matrix& out) const;
  void add_gradient(int sequence, const Design& design, Design& gradient, bool basis);

  LayerShape shape_;
  Matrix uk_, uv_, wo_;
  std::vector<Sequence> sequences_;
  std::vector<Exact> exact_;
  int train_;
  const cpu::Kernels& kernels_;
  cpu::ThreadTeam team_;
};

}  // namespace tpla::reparam
