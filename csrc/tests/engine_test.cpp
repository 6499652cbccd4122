// The engine on a CPU core, with the instruction set that KERNELMETA_ISA names. Built with AddressSanitizer
// and UndefinedBehaviorSanitizer, and with scratch memory full of NaN (KERNELMETA_POISON): what matters here
// as much as the numbers is that no kernel reads or writes what it should not.
#include "tests/learner_checks.h"

#include "cpu/dispatch.h"

using namespace kernelmeta;

int main() {
  const KernelTable& table = kernel_table();
  return check_all(table.isa, table.f64, table.f32, false) | check_learners(table.isa, table, table, true);
}
