// What calibration says of a layer's latents, queries and values.
#include "reparam/layer_fit.h"

namespace tpla::reparam {

int64_t LayerFit::token_scatter(HostMatrix& out) {
  const Tensor scatter = compute_->allocate(shape_.latent, shape_.latent);
  std::vector<double> sum(size_t(shape_.latent), 0.0);
  int64_t tokens = 0;
  for (int i = 0; i < train_; ++i) {
    if (!stretches_[size_t(i)].last) continue;
    const View& latents = stretches_[size_t(i)].latents;
    compute_->multiply(latents.t(), latents, scatter, Update::add);
    const std::vector<double> part = compute_->column_sums(latents);
    for (size_t j = 0; j < sum.size(); ++j) sum[j] += part[j];
    tokens += latents.rows;
  }
  out = compute_->download(scatter.view());
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.cols; ++j) out.at(i, j) = float(out.at(i, j) - sum[size_t(i)] * sum[size_t(j)] / double(tokens));
  }
  return tokens;
}

static void scale(HostMatrix& m, double factor) {
  for (float& value : m.values) value = float(value * factor);
}

Sensitivity LayerFit::sensitivity() {
  prepare();
  const int64_t r = shape_.latent, heads = shape_.heads, v = shape_.v;
  Sensitivity sums;
  scale(sums.token_covariance, 1 / double(token_scatter(sums.token_covariance)));

  const Tensor attention = compute_->allocate(r, r), outputs = compute_->allocate(r, r);
  const Tensor query_moment = compute_->allocate(heads * shape_.nope, shape_.nope);
  // Covariance of each head's value under attention, one below the other.
  const Tensor value_covariance = compute_->allocate(heads * v, v);
  int64_t queries = 0;
  for (const int i : sampled_) {
    const Stretch& stretch = stretches_[size_t(i)];
    queries += stretch.count;
    const Attended attended = attend(stretch, stretch.latents, uk_, all_heads());
    compute_->multiply(attended.outputs, attended.outputs->t(), outputs, Update::add);

    const Tensor weight = compute_->allocate(stretch.tokens(), heads), total = compute_->allocate(stretch.tokens(), 1);
    compute_->block_sums(attended.probabilities, weight);
    compute_->block_sums(weight, total);
    const Tensor weighted = compute_->allocate(stretch.tokens(), r);
    compute_->weigh_rows(stretch.latents, total, weighted);
    compute_->multiply(stretch.latents.t(), weighted, attention, Update::add);

    const Tensor token_values = compute_->allocate(stretch.tokens(), heads * v), weighted_values = compute_->allocate(stretch.tokens(), heads * v);
    compute_->multiply(stretch.latents, uv_->t(), token_values);
    compute_->weigh_rows(token_values->col_blocks(heads), weight, weighted_values->col_blocks(heads));
    compute_->multiply(token_values->col_blocks(heads).t(), weighted_values->col_blocks(heads), value_covariance->row_blocks(heads), Update::add);
    const View values = stretch.values->row_blocks(heads);
    compute_->multiply(values, values.t(), value_covariance->row_blocks(heads), Update::add, -1);

    const View nope = nope_queries(stretch, all_heads());
    compute_->multiply(nope, nope.t(), query_moment->row_blocks(heads), Update::add);
  }
  compute_->add(outputs, -1, attention);
  sums.attention_covariance = compute_->download(attention.view());
  sums.output_moment = compute_->download(outputs.view());
  scale(sums.attention_covariance, 1 / (double(queries) * double(heads)));
  scale(sums.output_moment, 1 / (double(queries) * double(heads)));

  // Value: Σ_h W_UVᵀ (W_Oᵀ W_O) W_UV.
  const Tensor output_gram = compute_->allocate(heads * v, v), half_value = compute_->allocate(heads * v, r), value = compute_->allocate(r, r);
  const View wo = wo_->col_blocks(heads);
  compute_->multiply(wo.t(), wo, output_gram->row_blocks(heads));
  compute_->multiply(output_gram->row_blocks(heads), uv_->row_blocks(heads), half_value->row_blocks(heads));
  compute_->multiply(uv_->t(), half_value, value);
  sums.value = compute_->download(value.view());

  // Key: Σ_h W_UKᵀ E[q qᵀ] W_UK, weighted by what one unit of logit variance does to the head's output: s² times the variance of the
  // output that attention chooses from.
  const std::vector<double> response = compute_->dots(output_gram->row_blocks(heads), value_covariance->row_blocks(heads));
  const double unit = double(shape_.softmax_scale) * shape_.softmax_scale / double(queries);
  const Tensor half_key = compute_->allocate(heads * shape_.nope, r), weighted_key = compute_->allocate(heads * shape_.nope, r), key = compute_->allocate(r, r);
  compute_->multiply(query_moment->row_blocks(heads), uk_->row_blocks(heads), half_key->row_blocks(heads));
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t begin = head * shape_.nope, end = begin + shape_.nope;
    compute_->add(half_key->row_range(begin, end), float(response[size_t(head)] * unit / double(queries)), weighted_key->row_range(begin, end));
  }
  compute_->multiply(uk_->t(), weighted_key, key);
  sums.key = compute_->download(key.view());
  return sums;
}

Tensor LayerFit::head_covariances(HeadRange heads) {
  const int64_t r = shape_.latent, count = heads.count();
  Tensor out = compute_->allocate(r, count * r);
  for (const int i : sampled_) {
    const Stretch& stretch = stretches_[size_t(i)];
    const Attended attended = attend(stretch, stretch.latents, uk_, heads);
    const Tensor weight = compute_->allocate(stretch.tokens(), count), weighted = compute_->allocate(stretch.tokens(), count * r);
    compute_->block_sums(attended.probabilities, weight);
    compute_->weigh_rows(stretch.latents.repeated(count), weight, weighted->col_blocks(count));
    compute_->multiply(stretch.latents.t(), weighted, out, Update::add);
    const View outputs = attended.outputs->col_blocks(count);
    compute_->multiply(outputs, outputs.t(), out->col_blocks(count), Update::add, -1);
  }
  return out;
}

}  // namespace tpla::reparam
