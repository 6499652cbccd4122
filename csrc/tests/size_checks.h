// Kernels that are told how large tasks are at most, and look at the offsets themselves.
#pragma once

#include <algorithm>

#include "tests/learner_checks.h"

namespace kernelmeta {
namespace {

bool all_nan(const Vec& values) {
  return std::all_of(values.begin(), values.end(), [](double x) { return std::isnan(x); });
}

void expect(const std::string& what, bool holds) {
  if (holds) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

// Of the results, those that a call gives for each of its rows or for all of its tasks.
template <class E>
void check_sizes_of(const std::string& name, E episode, const KernelTable& kernels) {
  Tasks& tasks = episode.tasks;
  const std::string text = name + " " + episode.text() + ": ";
  const Named want = episode.template run<float>(kernels);
  const auto largest = std::max_element(tasks.S.begin(), tasks.S.end());
  const int64_t S = *largest, Q = *std::max_element(tasks.Q.begin(), tasks.Q.end());

  tasks.most[0] = S + 2;
  tasks.most[1] = Q;
  const Named bounded = episode.template run<float>(kernels);
  for (size_t i = 0; i < want.size(); ++i) {
    expect(text + want[i].first + " with sizes", bounded[i].second == want[i].second);
  }

  // One task is too large: it is NaN, and so are sums over tasks; the others are what they were.
  tasks.most[0] = S - 1;
  const auto t = size_t(largest - tasks.S.begin());
  const Named without = episode.template run<float>(kernels);
  for (size_t i = 0; i < want.size(); ++i) {
    const Vec &got = without[i].second, &right = want[i].second;
    const std::string what = text + want[i].first + " with a task too large";
    if (want[i].first != "logits") continue;
    const auto first = int64_t(tasks.query_offsets[t] * tasks.N),
               end = int64_t(tasks.query_offsets[t + 1] * tasks.N);
    expect(what, all_nan(Vec(got.begin() + first, got.begin() + end)));
    expect(what + ": the others", std::equal(got.begin(), got.begin() + first, right.begin()) &&
                                      std::equal(got.begin() + end, got.end(), right.begin() + end));
  }
  expect(text + "sums with a task too large", all_nan(without.back().second));

  // Offsets that are none: everything is NaN, and nothing is read that is not there.
  tasks.most[0] = S;
  const std::vector<int64_t> right = tasks.support_offsets;
  const auto told = [&](const char* what, size_t at, int64_t offset) {
    tasks.wrong_offsets = right;
    tasks.wrong_offsets[at] = offset;
    for (const auto& [result, values] : episode.template run<float>(kernels)) {
      expect(text + result + " with offsets that " + what, all_nan(values));
    }
  };
  told("go backwards", 2, right[1] - 1);
  told("do not begin at 0", 0, -(int64_t(1) << 40));
  told("are beyond the rows", 1, int64_t(1) << 40);
  told("end too early", right.size() - 1, right.back() - 1);
}

int check_sizes(const std::string& name, const KernelTable& kernels) {
  const auto of_others = generator;
  generator.seed(3);
  for (const ProgramCase& c : program_cases()) {
    const ProgramEpisode episode(c);
    if (episode.tasks.ragged) check_sizes_of(name, episode, kernels);
  }
  for (const RidgeCase& c : ridge_cases()) {
    const RidgeEpisode episode(c);
    if (episode.tasks.ragged) check_sizes_of(name, episode, kernels);
  }
  generator = of_others;
  std::printf(failures ? "%d failed\n" : "sizes: all passed\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace kernelmeta
