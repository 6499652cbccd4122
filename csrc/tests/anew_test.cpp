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

}  // namespace

int main() {
  const KernelTable anew{"anew", all_anew<float>(), all_anew<double>()};
  int status = check_all("anew:", anew.f64, anew.f32, false);
  generator.seed(1);
  for (const ProgramCase& c : program_cases()) {
    compare_episode("anew:", ProgramEpisode(c), kernel_table(), anew);
  }
  std::printf(failures ? "%d failed\n" : "programs: all passed\n", failures);
  return status | (failures != 0);
}
