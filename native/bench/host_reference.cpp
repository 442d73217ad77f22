#include "bench/host_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

#include "bench/page_tables.h"
#include "cpu/cpu_features.h"
#include "cpu/thread_team.h"

namespace tpla::bench {

namespace {

struct Row {
  int sequence;
  int token;  // among the sequence's queries
};

// NaN is larger than any error.
void keep_worst(double& worst, double error) {
  if (!(error <= worst) && !std::isnan(worst)) worst = error;
}

int visible_keys(const HostAttention& problem, const Row& row) {
  const int kv_len = problem.kv_lens[size_t(row.sequence)];
  if (!problem.causal) return kv_len;
  return std::clamp(kv_len - problem.q_lens[size_t(row.sequence)] + row.token + 1, 0, kv_len);
}

struct Errors {
  double worst_row = 0, worst_lse = 0, squares = 0, norm = 0;
};

void compare_row(const HostAttention& problem, const HostResult& got, const Row& row, int head, int64_t index, std::vector<double>& logits, Errors& errors) {
  const int limit = visible_keys(problem, row);
  const int position = problem.kv_lens[size_t(row.sequence)] - problem.q_lens[size_t(row.sequence)] + row.token;
  const float* q = problem.q + index * problem.key_dim;
  constexpr double kHidden = -std::numeric_limits<double>::infinity();
  double top = kHidden;
  logits.assign(size_t(limit), kHidden);
  for (int t = 0; t < limit; ++t) {
    if (!problem.rule.sees(row.sequence, position, t)) continue;
    const float* key = problem.key(row.sequence, t, head);
    double sum = 0;
    for (int c = 0; c < problem.key_dim; ++c) sum += double(q[c]) * double(key[c]);
    logits[size_t(t)] = problem.rule.apply(head, position, t, sum * problem.scale);
    top = std::max(top, logits[size_t(t)]);
  }
  std::vector<double> out(size_t(problem.value_dim), 0.0);
  double total = 0;
  for (int t = 0; t < limit; ++t) {
    if (logits[size_t(t)] == kHidden) continue;
    const double weight = std::exp(logits[size_t(t)] - top);
    const float* value = problem.value(row.sequence, t, head);
    total += weight;
    for (int c = 0; c < problem.value_dim; ++c) out[size_t(c)] += weight * double(value[c]);
  }
  double squares = 0, norm = 0;
  for (int c = 0; c < problem.value_dim; ++c) {
    const double want = total > 0 ? out[size_t(c)] / total : 0;
    const double error = double(got.out[size_t(index * problem.value_dim + c)]) - want;
    squares += error * error;
    norm += want * want;
  }
  keep_worst(errors.worst_row, norm > 0 ? std::sqrt(squares / norm) : std::sqrt(squares));
  errors.squares += squares;
  errors.norm += norm;
  if (got.lse.empty()) return;
  const double lse = got.lse[size_t(index)];
  if (total > 0) {
    keep_worst(errors.worst_lse, std::fabs(lse - (top + std::log(total))));
  } else if (lse != -std::numeric_limits<double>::infinity()) {
    keep_worst(errors.worst_lse, std::numeric_limits<double>::quiet_NaN());
  }
}

}  // namespace

Check compare_with_reference(const HostAttention& problem, const HostResult& got) {
  std::vector<Row> rows;
  for (size_t s = 0; s < problem.q_lens.size(); ++s) {
    for (int i = 0; i < problem.q_lens[s]; ++i) rows.push_back({int(s), i});
  }
  Errors all;
  std::mutex mutex;
  cpu::ThreadTeam team(cpu::usable_cores());
  team.run_ranges(int64_t(rows.size()) * problem.heads, 1, [&](int64_t begin, int64_t end, int) {
    Errors errors;
    std::vector<double> logits;
    for (int64_t i = begin; i < end; ++i) compare_row(problem, got, rows[size_t(i / problem.heads)], int(i % problem.heads), i, logits, errors);
    const std::lock_guard<std::mutex> lock(mutex);
    keep_worst(all.worst_row, errors.worst_row);
    keep_worst(all.worst_lse, errors.worst_lse);
    all.squares += errors.squares;
    all.norm += errors.norm;
  });
  Check check;
  check.worst_row = all.worst_row;
  check.worst_lse = all.worst_lse;
  check.overall = all.norm > 0 ? std::sqrt(all.squares / all.norm) : std::sqrt(all.squares);
  check.reference = "float64 on the CPU";
  return check;
}

}  // namespace tpla::bench
