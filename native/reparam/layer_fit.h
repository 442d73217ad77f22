#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "reparam/compute.h"

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

// What calibration saw of one layer, in host memory, row-major. Latents are normalised, without the norm's gain; rope parts are rotated.
struct Sample {
  const float* latents = nullptr;    // [tokens, latent]
  const float* rope_keys = nullptr;  // [tokens, rope]
  const float* queries = nullptr;    // [queries, heads, nope + rope]
  std::vector<int32_t> bounds;       // first token of each sequence, and the number of tokens
  std::vector<int32_t> query_tokens; // ascending; a query attends to its sequence up to that token
};

// The exact weights in the sample's coordinates, the norm's gain folded in.
struct LayerWeights {
  HostMatrix uk;  // [heads * nope, latent]
  HostMatrix uv;  // [heads * v, latent]
  HostMatrix wo;  // [hidden, heads * v]
};

// One rank's share: u = basis · latent is what it caches, a head's logit is q_nope · uk · u + q_pe · k_pe, and its term of the head's
// value is uv · Σ p u.
struct RankDesign {
  HostMatrix basis;  // [width, latent]
  HostMatrix uk;     // [heads * nope, width]
  HostMatrix uv;     // [heads * v, width]
};
using Design = std::vector<RankDesign>;

// Sums over all heads and sampled queries, [latent, latent], in the latent's coordinates.
struct Sensitivity {
  HostMatrix token_covariance;      // centred, over tokens
  HostMatrix attention_covariance;  // mean over heads and queries of Cov_p(latent), p the exact attention
  HostMatrix key;                   // Σ_h weight_h W_UK,hᵀ E[q qᵀ] W_UK,h: how much logits depend on a direction
  HostMatrix value;                 // Σ_h W_UV,hᵀ W_O,hᵀ W_O,h W_UV,h: how much the layer's output depends on it
  HostMatrix output_moment;         // mean over heads and queries of o oᵀ, o = Σ p latent
};

struct RefineOptions {
  int steps = 0;
  float rate = 0.004f;  // relative to a parameter's root mean square where outputs are white
  bool basis = true;   // move the basis too
  int shared = 0;      // leading columns of every rank that are the same
  int batch = 256;         // queries that one step looks at: as many stretches as have them
  uint64_t seed = 0;
};

// Fits what decode ranks compute to what exact MLA computes, for one layer, on calibration sequences.
// Sequences [0, train) are fitted on; the rest only measure.
//
// A sequence is taken in stretches: some of its queries in order, and the tokens up to the last of them, so that little is computed of what
// causality hides.
//
// In the device's memory, whatever belongs to a query is a column; the columns of a head's queries stand side by side and those of all heads
// follow one another ([rows, heads · queries]), so that what heads share, the cached columns, meets all of them in one product.
class LayerFit {
 public:
  // Copies the sample. Sequences without queries are left out; throws REQUEST_INVALID when none is left.
  LayerFit(std::shared_ptr<Compute> compute, const LayerShape& shape, const LayerWeights& weights, const Sample& sample, int train);

  Sensitivity sensitivity();

  // A design in the device's memory.
  struct Rank {
    Tensor basis, uk, uv;
  };
  using Ranks = std::vector<Rank>;
  Ranks upload(const Design& design);
  Design download(const Ranks& ranks);

  // ‖layer output with `ranks` − exact‖² / ‖exact‖² over a sample of what is fitted on, and over the rest (over all where there is none).
  double train_error(const Ranks& ranks) { return error(ranks, sampled_); }
  double test_error(const Ranks& ranks);

  // Multiplies each rank's uk by the factor that fits its logits best to the exact ones, in the variance under exact attention:
  // one factor per head, or one for all heads.
  void fit_scales(Ranks& ranks, bool per_head);
  // Replaces uk by the regression of the exact absorbed logit on the rank's columns, under attention-weighted covariance.
  void fit_queries(Ranks& ranks);
  // Replaces uv by the ridge regression of the exact head value on all ranks' attention outputs, drawn towards the given uv.
  void fit_values(Ranks& ranks, double ridge);
  // Descends the squared output error over uk, uv and, if asked for, the bases.
  void refine(Ranks& ranks, const RefineOptions& options);

 private:
  struct Stretch {
    std::shared_ptr<const Tensor> whole_latents, whole_rope_keys;  // of the sequence
    View latents;       // [tokens, latent]
    View rope_keys;     // [tokens, rope]
    bool last = false;  // of its sequence: has all of its tokens
    Tensor queries;     // [nope + rope, heads · columns]
    Tensor last_token;  // [1, columns]; -1 where `count` is filled up to whole vectors
    int64_t count = 0;  // of queries
    Tensor values;      // exact head values [heads · v, columns]; empty until they are asked for
    double output_squares = 0;

    int64_t tokens() const { return latents.rows; }
    int64_t columns() const { return last_token->cols; }
  };
  struct Attended {
    Tensor keys_query;     // ukᵀ q [width, heads · columns]
    Tensor probabilities;  // [tokens, heads · columns], columns sum to 1
    Tensor outputs;        // Σ p u [width, heads · columns]
  };
  struct HeadRange {
    int begin, end;
    int count() const { return end - begin; }
  };
  HeadRange all_heads() const { return {0, shape_.heads}; }

  void add_queries(const Sample& sample, int32_t begin, size_t from, size_t to, Stretch& stretch);
  double error(const Ranks& ranks, const std::vector<int>& stretches);

  View of_heads(const View& m, int per_head, HeadRange heads) const;
  View nope_queries(const Stretch& stretch, HeadRange heads) const;
  // Attention of some heads over columns `cached` [tokens, width] with `uk` [heads · nope, width] of all heads.
  Attended attend(const Stretch& stretch, const View& cached, const View& uk, HeadRange heads);
  // Exact head values and output norms, once.
  void prepare();
  Tensor cached_columns(const Stretch& stretch, const Rank& rank);
  // values (+)= uv · outputs, head by head.
  void add_values(const View& uv, const View& outputs, const View& values, Update update);
  // Values of all ranks less the exact ones, [heads · v, columns].
  Tensor value_difference(const Stretch& stretch, const Ranks& ranks, std::vector<Attended>* kept, std::vector<Tensor>* cached);
  // Attention-weighted covariance of each head, side by side [latent, heads · latent], over the training sequences.
  Tensor head_covariances(HeadRange heads);
  // Σ over training tokens, once each, of the centred latents' outer products; returns how many tokens there are.
  int64_t token_scatter(HostMatrix& out);
  struct WhiteMetrics;
  // In which the parameters of a descent are white.
  WhiteMetrics metrics(const Ranks& ranks);
  void add_gradient(const Stretch& stretch, const Ranks& ranks, Ranks& gradient, bool basis);

  std::shared_ptr<Compute> compute_;
  LayerShape shape_;
  Tensor uk_, uv_, wo_;
  std::vector<Stretch> stretches_;
  int train_ = 0;             // stretches [0, train_) are fitted on
  std::vector<int> sampled_;  // of those, enough for statistics
};

}  // namespace tpla::reparam
