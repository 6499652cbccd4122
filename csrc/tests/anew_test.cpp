// Tasks done anew in D dimensions, all of them, against the paper's form and, for programs, against the same
// kernels in the space of the rows.
#include "cpu/dispatch.h"
#include "tests/learner_checks.h"

using namespace kernelmeta;

namespace {

// That kernel of this machine's table, which may lose nothing meanwhile.
template <auto kernel>
struct Anew;
template <class C, class... Args, void (*Kernels<C>::*kernel)(Args...)>
struct Anew<kernel> {
  static void run(Args... args) {
    const double before = kMostLost;
    kMostLost = 0;
    (kernel_table().of<C>().*kernel)(args...);
    kMostLost = before;
  }
};

template <class C>
Kernels<C> all_anew() {
  Kernels<C> kernels = kernel_table().of<C>();
  kernels.sib_forward = Anew<&Kernels<C>::sib_forward>::run;
  kernels.sib_backward = Anew<&Kernels<C>::sib_backward>::run;
  kernels.sib_training = Anew<&Kernels<C>::sib_training>::run;
  kernels.program_forward = Anew<&Kernels<C>::program_forward>::run;
  kernels.program_backward = Anew<&Kernels<C>::program_backward>::run;
  return kernels;
}

// Whether a and b, of the same call, differ at all.
bool differ(const Named& a, const Named& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t j = 0; j < a[i].second.size(); ++j) {
      const double x = a[i].second[j], y = b[i].second[j];
      if (x != y && !(std::isnan(x) && std::isnan(y))) return true;
    }
  }
  return false;
}

}  // namespace

int main() {
  const KernelTable anew{"anew", all_anew<float>(), all_anew<double>()};
  int status = check_all("anew:", anew.f64, anew.f32, false);
  generator.seed(1);
  int apart = 0;  // cases whose last bits tell that they were done in another way
  for (const ProgramCase& c : program_cases(true)) {
    const ProgramEpisode episode(c);
    compare_episode("anew:", episode, kernel_table(), anew);
    apart += differ(episode.run<float>(anew), episode.run<float>(kernel_table()));
  }
  if (apart < 3) {
    std::printf("only %d programs were done anew\n", apart);
    ++failures;
  }
  std::printf(failures ? "%d failed\n" : "programs: all passed\n", failures);
  return status | (failures != 0);
}
