// kernelmeta._C: what was built, by which compiler, for which architectures.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "build_config.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    parts.push_back(part);
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = KERNELMETA_BUILT_VERSION;
  info["build_type"] = KERNELMETA_BUILT_TYPE;
  info["compiler"] = KERNELMETA_BUILT_COMPILER;
  info["cxx_standard"] = __cplusplus;
  info["flags"] = KERNELMETA_BUILT_FLAGS;
  info["processor"] = KERNELMETA_BUILT_PROCESSOR;
  info["instruction_sets"] = split(KERNELMETA_BUILT_INSTRUCTION_SETS);
  info["cuda_architectures"] = split(KERNELMETA_BUILT_CUDA_ARCHITECTURES);
  info["torch"] = KERNELMETA_BUILT_TORCH;
  info["cmake"] = KERNELMETA_BUILT_CMAKE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "What was built.";
  module.def("build_info", &build_info,
             "Compiler, flags, instruction sets, CUDA architectures, build type and versions.");
}
