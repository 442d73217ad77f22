#include "reparam/layer_fit.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "core/error.h"

namespace tpla::reparam {

LayerFit::LayerFit(const LayerShape& shape, Matrix uk, Matrix uv, Matrix wo, std::vector<Sequence> sequences, int train, int threads)
    : shape_(shape),
      uk_(std::move(uk)),
      uv_(std::move(uv)),
      wo_(std::move(wo)),
      sequences_(std::move(sequences)),
      exact_(sequences_.size()),
      train_(train),
      kernels_(cpu::select_kernels(nullptr)),
      team_(threads) {
  for (size_t i = 0; i < sequences_.size(); ++i) exact(sequences_[i], exact_[i]);
}

// ---------------------------------------------------------------- attention

// Columns are queries throughout: scores are [tokens, queries], so that the softmax runs down columns.
void LayerFit::attend(const Sequence& sequence, int head, const Matrix& cached, const Left& uk, Attended& out) const {
  const Matrix& queries = sequence.queries[size_t(head)];
  const int64_t tokens = cached.rows(), count = queries.cols(), width = cached.cols();
  out.keys_query = Matrix(width, count);
  Left uk_transposed = uk.transposed();
  multiply(kernels_, uk_transposed, queries, out.keys_query);  // the inner dimension, nope, covers only the first rows of `queries`
  out.probabilities = Matrix(tokens, count);
  multiply(kernels_, cached, out.keys_query, out.probabilities);
  multiply_rows(kernels_, sequence.rope_keys, queries, shape_.nope, out.probabilities, 0, true);

  Matrix& p = out.probabilities;
  for (int64_t q = 0; q < count; ++q) {
    for (int64_t t = sequence.query_token[size_t(q)] + 1; t < tokens; ++t) p.row(t)[q] = -std::numeric_limits<float>::infinity();
  }
  std::vector<float> max(size_t(p.ld()), -std::numeric_limits<float>::infinity()), sum(size_t(p.ld()), 0.0f), correction(size_t(p.ld()));
  kernels_.softmax_columns(p.row(0), tokens, p.ld(), p.ld(), shape_.softmax_scale, max.data(), sum.data(), correction.data());
  for (float& s : sum) s = 1 / s;
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = p.row(t);
    for (int64_t q = 0; q < count; ++q) row[q] *= sum[size_t(q)];
  }
  out.outputs = Matrix(width, count);
  multiply(kernels_, Left(cached).transposed(), p, out.outputs);
}

void LayerFit::exact(const Sequence& sequence, Exact& out) {
  const int64_t count = int64_t(sequence.query_token.size());
  out.values = Matrix(int64_t(shape_.heads) * shape_.v, count);
  team_.run(shape_.heads, [&](int64_t head, int) {
    Attended attended;
    attend(sequence, int(head), sequence.latents, head_rows(uk_, int(head), shape_.nope), attended);
    multiply(kernels_, head_rows(uv_, int(head), shape_.v), attended.outputs, out.values, head * shape_.v);
  });
  out.output = Matrix(shape_.hidden, count);
  team_.run_ranges(shape_.hidden, 64, [&](int64_t begin, int64_t end, int) { multiply(kernels_, Left(wo_, begin, end), out.values, out.output, begin); });
}

std::vector<Matrix> LayerFit::cached_columns(const Sequence& sequence, const Design& design) {
  std::vector<Matrix> cached;
  for (const RankDesign& rank : design) {
    cached.emplace_back(sequence.latents.rows(), rank.basis.rows());
    Matrix& out = cached.back();
    team_.run_ranges(out.rows(), 64, [&](int64_t begin, int64_t end, int) { multiply_transposed(kernels_, Left(sequence.latents, begin, end), rank.basis, out, begin); });
  }
  return cached;
}

std::vector<std::vector<LayerFit::Attended>> LayerFit::attend_all(const Sequence& sequence, const Design& design, const std::vector<Matrix>& cached) {
  std::vector<std::vector<Attended>> attended(design.size(), std::vector<Attended>(size_t(shape_.heads)));
  team_.run(int64_t(design.size()) * shape_.heads, [&](int64_t index, int) {
    const size_t rank = size_t(index / shape_.heads);
    const int head = int(index % shape_.heads);
    attend(sequence, head, cached[rank], head_rows(design[rank].uk, head, shape_.nope), attended[rank][size_t(head)]);
  });
  return attended;
}

void LayerFit::values_of(const Design& design, const std::vector<std::vector<Attended>>& attended, Matrix& values) {
  team_.run(shape_.heads, [&](int64_t head, int) {
    for (size_t rank = 0; rank < design.size(); ++rank) {
      multiply(kernels_, head_rows(design[rank].uv, int(head), shape_.v), attended[rank][size_t(head)].outputs, values, head * shape_.v, rank > 0);
    }
  });
}

double LayerFit::error(const Design& design, int begin, int end) {
  double wrong = 0, total = 0;
  for (int i = begin; i < end; ++i) {
    const Sequence& sequence = sequences_[size_t(i)];
    const Exact& target = exact_[size_t(i)];
    const auto attended = attend_all(sequence, design, cached_columns(sequence, design));
    Matrix values(target.values.rows(), target.values.cols());
    values_of(design, attended, values);
    Matrix output(shape_.hidden, target.values.cols());
    team_.run_ranges(shape_.hidden, 64, [&](int64_t from, int64_t to, int) { multiply(kernels_, Left(wo_, from, to), values, output, from); });
    for (int64_t row = 0; row < output.rows(); ++row) {
      for (int64_t q = 0; q < output.cols(); ++q) {
        const double exact_value = target.output.row(row)[q];
        const double difference = output.row(row)[q] - exact_value;
        wrong += difference * difference;
        total += exact_value * exact_value;
      }
    }
  }
  return total > 0 ? wrong / total : 0;
}

// ---------------------------------------------------------------- statistics

// out += leftᵀ · diag(weight) · left, for [n, r] and [n].
static void add_weighted_gram(const cpu::Kernels& kernels, const Matrix& left, const float* weight, Matrix& out) {
  Matrix weighted(left.rows(), left.cols());
  for (int64_t i = 0; i < left.rows(); ++i) {
    for (int64_t j = 0; j < left.cols(); ++j) weighted.row(i)[j] = weight[i] * left.row(i)[j];
  }
  multiply(kernels, Left(left).transposed(), weighted, out, 0, true);
}

// out -= left · leftᵀ
static void subtract_gram(const cpu::Kernels& kernels, const Matrix& left, Matrix& out) {
  Matrix product(left.rows(), left.rows());
  multiply_transposed(kernels, left, left, product);
  for (int64_t i = 0; i < out.rows(); ++i) {
    for (int64_t j = 0; j < out.cols(); ++j) out.row(i)[j] -= product.row(i)[j];
  }
}

static void add_scaled(const Matrix& from, float factor, Matrix& out) {
  for (int64_t i = 0; i < out.rows(); ++i) {
    for (int64_t j = 0; j < out.cols(); ++j) out.row(i)[j] += factor * from.row(i)[j];
  }
}

static double trace(const Matrix& m) {
  double sum = 0;
  for (int64_t i = 0; i < m.rows(); ++i) sum += m.row(i)[i];
  return sum;
}

void LayerFit::head_covariance(int head, Matrix& out) const {
  out = Matrix(shape_.latent, shape_.latent);
  for (int i = 0; i < train_; ++i) {
    const Sequence& sequence = sequences_[size_t(i)];
    Attended attended;
    attend(sequence, head, sequence.latents, head_rows(uk_, head, shape_.nope), attended);
    std::vector<float> weight(size_t(sequence.latents.rows()));
    for (int64_t t = 0; t < sequence.latents.rows(); ++t) {
      const float* p = attended.probabilities.row(t);
      for (int64_t q = 0; q < attended.probabilities.cols(); ++q) weight[size_t(t)] += p[q];
    }
    add_weighted_gram(kernels_, sequence.latents, weight.data(), out);
    subtract_gram(kernels_, attended.outputs, out);
  }
}

Sensitivity LayerFit::sensitivity() {
  const int64_t r = shape_.latent;
  Sensitivity sums{Matrix(r, r), Matrix(r, r), Matrix(r, r), Matrix(r, r), Matrix(r, r)};

  // Centred over all training tokens.
  int64_t tokens = 0, queries = 0;
  std::vector<double> mean(size_t(r), 0.0);
  for (int i = 0; i < train_; ++i) {
    const Matrix& latents = sequences_[size_t(i)].latents;
    tokens += latents.rows();
    queries += int64_t(sequences_[size_t(i)].query_token.size());
    for (int64_t t = 0; t < latents.rows(); ++t) {
      for (int64_t j = 0; j < r; ++j) mean[size_t(j)] += latents.row(t)[j];
    }
    multiply(kernels_, Left(latents).transposed(), latents, sums.token_covariance, 0, true);
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      float& entry = sums.token_covariance.row(i)[j];
      entry = float(entry / double(tokens) - mean[size_t(i)] / double(tokens) * (mean[size_t(j)] / double(tokens)));
    }
  }

  // Heads are added in order, a team's worth at a time, so that the sums do not depend on the number of threads.
  struct HeadSums {
    Matrix covariance, outputs, value, key;
    double response = 0;
  };
  const auto of_head = [&](int64_t index) {
    const int head = int(index);
    Matrix covariance(r, r), outputs(r, r), query_moment(shape_.nope, shape_.nope);
    for (int i = 0; i < train_; ++i) {
      const Sequence& sequence = sequences_[size_t(i)];
      Attended attended;
      attend(sequence, head, sequence.latents, head_rows(uk_, head, shape_.nope), attended);
      std::vector<float> weight(size_t(sequence.latents.rows()));
      for (int64_t t = 0; t < sequence.latents.rows(); ++t) {
        for (int64_t q = 0; q < attended.probabilities.cols(); ++q) weight[size_t(t)] += attended.probabilities.row(t)[q];
      }
      add_weighted_gram(kernels_, sequence.latents, weight.data(), covariance);
      Matrix gram(r, r);
      multiply_transposed(kernels_, attended.outputs, attended.outputs, gram);
      add_scaled(gram, 1, outputs);
      add_scaled(gram, -1, covariance);
      Matrix nope_queries(shape_.nope, sequence.queries[index].cols());
      for (int64_t d = 0; d < shape_.nope; ++d) std::copy_n(sequence.queries[size_t(index)].row(d), nope_queries.cols(), nope_queries.row(d));
      Matrix moment(shape_.nope, shape_.nope);
      multiply_transposed(kernels_, nope_queries, nope_queries, moment);
      add_scaled(moment, 1 / float(queries), query_moment);
    }
    // Value: Gram of W_O,h W_UV,h.
    Matrix projected(shape_.hidden, r), wo_head(shape_.hidden, shape_.v), uv_head(shape_.v, r);
    for (int64_t i = 0; i < shape_.hidden; ++i) std::copy_n(wo_.row(i) + index * shape_.v, shape_.v, wo_head.row(i));
    for (int64_t i = 0; i < shape_.v; ++i) std::copy_n(uv_.row(index * shape_.v + i), r, uv_head.row(i));
    multiply(kernels_, wo_head, uv_head, projected);
    Matrix value(r, r);
    multiply(kernels_, Left(projected).transposed(), projected, value);
    // Key: W_UKᵀ E[q qᵀ] W_UK, weighted by what one unit of logit variance does to the output: s² tr(V Σ) / tr-normalised Σ.
    Matrix uk_head(shape_.nope, r), half(shape_.nope, r), key(r, r);
    for (int64_t i = 0; i < shape_.nope; ++i) std::copy_n(uk_.row(index * shape_.nope + i), r, uk_head.row(i));
    multiply(kernels_, query_moment, uk_head, half);
    multiply(kernels_, Left(uk_head).transposed(), half, key);
    double response = 0;
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) response += double(value.row(i)[j]) * covariance.row(i)[j];
    }
    response *= double(shape_.softmax_scale) * shape_.softmax_scale / double(queries);

    return HeadSums{std::move(covariance), std::move(outputs), std::move(value), std::move(key), response};
  };
  const float per_query = 1 / (float(queries) * float(shape_.heads));
  for (int64_t begin = 0; begin < shape_.heads; begin += team_.size()) {
    std::vector<HeadSums> part(size_t(std::min<int64_t>(team_.size(), shape_.heads - begin)));
    team_.run(int64_t(part.size()), [&](int64_t i, int) { part[size_t(i)] = of_head(begin + i); });
    for (const HeadSums& head : part) {
      add_scaled(head.covariance, per_query, sums.attention_covariance);
      add_scaled(head.outputs, per_query, sums.output_moment);
      add_scaled(head.value, 1, sums.value);
      add_scaled(head.key, float(head.response), sums.key);
    }
  }
  return sums;
}

// ---------------------------------------------------------------- closed forms

void LayerFit::fit_scales(Design& design, bool per_head) {
  std::vector<double> cross(design.size() * size_t(shape_.heads)), own(cross.size());
  for (int i = 0; i < train_; ++i) {
    const Sequence& sequence = sequences_[size_t(i)];
    const auto cached = cached_columns(sequence, design);
    team_.run(shape_.heads, [&](int64_t head, int) {
      Attended full;
      attend(sequence, int(head), sequence.latents, head_rows(uk_, int(head), shape_.nope), full);
      const int64_t tokens = sequence.latents.rows(), count = full.probabilities.cols();
      Matrix exact_logits(tokens, count);
      multiply(kernels_, sequence.latents, full.keys_query, exact_logits);
      for (size_t rank = 0; rank < design.size(); ++rank) {
        Matrix query(design[rank].basis.rows(), count), logits(tokens, count);
        multiply(kernels_, head_rows(design[rank].uk, int(head), shape_.nope).transposed(), sequence.queries[size_t(head)], query);
        multiply(kernels_, cached[rank], query, logits);
        for (int64_t q = 0; q < count; ++q) {
          double mean_exact = 0, mean_own = 0, both = 0, square = 0;
          for (int64_t t = 0; t < tokens; ++t) {
            const double p = full.probabilities.row(t)[q], x = exact_logits.row(t)[q], y = logits.row(t)[q];
            mean_exact += p * x;
            mean_own += p * y;
            both += p * x * y;
            square += p * y * y;
          }
          cross[rank * size_t(shape_.heads) + size_t(head)] += both - mean_exact * mean_own;
          own[rank * size_t(shape_.heads) + size_t(head)] += square - mean_own * mean_own;
        }
      }
    });
  }
  for (size_t rank = 0; rank < design.size(); ++rank) {
    double all_cross = 0, all_own = 0;
    for (int head = 0; head < shape_.heads; ++head) {
      all_cross += cross[rank * size_t(shape_.heads) + size_t(head)];
      all_own += own[rank * size_t(shape_.heads) + size_t(head)];
    }
    for (int head = 0; head < shape_.heads; ++head) {
      const double c = per_head ? cross[rank * size_t(shape_.heads) + size_t(head)] : all_cross;
      const double o = per_head ? own[rank * size_t(shape_.heads) + size_t(head)] : all_own;
      const float factor = o > 0 ? float(c / o) : 1.0f;
      for (int64_t i = int64_t(head) * shape_.nope; i < int64_t(head + 1) * shape_.nope; ++i) {
        for (int64_t j = 0; j < design[rank].uk.cols(); ++j) design[rank].uk.row(i)[j] *= factor;
      }
    }
  }
}

// How much of the token covariance is mixed into a head's own, whose sharp attention leaves directions unseen.
static constexpr double kCovarianceMix = 1.0;

void LayerFit::fit_queries(Design& design) {
  const int64_t r = shape_.latent;
  Matrix tokens(r, r);
  Matrix mean(r, 1);
  int64_t count = 0;
  for (int i = 0; i < train_; ++i) {
    const Matrix& latents = sequences_[size_t(i)].latents;
    multiply(kernels_, Left(latents).transposed(), latents, tokens, 0, true);
    for (int64_t t = 0; t < latents.rows(); ++t) {
      for (int64_t j = 0; j < r; ++j) mean.row(j)[0] += latents.row(t)[j];
    }
    count += latents.rows();
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) tokens.row(i)[j] -= mean.row(i)[0] * mean.row(j)[0] / float(count);
  }
  const double token_trace = trace(tokens);
  team_.run(shape_.heads, [&](int64_t head, int) {
    Matrix covariance;
    head_covariance(int(head), covariance);
    add_scaled(tokens, float(kCovarianceMix * std::max(trace(covariance), 1e-30) / token_trace), covariance);
    for (RankDesign& rank : design) {
      const int64_t width = rank.basis.rows();
      Matrix cross(width, r);  // P Σ
      multiply(kernels_, rank.basis, covariance, cross);
      Matrix own(width, width);  // P Σ Pᵀ
      multiply_transposed(kernels_, cross, rank.basis, own);
      Matrix target(shape_.nope, width);  // W_UK Σ Pᵀ
      multiply_transposed(kernels_, head_rows(uk_, int(head), shape_.nope), cross, target);
      std::vector<double> a(size_t(width * width)), b(size_t(width * shape_.nope));
      for (int64_t i = 0; i < width; ++i) {
        for (int64_t j = 0; j < width; ++j) a[size_t(i * width + j)] = 0.5 * (double(own.row(i)[j]) + own.row(j)[i]);
        for (int64_t d = 0; d < shape_.nope; ++d) b[size_t(i * shape_.nope + d)] = target.row(d)[i];
      }
      solve_symmetric(a, b, width, shape_.nope, 1e-5);
      for (int64_t d = 0; d < shape_.nope; ++d) {
        for (int64_t i = 0; i < width; ++i) rank.uk.row(head * shape_.nope + d)[i] = float(b[size_t(i * shape_.nope + d)]);
      }
    }
  });
}

void LayerFit::fit_values(Design& design, double ridge) {
  int64_t width = 0;
  for (const RankDesign& rank : design) width += rank.basis.rows();
  std::vector<Matrix> gram(size_t(shape_.heads)), cross(size_t(shape_.heads));
  for (int head = 0; head < shape_.heads; ++head) {
    gram[size_t(head)] = Matrix(width, width);
    cross[size_t(head)] = Matrix(width, shape_.v);
  }
  for (int i = 0; i < train_; ++i) {
    const Sequence& sequence = sequences_[size_t(i)];
    const auto attended = attend_all(sequence, design, cached_columns(sequence, design));
    Matrix residual(exact_[size_t(i)].values.rows(), exact_[size_t(i)].values.cols());
    values_of(design, attended, residual);
    team_.run(shape_.heads, [&](int64_t head, int) {
      const int64_t count = residual.cols();
      Matrix outputs(width, count), rest(shape_.v, count);
      int64_t at = 0;
      for (size_t rank = 0; rank < design.size(); ++rank) {
        for (int64_t row = 0; row < design[rank].basis.rows(); ++row) std::copy_n(attended[rank][size_t(head)].outputs.row(row), count, outputs.row(at++));
      }
      for (int64_t d = 0; d < shape_.v; ++d) {
        for (int64_t q = 0; q < count; ++q) rest.row(d)[q] = exact_[size_t(i)].values.row(head * shape_.v + d)[q] - residual.row(head * shape_.v + d)[q];
      }
      multiply_transposed(kernels_, outputs, outputs, gram[size_t(head)], 0, true);
      multiply_transposed(kernels_, outputs, rest, cross[size_t(head)], 0, true);
    });
  }
  team_.run(shape_.heads, [&](int64_t head, int) {
    std::vector<double> a(size_t(width * width)), b(size_t(width * shape_.v));
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t j = 0; j < width; ++j) a[size_t(i * width + j)] = gram[size_t(head)].row(i)[j];
      for (int64_t d = 0; d < shape_.v; ++d) b[size_t(i * shape_.v + d)] = cross[size_t(head)].row(i)[d];
    }
    solve_symmetric(a, b, width, shape_.v, ridge);
    int64_t at = 0;
    for (RankDesign& rank : design) {
      for (int64_t j = 0; j < rank.basis.rows(); ++j, ++at) {
        for (int64_t d = 0; d < shape_.v; ++d) rank.uv.row(head * shape_.v + d)[j] += float(b[size_t(at * shape_.v + d)]);
      }
    }
  });
}

// ---------------------------------------------------------------- descent

// Gradient of ½‖output − exact‖² of one sequence, added to `gradient`.
void LayerFit::add_gradient(int index, const Design& design, Design& gradient, bool basis) {
  const Sequence& sequence = sequences_[size_t(index)];
  const Exact& target = exact_[size_t(index)];
  const auto cached = cached_columns(sequence, design);
  auto attended = attend_all(sequence, design, cached);
  const int64_t count = target.values.cols(), tokens = sequence.latents.rows();
  Matrix values(target.values.rows(), count);
  values_of(design, attended, values);
  add_scaled(target.values, -1, values);
  Matrix output(shape_.hidden, count), value_gradient(values.rows(), count);
  team_.run_ranges(shape_.hidden, 64, [&](int64_t from, int64_t to, int) { multiply(kernels_, Left(wo_, from, to), values, output, from); });
  team_.run_ranges(values.rows(), 64, [&](int64_t from, int64_t to, int) {
    Left columns = Left(wo_).transposed();
    columns.data += from * columns.row_stride;
    multiply(kernels_, columns.first_rows(to - from), output, value_gradient, from);
  });

  // Per rank and head: gradient of the scores [tokens, queries] and of the rank's outputs [width, queries].
  struct HeadGradient {
    Matrix scores, outputs;
  };
  std::vector<HeadGradient> head_gradients(design.size() * size_t(shape_.heads));
  team_.run(int64_t(design.size()) * shape_.heads, [&](int64_t item, int) {
    const size_t rank = size_t(item / shape_.heads);
    const int head = int(item % shape_.heads);
    Attended& at = attended[rank][size_t(head)];
    const int64_t width = design[rank].basis.rows();
    const Left uv = head_rows(design[rank].uv, head, shape_.v);
    Matrix head_gradient(shape_.v, count);
    for (int64_t d = 0; d < shape_.v; ++d) std::copy_n(value_gradient.row(int64_t(head) * shape_.v + d), count, head_gradient.row(d));
    multiply_transposed(kernels_, head_gradient, at.outputs, gradient[rank].uv, int64_t(head) * shape_.v, true);

    Matrix output_gradient(width, count);
    multiply(kernels_, uv.transposed(), head_gradient, output_gradient);
    Matrix scores(tokens, count);  // gradient of the probabilities, then of the scores
    multiply(kernels_, cached[rank], output_gradient, scores);
    std::vector<float> mean(size_t(count), 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* p = at.probabilities.row(t);
      const float* g = scores.row(t);
      for (int64_t q = 0; q < count; ++q) mean[size_t(q)] += p[q] * g[q];
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const float* p = at.probabilities.row(t);
      float* g = scores.row(t);
      for (int64_t q = 0; q < count; ++q) g[q] = shape_.softmax_scale * p[q] * (g[q] - mean[size_t(q)]);
    }
    Matrix query_gradient(width, count);
    multiply(kernels_, Left(cached[rank]).transposed(), scores, query_gradient);
    Matrix nope_queries(shape_.nope, count);
    for (int64_t d = 0; d < shape_.nope; ++d) std::copy_n(sequence.queries[size_t(head)].row(d), count, nope_queries.row(d));
    multiply_transposed(kernels_, nope_queries, query_gradient, gradient[rank].uk, int64_t(head) * shape_.nope, true);
    if (basis) head_gradients[size_t(item)] = {std::move(scores), std::move(output_gradient)};
  });
  if (!basis) return;
  for (size_t rank = 0; rank < design.size(); ++rank) {
    Matrix columns(tokens, design[rank].basis.rows());  // gradient of the cached columns, over heads in order
    team_.run_ranges(tokens, 16, [&](int64_t begin, int64_t end, int) {
      for (int head = 0; head < shape_.heads; ++head) {
        const Attended& at = attended[rank][size_t(head)];
        const HeadGradient& gradients = head_gradients[rank * size_t(shape_.heads) + size_t(head)];
        multiply_transposed(kernels_, Left(gradients.scores, begin, end), at.keys_query, columns, begin, true);
        multiply_transposed(kernels_, Left(at.probabilities, begin, end), gradients.outputs, columns, begin, true);
      }
    });
    const Left transposed = Left(columns).transposed();
    team_.run_ranges(transposed.rows, 16, [&](int64_t begin, int64_t end, int) {
      Left part = transposed;
      part.data += begin * part.row_stride;
      multiply(kernels_, part.first_rows(end - begin), sequence.latents, gradient[rank].basis, begin, true);
    });
  }
}

namespace {

// Adam (Kingma and Ba 2015) on one matrix, with steps relative to the matrix's root mean square.
class Adam {
 public:
  explicit Adam(const Matrix& parameters) : first_(parameters.rows(), parameters.cols()), second_(parameters.rows(), parameters.cols()) {
    double squares = 0;
    for (int64_t i = 0; i < parameters.rows(); ++i) {
      for (int64_t j = 0; j < parameters.cols(); ++j) squares += double(parameters.row(i)[j]) * parameters.row(i)[j];
    }
    scale_ = float(std::sqrt(squares / double(std::max<int64_t>(1, parameters.rows() * parameters.cols()))));
  }

  void step(Matrix& parameters, const Matrix& gradient, int64_t row_begin, int64_t row_end, float rate, int time) {
    const float correct1 = 1 - std::pow(kBeta1, float(time)), correct2 = 1 - std::pow(kBeta2, float(time));
    for (int64_t i = row_begin; i < row_end; ++i) {
      for (int64_t j = 0; j < parameters.cols(); ++j) {
        const float g = gradient.row(i)[j];
        float& m = first_.row(i)[j];
        float& v = second_.row(i)[j];
        m = kBeta1 * m + (1 - kBeta1) * g;
        v = kBeta2 * v + (1 - kBeta2) * g * g;
        parameters.row(i)[j] -= rate * scale_ * (m / correct1) / (std::sqrt(v / correct2) + 1e-20f);
      }
    }
  }

 private:
  static constexpr float kBeta1 = 0.9f, kBeta2 = 0.98f;
  Matrix first_, second_;
  float scale_;
};

}  // namespace

// Queries that one step looks at: as many sequences as have them.
static constexpr int kBatchQueries = 256;

void LayerFit::refine(Design& design, const RefineOptions& options) {
  std::vector<Adam> uk, uv, basis;
  Design gradient;
  for (const RankDesign& rank : design) {
    uk.emplace_back(rank.uk);
    uv.emplace_back(rank.uv);
    basis.emplace_back(rank.basis);
    gradient.push_back({Matrix(rank.basis.rows(), rank.basis.cols()), Matrix(rank.uk.rows(), rank.uk.cols()), Matrix(rank.uv.rows(), rank.uv.cols())});
  }
  std::vector<int> order;
  std::mt19937_64 random(options.seed);
  for (int step = 1; step <= options.steps; ++step) {
    for (RankDesign& rank : gradient) {
      rank.basis.fill_zero();
      rank.uk.fill_zero();
      rank.uv.fill_zero();
    }
    for (int queries = 0, taken = 0; queries < kBatchQueries && taken < train_; ++taken) {
      if (order.empty()) {
        for (int s = 0; s < train_; ++s) order.push_back(s);
        for (size_t s = order.size(); s > 1; --s) std::swap(order[s - 1], order[random() % s]);
      }
      add_gradient(order.back(), design, gradient, options.basis);
      queries += int(sequences_[size_t(order.back())].query_token.size());
      order.pop_back();
    }
    // A shared row is one parameter.
    for (int row = 0; row < options.shared; ++row) {
      for (int64_t j = 0; j < shape_.latent; ++j) {
        float sum = 0;
        for (const RankDesign& rank : gradient) sum += rank.basis.row(row)[j];
        for (RankDesign& rank : gradient) rank.basis.row(row)[j] = sum;
      }
    }
    const float progress = float(step - 1) / float(options.steps);
    const float rate = options.rate * 0.5f * (1 + std::cos(float(M_PI) * progress)) * std::min(1.0f, float(step) / 10);
    for (size_t rank = 0; rank < design.size(); ++rank) {
      uk[rank].step(design[rank].uk, gradient[rank].uk, 0, design[rank].uk.rows(), rate, step);
      uv[rank].step(design[rank].uv, gradient[rank].uv, 0, design[rank].uv.rows(), rate, step);
      if (options.basis) basis[rank].step(design[rank].basis, gradient[rank].basis, 0, design[rank].basis.rows(), rate, step);
    }
  }
}

}  // namespace tpla::reparam
