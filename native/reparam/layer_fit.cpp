#include "reparam/layer_fit.h"

#include <algorithm>

#include "core/error.h"

namespace tpla::reparam {

// Columns of a head's queries are filled up to whole vectors, 64 bytes.
static constexpr int64_t kColumnStep = 16;

LayerFit::LayerFit(std::shared_ptr<Compute> compute, const LayerShape& shape, const LayerWeights& weights, const Sample& sample, int train)
    : compute_(std::move(compute)), shape_(shape), uk_(compute_->upload(weights.uk)), uv_(compute_->upload(weights.uv)), wo_(compute_->upload(weights.wo)), train_(train) {
  const int64_t head_dim = shape_.nope + shape_.rope, heads = shape_.heads;
  size_t query = 0;
  for (size_t i = 0; i + 1 < sample.bounds.size(); ++i) {
    const int32_t begin = sample.bounds[i], end = sample.bounds[i + 1];
    const size_t first = query;
    std::vector<float> last_token;
    for (; query < sample.query_tokens.size() && sample.query_tokens[query] < end; ++query) last_token.push_back(float(sample.query_tokens[query] - begin));
    const int64_t count = int64_t(last_token.size());
    if (count == 0) continue;
    const int64_t columns = (count + kColumnStep - 1) / kColumnStep * kColumnStep;
    last_token.resize(size_t(columns), -1.0f);

    Sequence sequence;
    sequence.count = count;
    sequence.latents = compute_->allocate(end - begin, shape_.latent);
    compute_->upload(sample.latents + int64_t(begin) * shape_.latent, shape_.latent, sequence.latents);
    sequence.rope_keys = compute_->allocate(end - begin, shape_.rope);
    compute_->upload(sample.rope_keys + int64_t(begin) * shape_.rope, shape_.rope, sequence.rope_keys);
    sequence.last_token = compute_->allocate(1, columns);
    compute_->upload(last_token.data(), columns, sequence.last_token);
    const Tensor by_query = compute_->allocate(count, heads * head_dim);
    compute_->upload(sample.queries + int64_t(first) * heads * head_dim, heads * head_dim, by_query);
    sequence.queries = compute_->allocate(head_dim, heads * columns);
    View by_column = sequence.queries.view().col_blocks(heads);
    by_column.cols = count;
    compute_->transpose(by_query.view().col_blocks(heads), by_column);
    sequences_.push_back(std::move(sequence));
  }
  if (sequences_.empty()) throw Error("REQUEST_INVALID", "sample.queryTokens: expected at least one query");
  train_ = std::min(train_, sequence_count());
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

View LayerFit::nope_queries(const Sequence& sequence, HeadRange heads) const {
  return sequence.queries->row_range(0, shape_.nope).col_range(heads.begin * sequence.columns(), heads.end * sequence.columns()).col_blocks(heads.count());
}

LayerFit::Attended LayerFit::attend(const Sequence& sequence, const View& cached, const View& uk, HeadRange heads) {
  const int64_t columns = heads.count() * sequence.columns(), width = cached.cols;
  const View rope_queries = sequence.queries->row_range(shape_.nope, shape_.nope + shape_.rope).col_range(heads.begin * sequence.columns(), heads.end * sequence.columns());
  Attended out{compute_->allocate(width, columns), compute_->allocate(cached.rows, columns), compute_->allocate(width, columns)};
  compute_->multiply(of_heads(uk, shape_.nope, heads).t(), nope_queries(sequence, heads), out.keys_query->col_blocks(heads.count()));
  compute_->multiply(cached, out.keys_query, out.probabilities);
  compute_->multiply(sequence.rope_keys, rope_queries, out.probabilities, Update::add);
  compute_->softmax(out.probabilities, sequence.last_token, shape_.softmax_scale);
  compute_->multiply(cached.t(), out.probabilities, out.outputs);
  return out;
}

void LayerFit::add_values(const View& uv, const View& outputs, const View& values, Update update) {
  compute_->multiply(uv.row_blocks(shape_.heads), outputs.col_blocks(shape_.heads), values.row_blocks(shape_.heads), update);
}

void LayerFit::prepare() {
  for (Sequence& sequence : sequences_) {
    if (sequence.values->data) continue;
    const Attended attended = attend(sequence, sequence.latents, uk_, all_heads());
    Tensor values = compute_->allocate(int64_t(shape_.heads) * shape_.v, sequence.columns());
    add_values(uv_, attended.outputs, values, Update::set);
    const Tensor output = compute_->allocate(shape_.hidden, sequence.columns());
    compute_->multiply(wo_, values, output);
    sequence.output_squares = compute_->dots(output, output)[0];
    sequence.values = std::move(values);
  }
}

Tensor LayerFit::cached_columns(const Sequence& sequence, const Rank& rank) {
  Tensor cached = compute_->allocate(sequence.tokens(), rank.basis->rows);
  compute_->multiply(sequence.latents, rank.basis->t(), cached);
  return cached;
}

Tensor LayerFit::value_difference(const Sequence& sequence, const Ranks& ranks, std::vector<Attended>* kept, std::vector<Tensor>* cached) {
  Tensor values = compute_->allocate(sequence.values->rows, sequence.values->cols);
  compute_->add(sequence.values, -1, values);
  for (const Rank& rank : ranks) {
    Tensor columns = cached_columns(sequence, rank);
    Attended attended = attend(sequence, columns, rank.uk, all_heads());
    add_values(rank.uv, attended.outputs, values, Update::add);
    if (kept) kept->push_back(std::move(attended));
    if (cached) cached->push_back(std::move(columns));
  }
  return values;
}

double LayerFit::error(const Ranks& ranks, int begin, int end) {
  prepare();
  double wrong = 0, total = 0;
  for (int i = begin; i < end; ++i) {
    const Sequence& sequence = sequences_[size_t(i)];
    const Tensor output = compute_->allocate(shape_.hidden, sequence.columns());
    compute_->multiply(wo_, value_difference(sequence, ranks, nullptr, nullptr), output);
    wrong += compute_->dots(output, output)[0];
    total += sequence.output_squares;
  }
  return total > 0 ? wrong / total : 0;
}

}  // namespace tpla::reparam
