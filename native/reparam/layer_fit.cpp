#include "reparam/layer_fit.h"

#include <algorithm>
#include <numeric>

#include "core/error.h"

namespace tpla::reparam {

// Columns of a head's queries are filled up to whole vectors, 64 bytes.
static constexpr int64_t kColumnStep = 16;

// Queries of a stretch: enough for products to be efficient, few enough for it to end soon after its first query.
static constexpr size_t kStretchQueries = 128;
// Second moments of a few hundred values are settled by this many queries; regression and descent, with many more unknowns, take all.
static constexpr int64_t kStatisticQueries = 16384;

LayerFit::LayerFit(std::shared_ptr<Compute> compute, const LayerShape& shape, const LayerWeights& weights, const Sample& sample, int train)
    : compute_(std::move(compute)), shape_(shape), uk_(compute_->upload(weights.uk)), uv_(compute_->upload(weights.uv)), wo_(compute_->upload(weights.wo)) {
  size_t query = 0;
  for (size_t i = 0, taken = 0; i + 1 < sample.bounds.size(); ++i) {
    const int32_t begin = sample.bounds[i], end = sample.bounds[i + 1];
    const size_t first = query;
    while (query < sample.query_tokens.size() && sample.query_tokens[query] < end) ++query;
    if (query == first) continue;
    const auto upload = [&](const float* rows, int64_t cols) {
      auto whole = std::make_shared<Tensor>(compute_->allocate(end - begin, cols));
      compute_->upload(rows + int64_t(begin) * cols, cols, *whole);
      return whole;
    };
    const auto latents = upload(sample.latents, shape_.latent), rope_keys = upload(sample.rope_keys, shape_.rope);
    for (size_t from = first; from < query; from += kStretchQueries) {
      const size_t to = std::min(from + kStretchQueries, query);
      Stretch stretch;
      stretch.last = to == query;
      const int64_t tokens = stretch.last ? end - begin : sample.query_tokens[to - 1] + 1 - begin;
      stretch.whole_latents = latents;
      stretch.whole_rope_keys = rope_keys;
      stretch.latents = latents->view().row_range(0, tokens);
      stretch.rope_keys = rope_keys->view().row_range(0, tokens);
      add_queries(sample, begin, from, to, stretch);
      stretches_.push_back(std::move(stretch));
    }
    if (int(++taken) <= train) train_ = int(stretches_.size());
  }
  if (stretches_.empty()) throw Error("REQUEST_INVALID", "sample.queryTokens: expected at least one query");
  int64_t queries = 0;
  for (int i = 0; i < train_; ++i) queries += stretches_[size_t(i)].count;
  // An odd step meets early and late stretches of sequences alike.
  const int step = int((queries + kStatisticQueries - 1) / kStatisticQueries) | 1;
  for (int i = 0; i < train_; i += step) sampled_.push_back(i);
}

// Queries [from, to) of the sample, whose sequence begins at token `begin`.
void LayerFit::add_queries(const Sample& sample, int32_t begin, size_t from, size_t to, Stretch& stretch) {
  const int64_t head_dim = shape_.nope + shape_.rope, heads = shape_.heads;
  stretch.count = int64_t(to - from);
  const int64_t columns = (stretch.count + kColumnStep - 1) / kColumnStep * kColumnStep;
  std::vector<float> last_token(size_t(columns), -1.0f);
  for (size_t query = from; query < to; ++query) last_token[query - from] = float(sample.query_tokens[query] - begin);
  stretch.last_token = compute_->allocate(1, columns);
  compute_->upload(last_token.data(), columns, stretch.last_token);
  const Tensor by_query = compute_->allocate(stretch.count, heads * head_dim);
  compute_->upload(sample.queries + int64_t(from) * heads * head_dim, heads * head_dim, by_query);
  stretch.queries = compute_->allocate(head_dim, heads * columns);
  View by_column = stretch.queries->col_blocks(heads);
  by_column.cols = stretch.count;
  compute_->transpose(by_query->col_blocks(heads), by_column);
}

LayerFit::Ranks LayerFit::upload(const Design& design) {
  Ranks ranks;
  for (const RankDesign& rank : design) ranks.push_back({compute_->upload(rank.basis), compute_->upload(rank.uk), compute_->upload(rank.uv)});
  return ranks;
}

Design LayerFit::download(const Ranks& ranks) {
  Design design;
  for (const Rank& rank : ranks) design.push_back({compute_->download(rank.basis), compute_->download(rank.uk), compute_->download(rank.uv)});
  return design;
}

// ---------------------------------------------------------------- attention

View LayerFit::of_heads(const View& m, int per_head, HeadRange heads) const {
  return m.row_range(int64_t(heads.begin) * per_head, int64_t(heads.end) * per_head).row_blocks(heads.count());
}

View LayerFit::nope_queries(const Stretch& stretch, HeadRange heads) const {
  return stretch.queries->row_range(0, shape_.nope).col_range(heads.begin * stretch.columns(), heads.end * stretch.columns()).col_blocks(heads.count());
}

LayerFit::Attended LayerFit::attend(const Stretch& stretch, const View& cached, const View& uk, HeadRange heads) {
  const int64_t columns = heads.count() * stretch.columns(), width = cached.cols;
  const View rope_queries = stretch.queries->row_range(shape_.nope, shape_.nope + shape_.rope).col_range(heads.begin * stretch.columns(), heads.end * stretch.columns());
  Attended out{compute_->allocate(width, columns), compute_->allocate(cached.rows, columns), compute_->allocate(width, columns)};
  compute_->multiply(of_heads(uk, shape_.nope, heads).t(), nope_queries(stretch, heads), out.keys_query->col_blocks(heads.count()));
  compute_->multiply(cached, out.keys_query, out.probabilities);
  compute_->multiply(stretch.rope_keys, rope_queries, out.probabilities, Update::add);
  compute_->softmax(out.probabilities, stretch.last_token, shape_.softmax_scale);
  compute_->multiply(cached.t(), out.probabilities, out.outputs);
  return out;
}

void LayerFit::add_values(const View& uv, const View& outputs, const View& values, Update update) {
  compute_->multiply(uv.row_blocks(shape_.heads), outputs.col_blocks(shape_.heads), values.row_blocks(shape_.heads), update);
}

void LayerFit::prepare() {
  for (Stretch& stretch : stretches_) {
    if (stretch.values->data) continue;
    const Attended attended = attend(stretch, stretch.latents, uk_, all_heads());
    Tensor values = compute_->allocate(int64_t(shape_.heads) * shape_.v, stretch.columns());
    add_values(uv_, attended.outputs, values, Update::set);
    const Tensor output = compute_->allocate(shape_.hidden, stretch.columns());
    compute_->multiply(wo_, values, output);
    stretch.output_squares = compute_->dots(output, output)[0];
    stretch.values = std::move(values);
  }
}

Tensor LayerFit::cached_columns(const Stretch& stretch, const Rank& rank) {
  Tensor cached = compute_->allocate(stretch.tokens(), rank.basis->rows);
  compute_->multiply(stretch.latents, rank.basis->t(), cached);
  return cached;
}

Tensor LayerFit::value_difference(const Stretch& stretch, const Ranks& ranks, std::vector<Attended>* kept, std::vector<Tensor>* cached) {
  Tensor values = compute_->allocate(stretch.values->rows, stretch.values->cols);
  compute_->add(stretch.values, -1, values);
  for (const Rank& rank : ranks) {
    Tensor columns = cached_columns(stretch, rank);
    Attended attended = attend(stretch, columns, rank.uk, all_heads());
    add_values(rank.uv, attended.outputs, values, Update::add);
    if (kept) kept->push_back(std::move(attended));
    if (cached) cached->push_back(std::move(columns));
  }
  return values;
}

double LayerFit::test_error(const Ranks& ranks) {
  std::vector<int> stretches(stretches_.size());
  std::iota(stretches.begin(), stretches.end(), 0);
  if (train_ < int(stretches.size())) stretches.erase(stretches.begin(), stretches.begin() + train_);
  return error(ranks, stretches);
}

double LayerFit::error(const Ranks& ranks, const std::vector<int>& stretches) {
  prepare();
  double wrong = 0, total = 0;
  for (const int i : stretches) {
    const Stretch& stretch = stretches_[size_t(i)];
    const Tensor output = compute_->allocate(shape_.hidden, stretch.columns());
    compute_->multiply(wo_, value_difference(stretch, ranks, nullptr, nullptr), output);
    wrong += compute_->dots(output, output)[0];
    total += stretch.output_squares;
  }
  return total > 0 ? wrong / total : 0;
}

}  // namespace tpla::reparam
