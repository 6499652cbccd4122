# Fails unless the one symbol that ARCHIVE gives to the linker is the table of kernels for ISA.
execute_process(COMMAND ${NM} --defined-only --extern-only ${ARCHIVE}
  OUTPUT_VARIABLE output RESULT_VARIABLE status)
if(status)
  message(FATAL_ERROR "${NM} failed")
endif()
string(REGEX MATCHALL "[0-9a-f]+ [A-Za-z] [^\n]+" symbols "${output}")
list(LENGTH symbols count)
if(NOT count EQUAL 1 OR NOT symbols MATCHES " [DRB] _ZN10kernelmeta[0-9]+kernels_${ISA}E$")
  string(REPLACE ";" "\n  " symbols "${symbols}")
  message(FATAL_ERROR "expected nothing but kernelmeta::kernels_${ISA}, found:\n  ${symbols}")
endif()
