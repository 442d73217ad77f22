// Descent on a layer's output error.
#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>

#include "reparam/layer_fit.h"

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

constexpr float kBeta1 = 0.9f, kBeta2 = 0.98f;

// One matrix of the design with its moments; steps are relative to its root mean square at the start.
struct Parameter {
  View values, gradient;
  Tensor first, second;
  float scale = 0;

  Parameter(Compute& compute, const View& of, const View& its_gradient)
      : values(of), gradient(its_gradient), first(compute.allocate(of.rows, of.cols)), second(compute.allocate(of.rows, of.cols)) {
    scale = float(std::sqrt(compute.dots(of, of)[0] / double(std::max<int64_t>(1, of.rows * of.cols))));
  }
  void step(Compute& compute, float rate, int time) { compute.adam(values, gradient, first, second, {rate * scale, kBeta1, kBeta2, time}); }
};

}  // namespace

void LayerFit::refine(Ranks& ranks, const RefineOptions& options) {
  prepare();
  Ranks gradient;
  std::vector<Parameter> parameters;
  for (const Rank& rank : ranks) {
    const auto like = [&](const Tensor& tensor) { return compute_->allocate(tensor->rows, tensor->cols); };
    gradient.push_back({like(rank.basis), like(rank.uk), like(rank.uv)});
  }
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    parameters.emplace_back(*compute_, ranks[rank].uk, gradient[rank].uk);
    parameters.emplace_back(*compute_, ranks[rank].uv, gradient[rank].uv);
    if (options.basis) parameters.emplace_back(*compute_, ranks[rank].basis, gradient[rank].basis);
  }
  const Tensor common = compute_->allocate(std::max(1, options.shared), shape_.latent);

  std::vector<int> order;
  std::mt19937_64 random(options.seed);
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
    if (options.shared > 0 && options.basis) {  // a shared row is one parameter
      compute_->zero(common);
      for (const Rank& rank : gradient) compute_->add(rank.basis->row_range(0, options.shared), 1, common);
      for (const Rank& rank : gradient) compute_->copy(common, rank.basis->row_range(0, options.shared));
    }
    const float progress = float(step - 1) / float(options.steps);
    const float rate = options.rate * 0.5f * (1 + std::cos(std::numbers::pi_v<float> * progress)) * std::min(1.0f, float(step) / 10);
    for (Parameter& parameter : parameters) parameter.step(*compute_, rate, step);
  }
}

}  // namespace tpla::reparam
