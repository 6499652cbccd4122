// The barriers of the CUDA kernels' bodies are needed, all of them: each that is met is removed in turn, and
// ThreadSanitizer must report a race (or the results must differ), for every place in the source at least
// once: one barrier serves many passes of a loop, and some pass may do without. With all barriers in place
// there is no report. Built with ThreadSanitizer.
#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>

#include "tests/learner_checks.h"
#include "tests/narrow_float.h"
#include "tests/team_kernels.h"

using namespace kernelmeta;

namespace {
std::atomic<int64_t> reports{0};
bool in_child = false;
}  // namespace

extern "C" void __tsan_on_report(void*) {
  ++reports;
  // One says enough, and each costs time. Past the sanitizer's own exit, which would wait for this report.
  if (in_child) syscall(SYS_exit_group, 1);
}
extern "C" const char* __tsan_default_options() {
  return "suppress_equal_stacks=0 suppress_equal_addresses=0 symbolize=0 history_size=7";
}

namespace {

// Whether `call` gives true, or crashes or takes longer than `seconds`, in a process of its own. Its reports
// are counted, not read.
template <class Call>
bool fails_in_child(unsigned seconds, Call call) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(seconds);  // without a barrier some wait for ever
    in_child = true;
    dup2(open("/dev/null", O_WRONLY), 2);
    _exit(call() ? 1 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status != 0;
}

// For every place in the source where barriers stand: how many were tried, up to the first that was seen when
// missing.
struct Place {
  int64_t tried = 0;
  bool seen = false;
};
std::map<std::string, Place> places;

// run(): all results in one vector, of kernels whose tasks so many blocks share out.
template <class Run>
int check_barriers(const char* what, int64_t blocks, Run run) {
  team_options = {.blocks = blocks};
  const auto begun = std::chrono::steady_clock::now();
  const std::vector<float> want = run();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begun;
  const unsigned patience = 20 + unsigned(100 * taken.count());
  const std::vector<SourceLine> barriers = team_options.barriers;
  if (reports) {
    std::printf("FAILED %s: %ld races with all barriers in place\n", what, long(reports));
    return 1;
  }
  for (size_t k = 0; k < barriers.size(); ++k) {
    team_options = {.blocks = blocks, .removed = int64_t(k)};
    Place& place = places[std::string(barriers[k].file) + ":" + std::to_string(barriers[k].line)];
    if (place.seen) continue;
    ++place.tried;
    place.seen = fails_in_child(patience, [&] {
      const std::vector<float> got = run();
      return reports || std::memcmp(got.data(), want.data(), want.size() * sizeof(float)) != 0;
    });
  }
  return 0;
}

template <class C>
void append(std::vector<float>& all, const std::vector<C>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

// F: how the features are stored.
template <class F = float>
int check_problem(const std::string& name, const Sizes& s, bool from_support, bool running,
                  const Wanted& wanted, double lr = 0.02, double along = 0, int64_t blocks = 1) {
  const Episode e(s, from_support, running, lr, along);
  const Vec weights_z = draw(s.T * s.Q * s.N), weights_theta = draw(s.T * s.N * s.D);
  const auto all = [&] {
    const Results<float> r = run<float, F>(kTeamKernels<float, F>, e, true, weights_z, weights_theta, wanted);
    std::vector<float> values;
    for (const auto* part : {&r.logits, &r.grad_query, &r.grad_start, &r.weight, &r.scale, &r.bias}) {
      append(values, *part);
    }
    for (const auto& part : r.mlp) append(values, part);
    return values;
  };
  return check_barriers(name.c_str(), blocks, all);
}

template <class E>
int check_episode(const E& episode, int64_t blocks = 1) {
  return check_barriers(episode.text().c_str(), blocks, [&] {
    std::vector<float> values;
    for (const auto& [name, of_name] : episode.template run<float>(kTeamTable<float>))
      append(values, of_name);
    return values;
  });
}

}  // namespace

bool knows_shares(const ProgramCase& c) {
  return std::any_of(c.phases.begin(), c.phases.end(),
                     [](const Phase& phase) { return phase.shares != Shares::kNone; });
}

int main() {
  int status = 0;
  //                                         T  S  Q   N  D   H  K
  status |= check_problem("class means", {2, 5, 9, 3, 24, 6, 2}, true, false, {});
  status |= check_problem("given theta0, running statistics", {1, 3, 9, 3, 11, 6, 1}, false, true, {});
  status |= check_problem("no Gram matrix", {1, 3, 17, 2, 11, 5, 1}, true, false, {});
  status |= check_problem("parameters alone", {1, 3, 9, 3, 11, 6, 1}, false, true, {false, false, false});
  status |= check_problem("support alone", {1, 4, 9, 3, 11, 6, 1}, true, false, {false, false, true});
  status |= check_problem("no steps", {1, 3, 9, 3, 11, 6, 0}, true, false, {});
  // Done anew in D dimensions.
  status |= check_problem("steps that cancel", {2, 5, 9, 3, 7, 6, 2}, true, false, {}, 0.5, 3);
  status |= check_problem("steps that cancel, theta0", {1, 3, 9, 3, 5, 4, 2}, false, true, {}, 0.5, 3);
  status |= check_problem("one feature", {2, 3, 9, 2, 1, 4, 2}, true, false, {});
  status |= check_problem("one feature, no Gram matrix", {2, 3, 17, 2, 1, 4, 1}, true, false, {});
  // A block without tasks has sums too.
  status |= check_problem("two blocks, one task", {1, 3, 9, 3, 11, 6, 1}, false, false, {}, 0.02, 0, 2);
  status |= check_episode(HeadEpisode(head_cases().front()), 1 + head_cases().front().s.T);
  for (const HeadCase& c : head_cases()) status |= check_episode(HeadEpisode(c));
  // (The barriers of classes' shares, engine/marginals.h, are not looked at here: lane_test looks for races.)
  for (const ProgramCase& c : program_cases()) {
    if (!knows_shares(c)) status |= check_episode(ProgramEpisode(c));
  }
  // Often: which tasks are done anew in D dimensions depends on what was drawn.
  for (int draws = 0; draws < 16; ++draws) {
    for (const ProgramCase& c : program_cases()) {
      if (c.along && !knows_shares(c)) status |= check_episode(ProgramEpisode(c));
    }
  }
  for (const RidgeCase& c : ridge_cases()) status |= check_episode(RidgeEpisode(c));
  for (const DistillationCase& c : distillation_cases()) status |= check_episode(DistillationEpisode(c));
  for (const HeadCase& c : even_head_rows()) status |= check_episode(HeadEpisode(c));
  // Rows of 16 bits: in one tile, whose features all warps share out, and in three.
  status |= check_problem<BrainFloat>("bfloat16", {1, 3, 9, 3, 72, 6, 1}, true, true, {});
  status |= check_problem<BrainFloat>("bfloat16, three tiles", {1, 3, 33, 2, 72, 6, 3}, true, true, {});
  int64_t needless = 0;
  for (const auto& [where, place] : places) {
    if (place.seen) continue;
    ++needless;
    std::printf("%s: nothing shows that its barrier is missing (%ld tried)\n", where.c_str(),
                long(place.tried));
  }
  std::printf("%zu places with barriers, %ld of them needless\n", places.size(), long(needless));
  return needless ? 1 : status;
}
