// Where in the source a barrier stands: tests take barriers away, one at a time.
#pragma once

namespace kernelmeta {

struct SourceLine {
  const char* file;
  int line;
};
// Parameters that say where a function is called. (As one parameter of type SourceLine they would say where
// the default argument stands.)
#define KERNELMETA_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

}  // namespace kernelmeta
