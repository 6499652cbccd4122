# kernels.cpp is compiled once for each instruction set; dispatch.cpp chooses at run time.
#
# One file an instruction set, rather than target_clones: a helper that the compiler doesn't inline there
# silently stays at the baseline.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  # Best first: the first one that the CPU can run is chosen.
  set(KERNELMETA_INSTRUCTION_SETS avx512 avx2 sse2)
  set(KERNELMETA_FLAGS_sse2 -msse2)
  set(KERNELMETA_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(KERNELMETA_FLAGS_avx512 ${KERNELMETA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mprefer-vector-width=512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  set(KERNELMETA_INSTRUCTION_SETS neon)
  set(KERNELMETA_FLAGS_neon)
else()
  set(KERNELMETA_INSTRUCTION_SETS generic)
  set(KERNELMETA_FLAGS_generic)
endif()

# kernelmeta_add_kernels(<target> <instruction sets ...> [OPTIONS <compile options ...>]): an interface library of the
# kernels compiled for these, one OBJECT library <target>_<instruction set> each, and the list of them for
# dispatch.cpp.
function(kernelmeta_add_kernels target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "OPTIONS")
  add_library(${target} INTERFACE)
  set(each "")
  foreach(isa IN LISTS arg_UNPARSED_ARGUMENTS)
    add_library(${target}_${isa} OBJECT ${PROJECT_SOURCE_DIR}/csrc/cpu/kernels.cpp)
    target_compile_definitions(${target}_${isa} PRIVATE KERNELMETA_ISA=${isa})
    target_compile_options(${target}_${isa} PRIVATE ${KERNELMETA_FLAGS_${isa}} ${arg_OPTIONS})
    target_sources(${target} INTERFACE $<TARGET_OBJECTS:${target}_${isa}>)
    string(APPEND each "EACH(${isa})")
  endforeach()
  target_compile_definitions(${target} INTERFACE "KERNELMETA_EACH_ISA=${each}")
endfunction()
