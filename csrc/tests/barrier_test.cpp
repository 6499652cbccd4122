// Every barrier of the CUDA kernels' bodies is needed: each is removed in turn, and ThreadSanitizer must
// report a race (or the results must differ). Built with ThreadSanitizer. With all barriers in place there is
// no report.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <map>

#include "tests/engine_checks.h"
#include "tests/team_kernels.h"

namespace {
std::atomic<int64_t> reports{0};
}

extern "C" void __tsan_on_report(void*) { ++reports; }
extern "C" const char* __tsan_default_options() {
  return "suppress_equal_stacks=0 suppress_equal_addresses=0 symbolize=0 history_size=7";
}

namespace {

// Whether `call` gives true, or crashes or hangs, in a process of its own. Its reports are counted, not read.
template <class Call>
bool fails_in_child(Call call) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    dup2(open("/dev/null", O_WRONLY), 2);
    _exit(call() ? 1 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status != 0;
}

// Barriers whose removal nothing shows, by word and by how many of that word nothing shows; with the reason.
struct Unneeded {
  const char* word;
  int64_t count;
};

// run(): all results in one vector.
template <class Run>
int check_barriers(const char* what, Run run, const std::vector<Unneeded>& explained) {
  team_options = {};
  const std::vector<float> want = run();
  const std::vector<const char*> words = team_options.words;
  if (reports) {
    std::printf("FAILED %s: %ld races with all barriers in place\n", what, long(reports));
    return 1;
  }
  std::map<std::string, int64_t> silent;
  for (size_t k = 0; k < words.size(); ++k) {
    team_options = {};
    team_options.removed = int64_t(k);
    const bool seen = fails_in_child([&] {
      const std::vector<float> got = run();
      return reports || std::memcmp(got.data(), want.data(), want.size() * sizeof(float)) != 0;
    });
    if (!seen) {
      std::printf("%s: nothing shows that barrier %zu of %zu, after '%s', is missing\n", what, k,
                  words.size(), words[k]);
      ++silent[words[k]];
    }
  }
  int64_t unexplained = 0, total = 0;
  for (const auto& [word, count] : silent) {
    int64_t known = 0;
    for (const Unneeded& u : explained) known += word == u.word ? u.count : 0;
    unexplained += std::max<int64_t>(0, count - known);
    total += count;
  }
  std::printf("%s: %zu barriers, %zu of them seen when missing\n", what, words.size(),
              words.size() - size_t(total));
  return unexplained != 0;
}

template <class C>
void append(std::vector<float>& all, const std::vector<C>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

int check_problem(const std::string& name, const Sizes& s, bool from_support, bool running) {
  const Episode e(s, from_support, running, 0.02);
  const Vec weights_z = draw(s.T * s.Q * s.N), weights_theta = draw(s.T * s.N * s.D);
  const auto all = [&] {
    const Results<float> r = run<float>(kTeamKernels<float>, e, true, weights_z, weights_theta);
    std::vector<float> values;
    for (const auto* part : {&r.logits, &r.grad_query, &r.grad_start, &r.weight, &r.scale, &r.bias}) {
      append(values, *part);
    }
    for (const auto& part : r.mlp) append(values, part);
    return values;
  };
  return check_barriers(name.c_str(), all, {});
}

}  // namespace

int main() {
  int status = 0;
  //                                                     T  S  Q   N  D   H  K
  status |= check_problem("class means", {2, 5, 9, 3, 40, 6, 1}, true, false);
  status |= check_problem("given theta0, running statistics", {1, 3, 9, 3, 11, 6, 1}, false, true);
  status |= check_problem("no Gram matrix", {1, 3, 17, 2, 11, 5, 1}, true, false);
  return status;
}
