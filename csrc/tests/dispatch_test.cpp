// Which instruction set is chosen, and what is refused.
#include "cpu/dispatch.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

namespace {

constexpr int kSkipped = 77;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

std::string refusal(const char* wanted) {
  try {
    kernelmeta::choose_kernels(wanted);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

}  // namespace

int main() {
  using namespace kernelmeta;
  expect(!instruction_sets().empty(), "at least one instruction set is compiled");
  const InstructionSet* best = nullptr;
  for (const InstructionSet& each : instruction_sets()) {
    expect(std::strcmp(each.name, each.kernels->isa) == 0, "each table carries its own name");
    if (each.runs_here) {
      expect(&choose_kernels(each.name) == each.kernels, "what runs here is chosen by name");
      if (best == nullptr) best = &each;
    } else {
      expect(refusal(each.name).find("cannot run") != std::string::npos, "what cannot run is refused");
    }
  }
  expect(best != nullptr && instruction_sets().back().runs_here, "the baseline runs everywhere");
  expect(&choose_kernels(nullptr) == best->kernels, "the best is chosen where none is named");
  expect(&choose_kernels("") == best->kernels, "an empty name is none");
  expect(refusal("mmx").find("mmx: not among the compiled") != std::string::npos,
         "unknown names are refused");

  char* first = static_cast<char*>(scratch(100));
  expect(reinterpret_cast<std::uintptr_t>(first) % 64 == 0, "scratch memory is aligned");
  std::memset(first, 1, 100);
  expect(scratch(64) == first, "less is served from the same memory");
  std::memset(scratch(1 << 20), 1, 1 << 20);
  void* other = nullptr;
  std::thread([&] { other = scratch(8); }).join();
  expect(other != scratch(8), "each thread has its own");

  const char* wanted = std::getenv("KERNELMETA_ISA");
  for (const InstructionSet& each : instruction_sets()) {
    if (wanted != nullptr && std::strcmp(each.name, wanted) == 0 && !each.runs_here) {
      std::printf("skipped: this CPU cannot run %s\n", wanted);
      return kSkipped;
    }
  }
  expect(kernel_table().isa == choose_kernels(wanted).isa, "KERNELMETA_ISA is obeyed");
  return 0;
}
