// The closed forms: factors on logits, regressed logits, ridge values.
#include <algorithm>

#include "reparam/layer_fit.h"

namespace tpla::reparam {

void LayerFit::fit_scales(Ranks& ranks, bool per_head) {
  const size_t heads = size_t(shape_.heads);
  std::vector<double> cross(ranks.size() * heads), own(cross.size());
  for (const int i : sampled_) {
    const Stretch& stretch = stretches_[size_t(i)];
    const Attended exact = attend(stretch, stretch.latents, uk_, all_heads());
    const View shape = exact.probabilities;
    const Tensor exact_logits = compute_->allocate(shape.rows, shape.cols), logits = compute_->allocate(shape.rows, shape.cols);
    compute_->multiply(stretch.latents, exact.keys_query, exact_logits);
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      const Tensor query = compute_->allocate(ranks[rank].basis->rows, shape.cols);
      compute_->multiply(ranks[rank].uk->row_blocks(shape_.heads).t(), nope_queries(stretch, all_heads()), query->col_blocks(shape_.heads));
      compute_->multiply(cached_columns(stretch, ranks[rank]), query, logits);
      std::vector<double> both, square;
      compute_->covariances(exact.probabilities, exact_logits, logits, both, square);
      for (size_t column = 0; column < both.size(); ++column) {
        const size_t head = rank * heads + column / size_t(stretch.columns());
        cross[head] += both[column];
        own[head] += square[column];
      }
    }
  }
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    double all_cross = 0, all_own = 0;
    for (size_t head = 0; head < heads; ++head) {
      all_cross += cross[rank * heads + head];
      all_own += own[rank * heads + head];
    }
    for (size_t head = 0; head < heads; ++head) {
      const double c = per_head ? cross[rank * heads + head] : all_cross;
      const double o = per_head ? own[rank * heads + head] : all_own;
      const View uk = ranks[rank].uk->row_range(int64_t(head) * shape_.nope, int64_t(head + 1) * shape_.nope);
      if (o > 0) compute_->add(uk, float(c / o) - 1, uk);
    }
  }
}

// How much of the token covariance is mixed into a head's own, whose sharp attention leaves directions unseen.
static constexpr double kCovarianceMix = 1.0;
// Of the diagonal, against columns that are nearly combinations of others.
static constexpr double kQueryRidge = 1e-5;
// Bound on what the covariances of the heads that are fitted together take.
static constexpr int64_t kCovarianceFloats = 64 << 20;

static std::vector<double> block_traces(Compute& compute, const View& blocks, const View& identity) { return compute.dots(blocks, identity.repeated(blocks.count)); }

void LayerFit::fit_queries(Ranks& ranks) {
  const int64_t r = shape_.latent;
  HostMatrix scatter;
  token_scatter(scatter);
  HostMatrix eye(r, r);
  double token_trace = 0;
  for (int64_t i = 0; i < r; ++i) {
    eye.at(i, i) = 1;
    token_trace += scatter.at(i, i);
  }
  const Tensor tokens = compute_->upload(scatter), identity = compute_->upload(eye);
  const int together = int(std::clamp<int64_t>(kCovarianceFloats / (r * r), 1, shape_.heads));
  for (int begin = 0; begin < shape_.heads; begin += together) {
    const HeadRange heads{begin, std::min(begin + together, shape_.heads)};
    const int64_t count = heads.count();
    const Tensor covariances = head_covariances(heads);
    const View blocks = covariances->col_blocks(count);
    const std::vector<double> traces = block_traces(*compute_, blocks, identity);
    for (int64_t head = 0; head < count; ++head) {
      compute_->add(tokens, float(kCovarianceMix * std::max(traces[size_t(head)], 1e-30) / token_trace), covariances->col_range(head * r, (head + 1) * r));
    }
    for (Rank& rank : ranks) {
      const int64_t width = rank.basis->rows;
      const Tensor cross = compute_->allocate(width, count * r);  // P Σ
      compute_->multiply(rank.basis, covariances, cross);
      const View cross_blocks = cross->col_blocks(count);
      const Tensor own = compute_->allocate(count * width, width);  // P Σ Pᵀ
      compute_->multiply(cross_blocks, rank.basis->t().repeated(count), own->row_blocks(count));
      const Tensor solution = compute_->allocate(count * width, shape_.nope);  // P Σ W_UKᵀ
      compute_->multiply(cross_blocks, of_heads(uk_, shape_.nope, heads).t(), solution->row_blocks(count));
      compute_->solve(own->row_blocks(count), solution->row_blocks(count), kQueryRidge);
      compute_->transpose(solution->row_blocks(count), of_heads(rank.uk, shape_.nope, heads));
    }
  }
}

void LayerFit::fit_values(Ranks& ranks, double ridge) {
  prepare();
  const int64_t heads = shape_.heads;
  int64_t width = 0;
  for (const Rank& rank : ranks) width += rank.basis->rows;
  const Tensor gram = compute_->allocate(heads * width, width), solution = compute_->allocate(heads * width, shape_.v);
  for (int i = 0; i < train_; ++i) {
    const Stretch& stretch = stretches_[size_t(i)];
    const Tensor outputs = compute_->allocate(width, heads * stretch.columns());  // of all ranks, one below the other
    std::vector<Attended> attended;
    const Tensor excess = value_difference(stretch, ranks, &attended, nullptr);
    int64_t at = 0;
    for (const Attended& rank : attended) {
      compute_->copy(rank.outputs, outputs->row_range(at, at + rank.outputs->rows));
      at += rank.outputs->rows;
    }
    const View blocks = outputs->col_blocks(heads);
    compute_->multiply(blocks, blocks.t(), gram->row_blocks(heads), Update::add);
    compute_->multiply(blocks, excess->row_blocks(heads).t(), solution->row_blocks(heads), Update::add, -1);
  }
  compute_->solve(gram->row_blocks(heads), solution->row_blocks(heads), ridge);
  int64_t at = 0;
  for (Rank& rank : ranks) {
    const int64_t own = rank.basis->rows;
    const Tensor correction = compute_->allocate(heads * shape_.v, own);
    View rows = solution->row_blocks(heads);
    rows.data += at * rows.ld;
    rows.rows = own;
    compute_->transpose(rows, correction->row_blocks(heads));
    compute_->add(correction, 1, rank.uv);
    at += own;
  }
}

}  // namespace tpla::reparam
