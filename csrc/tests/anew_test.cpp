// Tasks done anew in D dimensions, all of them (kernels.cpp compiled with KERNELMETA_ANEW), against the
// paper's form and, for programs, against the same kernels in the space of the rows.
#include "cpu/dispatch.h"
#include "tests/learner_checks.h"

using namespace kernelmeta;

namespace kernelmeta {
extern const KernelTable kernels_anew;
}

int main() {
  const KernelTable& anew = kernels_anew;
  int status = check_all("anew:", anew.f64, anew.f32, false);
  generator.seed(1);
  for (const ProgramCase& c : program_cases()) {
    compare_episode("anew:", ProgramEpisode(c), kernel_table(), anew);
  }
  std::printf(failures ? "%d failed\n" : "programs: all passed\n", failures);
  return status | (failures != 0);
}
