// Rows and labels of tasks that may differ in size, for the checks of kernels that take such.
#pragma once

#include <string>
#include <vector>

#include "tests/named_results.h"

namespace kernelmeta {
namespace {

// Rows and labels of tasks that may differ in size.
struct Tasks {
  int64_t D, N;                        // N: of the task that has most
  std::vector<int64_t> S, Q, ways;     // of each task
  bool ragged, bank;                   // if not ragged, all tasks are as the first
  int64_t most[2] = {-1, -1};          // support and query rows that a task may have; -1: offsets are right
  std::vector<int64_t> wrong_offsets;  // what the kernels are told of the support rows, if it is wrong
  std::vector<int64_t> support_offsets{0}, query_offsets{0}, labels, support_index, query_index;
  Vec support, query;

  Tasks(int64_t D, int64_t N, const std::vector<int64_t>& S, const std::vector<int64_t>& Q,
        const std::vector<int64_t>& ways, bool bank, double along = 0)
      : D(D), N(N), S(S), Q(Q), ways(ways), ragged(false), bank(bank) {
    for (size_t t = 0; t < S.size(); ++t) {
      ragged = ragged || S[t] != S[0] || Q[t] != Q[0] || ways[t] != N;
      support_offsets.push_back(support_offsets.back() + S[t]);
      query_offsets.push_back(query_offsets.back() + Q[t]);
      const auto rest = draw_numbers(S[t], ways[t]);
      for (int64_t i = 0; i < S[t]; ++i) labels.push_back(i < ways[t] ? ways[t] - 1 - i : rest[size_t(i)]);
    }
    support = draw_floats(rows(false) * D, along - 1, along + 1);
    query = draw_floats(rows(true) * D, along - 1, along + 1);
    support_index = draw_numbers(rows(false), rows(false));
    query_index = draw_numbers(rows(true), rows(true));
  }

  template <class F>
  void round_features() {
    for (Vec* v : {&support, &query}) *v = rounded<F>(*v);
  }
  int64_t T() const { return int64_t(S.size()); }
  int64_t rows(bool of_query) const { return (of_query ? query_offsets : support_offsets).back(); }

  template <class F>
  TaskRows of(bool of_query, const std::vector<F>& data) const {
    const auto& counts = of_query ? Q : S;
    const bool even = !ragged && !bank;
    return {{data.data(), kStorage<F>, ragged ? 0 : counts[0], even ? counts[0] * D : 0, D,
             bank ? (of_query ? query_index : support_index).data() : nullptr, bank ? rows(of_query) : 0},
            ragged ? (of_query ? query_offsets : support_offsets).data() : nullptr,
            even,
            rows(of_query),
            most[of_query]};
  }
  // What the kernels are told, where it is not what it should be.
  void mislead(TaskRows& of_support) const {
    if (!wrong_offsets.empty()) of_support.offsets = wrong_offsets.data();
  }
  TaskClasses classes() const { return {{labels.data(), nullptr, nullptr}, ragged ? ways.data() : nullptr}; }
  std::string text() const {
    std::string text = "D=" + std::to_string(D);
    for (size_t t = 0; t < S.size(); ++t) {
      text += " (S=" + std::to_string(S[t]) + " Q=" + std::to_string(Q[t]) + " N=" + std::to_string(ways[t]) +
              ")";
    }
    return text;
  }
};

}  // namespace
}  // namespace kernelmeta
