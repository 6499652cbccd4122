// Stands in for CUDA's own header; see cuda_runtime.h.
#pragma once

#include "tests/narrow_float.h"

using __half = kernelmeta::Half;
