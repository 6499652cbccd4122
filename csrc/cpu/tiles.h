// How large the tiles of the small products are, for each kind of registers.
//
// A tile is what a loop keeps in registers: its results, and what one step of the sum reads. Counts are of
// vector instructions in one step; a core does two multiplications (with their additions) and two loads in a
// cycle, a multiplication's result can be added to after four cycles, so that eight must be under way.
//
// 16 registers (AVX2; SSE2, NEON)     results  loads  multiplications  registers  cycles
//   mm: 5 rows, 2 vectors                  10    5 + 2              10         13       5
//   outer: 5 rows, 2 vectors               10    5 + 2              10         13       5
//   outer of 1 vector: 10 rows             10   10 + 1              10         12       5.5
//   dots: 5 by 2 rows                      10    5 + 2              10         13       5
//   panels: 6 rows, 2 vectors              12    6 + 2              12         15       6
//   panels, on the diagonal: 8 rows, 1      8    8 + 1               8         10       4.5
//
// 32 registers (AVX-512; one multiplication a cycle on many cores)
//   mm: 5 rows, 5 vectors                  25    5 + 5              25         31      13 or 25
//   outer: 5 rows, 3 vectors               15    5 + 3              15         19       8 or 15
//   dots: 5 by 5 rows                      25    5 + 5              25         31      13 or 25
//
// Bytes: a step of `dots` with 5 by 2 rows reads 64 new bytes a 5 cycles from the second-level cache (rows of
// one side stay in the first), one of `panels` 4 bytes of each of 6 rows; its panel, kPanelDepth steps of two
// vectors, is 16 KB and stays in the first-level cache.
#pragma once

#include "cpu/simd.h"

namespace kernelmeta {
namespace {

#if defined(__AVX512F__)
inline constexpr int kMmRows = 5, kMmVectors = 5;
inline constexpr int kOuterRows = 5, kOuterVectors = 3, kOuterDepth = 1;
inline constexpr int kDotRows = 5, kDotColumns = 5;
inline constexpr bool kHasPanels = false;
#else
inline constexpr int kMmRows = 5, kMmVectors = 2;
inline constexpr int kOuterRows = 5, kOuterVectors = 2, kOuterDepth = 10;
inline constexpr int kDotRows = 5, kDotColumns = 2;
// A weight is a load where it fills all lanes at once; elsewhere it takes a shuffle too, and panels gain only
// where there are few features.
#if defined(__AVX2__)
inline constexpr bool kHasPanels = true;
#else
inline constexpr bool kHasPanels = false;
#endif
#endif
// What larger products go through at a time: part of a second-level cache of 512 KB.
inline constexpr int64_t kCacheBytes = 192 * 1024;
// Rows of an `outer` of one vector.
inline constexpr int kOuterTall = 10;

inline constexpr int kPanelRows = 6, kPanelVectors = 2, kPanelDepth = 256;

}  // namespace
}  // namespace kernelmeta
