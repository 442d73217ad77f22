// Descent on a layer's output error.
#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>

#include "reparam/layer_fit.h"
#include "reparam/muon.h"

namespace tpla::reparam {

// Gradient of ½‖output − exact‖² of one stretch, added to `gradient`.
void LayerFit::add_gradient(const Stretch& stretch, const Ranks& ranks, Ranks& gradient, bool basis) {
  const int64_t heads = shape_.heads;
  std::vector<Attended> attended;
  std::vector<Tensor> cached;
  const Tensor values = value_difference(stretch, ranks, &attended, &cached);
  const Tensor output = compute_->allocate(shape_.hidden, stretch.columns()), value_gradient = compute_->allocate(values->rows, values->cols);
  compute_->multiply(wo_, values, output);
  compute_->multiply(wo_->t(), output, value_gradient);
  const View of_value = value_gradient->row_blocks(heads), nope = nope_queries(stretch, all_heads());

  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const Attended& at = attended[rank];
    const View columns = cached[rank];
    compute_->multiply(of_value, at.outputs->col_blocks(heads).t(), gradient[rank].uv->row_blocks(heads), Update::add);

    const Tensor output_gradient = compute_->allocate(at.outputs->rows, at.outputs->cols);
    compute_->multiply(ranks[rank].uv->row_blocks(heads).t(), of_value, output_gradient->col_blocks(heads));
    const Tensor scores = compute_->allocate(at.probabilities->rows, at.probabilities->cols);  // gradient of the probabilities, then of the scores
    compute_->multiply(columns, output_gradient, scores);
    compute_->softmax_gradient(at.probabilities, scores, shape_.softmax_scale);

    const Tensor query_gradient = compute_->allocate(at.keys_query->rows, at.keys_query->cols);
    compute_->multiply(columns.t(), scores, query_gradient);
    compute_->multiply(nope, query_gradient->col_blocks(heads).t(), gradient[rank].uk->row_blocks(heads), Update::add);
    if (!basis) continue;

    const Tensor column_gradient = compute_->allocate(columns.rows, columns.cols);
    compute_->multiply(scores, at.keys_query->t(), column_gradient);
    compute_->multiply(at.probabilities, output_gradient->t(), column_gradient, Update::add);
    compute_->multiply(column_gradient->t(), stretch.latents, gradient[rank].basis, Update::add);
  }
}

namespace {

// The ranks' bases as one matrix [shared | slice 0 | …]: a shared row is one parameter.
class CommonBasis {
 public:
  CommonBasis(Compute& compute, const std::vector<View>& ranks, int64_t shared) : compute_(compute), shared_(shared), ranks_(ranks) {
    int64_t rows = shared;
    for (const View& rank : ranks) rows += rank.rows - shared;
    values_ = compute.allocate(rows, ranks[0].cols);
    gradient_ = compute.allocate(rows, ranks[0].cols);
    if (shared > 0) compute.copy(ranks[0].row_range(0, shared), values_->row_range(0, shared));
    each_slice([&](const View& rank, int64_t begin, int64_t end) { compute_.copy(rank, values_->row_range(begin, end)); }, ranks);
  }
  const View& values() const { return values_.view(); }
  const View& gradient() const { return gradient_.view(); }

  void gather(const std::vector<View>& gradients) {
    if (shared_ > 0) {
      compute_.zero(gradient_->row_range(0, shared_));
      for (const View& rank : gradients) compute_.add(rank.row_range(0, shared_), 1, gradient_->row_range(0, shared_));
    }
    each_slice([&](const View& rank, int64_t begin, int64_t end) { compute_.copy(rank, gradient_->row_range(begin, end)); }, gradients);
  }
  void spread() {
    for (const View& rank : ranks_) {
      if (shared_ > 0) compute_.copy(values_->row_range(0, shared_), rank.row_range(0, shared_));
    }
    each_slice([&](const View& rank, int64_t begin, int64_t end) { compute_.copy(values_->row_range(begin, end), rank); }, ranks_);
  }

 private:
  // task(the rank's own rows, their first row here, the one after their last).
  template <typename Task>
  void each_slice(Task&& task, const std::vector<View>& ranks) {
    int64_t begin = shared_;
    for (const View& rank : ranks) {
      const int64_t end = begin + rank.rows - shared_;
      task(rank.row_range(shared_, rank.rows), begin, end);
      begin = end;
    }
  }

  Compute& compute_;
  int64_t shared_;
  std::vector<View> ranks_;
  Tensor values_, gradient_;
};

}  // namespace

struct LayerFit::WhiteMetrics {
  Metric queries;               // second moments of each head's queries
  Metric values;                // each head's W_Oᵀ W_O
  Metric latents;               // covariance over tokens
  std::vector<Metric> columns;  // the same of what each rank caches
};

LayerFit::WhiteMetrics LayerFit::metrics(const Ranks& ranks) {
  const int64_t heads = shape_.heads;
  const Tensor queries = compute_->allocate(heads * shape_.nope, shape_.nope), values = compute_->allocate(heads * shape_.v, shape_.v);
  for (const int i : sampled_) {
    const View nope = nope_queries(stretches_[size_t(i)], all_heads());
    compute_->multiply(nope, nope.t(), queries->row_blocks(heads), Update::add);
  }
  const View wo = wo_->col_blocks(heads);
  compute_->multiply(wo.t(), wo, values->row_blocks(heads));
  HostMatrix scatter;
  token_scatter(scatter);
  const Tensor covariance = compute_->upload(scatter);
  std::vector<Metric> columns;
  for (const Rank& rank : ranks) {
    const int64_t width = rank.basis->rows;
    const Tensor half = compute_->allocate(width, shape_.latent), own = compute_->allocate(width, width);
    compute_->multiply(rank.basis, covariance, half);
    compute_->multiply(half, rank.basis->t(), own);
    columns.push_back(make_metric(*compute_, compute_->download(own.view())));
  }
  return {make_metric(*compute_, compute_->download(queries.view())), make_metric(*compute_, compute_->download(values.view())), make_metric(*compute_, std::move(scatter)), std::move(columns)};
}

void LayerFit::refine(Ranks& ranks, const RefineOptions& options) {
  prepare();
  const auto like = [&](const Tensor& tensor) { return compute_->allocate(tensor->rows, tensor->cols); };
  Ranks gradient;
  std::vector<View> bases, basis_gradients;
  for (const Rank& rank : ranks) {
    gradient.push_back({like(rank.basis), like(rank.uk), like(rank.uv)});
    bases.push_back(rank.basis);
    basis_gradients.push_back(gradient.back().basis);
  }
  const WhiteMetrics white = metrics(ranks);
  std::vector<MuonParameter> parameters;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    parameters.emplace_back(*compute_, ranks[rank].uk, gradient[rank].uk, shape_.heads, &white.queries, white.columns[rank]);
    parameters.emplace_back(*compute_, ranks[rank].uv, gradient[rank].uv, shape_.heads, &white.values, white.columns[rank]);
  }
  CommonBasis common(*compute_, bases, options.shared);
  if (options.basis) parameters.emplace_back(*compute_, common.values(), common.gradient(), 1, nullptr, white.latents);

  std::vector<int> order;
  std::mt19937_64 random(options.seed);
  compute_->allow_rounding(true);
  for (int step = 1; step <= options.steps; ++step) {
    for (const Rank& rank : gradient) {
      for (const Tensor* tensor : {&rank.basis, &rank.uk, &rank.uv}) compute_->zero(*tensor);
    }
    int64_t queries = 0;
    for (int taken = 0; queries < options.batch && taken < train_; ++taken) {
      if (order.empty()) {
        for (int s = 0; s < train_; ++s) order.push_back(s);
        for (size_t s = order.size(); s > 1; --s) std::swap(order[s - 1], order[random() % s]);
      }
      const Stretch& stretch = stretches_[size_t(order.back())];
      add_gradient(stretch, ranks, gradient, options.basis);
      queries += stretch.count;
      order.pop_back();
    }
    if (options.basis) common.gather(basis_gradients);
    const float progress = float(step - 1) / float(options.steps);
    const float rate = options.rate * 0.5f * (1 + std::cos(std::numbers::pi_v<float> * progress)) * std::min(1.0f, float(step) / 10);
    for (MuonParameter& parameter : parameters) parameter.step(rate);
    if (options.basis) common.spread();
  }
  compute_->allow_rounding(false);
}

}  // namespace tpla::reparam
