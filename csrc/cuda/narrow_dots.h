// Dot products of feature rows stored in 16 bits, on the tensor cores.
//
// A product of two such features is exact in float32. The tensor cores add with less care than float32
// arithmetic does (they cut off, they do not round), so they add the products of one chunk of features only;
// the chunks' sums meet in float32.
//
// A warp owns a tile of kTile x kTile pairs of rows, or of half as many. The Team gives its parts: Left<F>,
// 16 rows of 16 features in the stage, Right<F>, 8 of them, and Sums, of their 16 x 8 pairs: add(Left,
// Right), each(f(i, j, sum)), values[kValues]: those of one lane.
#pragma once

#include "cuda/dots.h"
#include "cuda/row.h"

namespace kernelmeta {

template <class Team, class F>
struct NarrowDots {
  static_assert(sizeof(F) == 2);
  using Stage = Staging<float>;
  // The same rows, in bytes: neighbouring ones lie four banks apart.
  static constexpr int kChunk = 2 * Stage::kChunk, kStride = 2 * Stage::kStride, kTile = 32, kParts = 3;
  static constexpr int kThreads = Team::kThreads, kLanes = Team::kLanes, kWarps = kThreads / kLanes;

  // Whether there is a warp for each of the tiles of as many rows as the stage holds.
  static constexpr int kMostTiles = Stage::kManyRows / kTile;
  static constexpr bool kOnePass = kWarps >= kMostTiles * (kMostTiles + 1) / 2;

  // Up to kManyRows rows meet themselves; up to kFewRows meet up to kOtherRows others.
  static constexpr int kOtherRows = Stage::kManyRows - Stage::kFewRows;

  // out[i][j] = <a(i), b(j)>
  static __host__ __device__ KERNELMETA_NOINLINE void dots(int64_t m, FeatureRows<F> a, int64_t n,
                                                           FeatureRows<F> b, int D, float* out, int64_t ldo) {
    for (int64_t i = 0; i < m; i += Stage::kFewRows) {
      for (int64_t j = 0; j < n; j += kOtherRows) {
        tiles<false>(least(m - i, Stage::kFewRows), least(n - j, kOtherRows), D, StagedRows{a, i, D},
                     StagedRows{b, j, D},
                     [&](int r, int c, float value) { out[(i + r) * ldo + j + c] = value; });
      }
    }
  }

  // dots of x with itself, computed for half of the pairs.
  static KERNELMETA_INLINE void self_dots(int64_t m, FeatureRows<F> x, int D, float* out, int64_t ldo) {
    if (m <= Stage::kManyRows)
      few_self_dots(int(m), x, D, out, ldo);
    else
      many_self_dots(m, x, D, out, ldo);
  }

  // gram[i][j] = <x(i), x(j)>, cross[n][i] = <theta0[n], x(i)>, squares[n] = |theta0[n]|^2. Where they fit
  // the stage, x and theta0 are one stack of rows that is read once: theta0 as the sum of kParts rows each.
  // `cross` and the stage are free after the caller's next barrier.
  static KERNELMETA_INLINE void stacked(int64_t Q, FeatureRows<F> x, int64_t N, const float* theta0, int D,
                                        float* gram, float* cross, int64_t ld, float* squares) {
    for (int64_t n = Team::thread() / kLanes; n < N; n += kWarps) {
      const Row<Team, float, false> row{D};
      const float* t = theta0 + n * D;
      const float sum = row.sum([&](auto d) { return d.load(t) * d.load(t); });
      row.one([&] { squares[n] = sum; });
    }
    Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
    const int64_t stack = Q + kParts * N;
    // Where warps take their tiles in several passes, the sums of one must lie behind the rows of the next.
    const bool sums_fit = kOnePass || kParts * N * Q <= Stage::kElements - stack * Stage::kStride;
    if (stack <= Stage::kManyRows && sums_fit) {
      few_stacked_dots(int(Q), x, int(N), theta0, D, gram, cross, ld, squares);
    } else {
      self_dots(Q, x, D, gram, ld);
      Dots<Team, float>::dots(N, FeatureRows<float>{theta0, D, nullptr}, Q, x, D, cross, ld);
    }
  }

 private:
  // Functions of their own, none of which calls another: what a call needs comes on top of its caller's
  // registers.
  static __host__ __device__ KERNELMETA_NOINLINE void few_self_dots(int m, FeatureRows<F> x, int D,
                                                                    float* out, int64_t ldo) {
    const StagedRows rows{x, 0, D};
    tiles<true>(m, m, D, rows, rows, [=](int64_t i, int64_t j, float value) {
      out[i * ldo + j] = value;
      out[j * ldo + i] = value;
    });
  }

  static __host__ __device__ KERNELMETA_NOINLINE void many_self_dots(int64_t m, FeatureRows<F> x, int D,
                                                                     float* out, int64_t ldo) {
    for (int64_t j = 0; j < m; j += kOtherRows) {
      const int64_t end = least(j + kOtherRows, m);
      for (int64_t i = 0; i < end; i += Stage::kFewRows) {
        float *down = out + i * ldo + j, *across = out + j * ldo + i;
        const int below = int(j - i);
        tiles<false>(least(end - i, Stage::kFewRows), int(end - j), D, StagedRows{x, i, D},
                     StagedRows{x, j, D}, [=](int r, int c, float value) {
                       if (r > below + c) return;
                       down[r * ldo + c] = value;
                       across[c * ldo + r] = value;
                     });
      }
    }
  }

  static __host__ __device__ KERNELMETA_NOINLINE void few_stacked_dots(int Q, FeatureRows<F> x, int N,
                                                                       const float* theta0, int D,
                                                                       float* gram, float* cross, int64_t ld,
                                                                       const float* squares) {
    // [kParts * N][Q], at the end of the stage: what the tiles' sums meet in lies before it.
    float* const of_parts = Team::template stage<float>() + Stage::kElements - kParts * N * Q;
    const int count = Q + kParts * N;
    const Stack stack{{x, 0, D}, Q, theta0, squares};
    tiles<true>(count, count, D, stack, stack, [=](int i, int j, float value) {
      if (i < Q) {
        gram[i * ld + j] = value;
        gram[j * ld + i] = value;
      } else if (j < Q) {
        of_parts[(i - Q) * Q + j] = value;
      }
    });
    for (int i = Team::thread(); i < N * Q; i += kThreads) {
      const int n = i / Q, q = i % Q;
      float sum = 0;
      for (int part = kParts - 1; part >= 0; --part) sum += of_parts[(n * kParts + part) * Q + q];
      cross[n * ld + q] = sum / scale_of(squares[n]);
    }
  }

  static KERNELMETA_INLINE int least(int64_t a, int b) { return a < b ? int(a) : b; }

  // A power of two that brings a row of this square close to 2^15, and none of its entries above: half
  // precision's range is small, and what lies below the parts' least bit is lost.
  static KERNELMETA_INLINE float scale_of(float squares) {
    if (!(squares > 0 && squares * 0 == 0)) return 1;
    return ::ldexp(1.0f, 14 - ::ilogb(squares) / 2);
  }

  // Rows for the stage, a pack of features at a time: whole(row, d) is where the pack from d on can be read
  // at once, or null; write(row, d, to) copies it wherever it lies, with zeros for what is beyond D.
  struct StagedRows {
    FeatureRows<F> rows;
    int64_t first;
    int D;

    KERNELMETA_INLINE const Pack<F>* whole(int row, int d) const {
      const F* from = rows(first + row) + d;
      const bool at_once =
          D - d >= Pack<F>::kSize && reinterpret_cast<uintptr_t>(from) % sizeof(Pack<F>) == 0;
      return at_once ? reinterpret_cast<const Pack<F>*>(from) : nullptr;
    }
    KERNELMETA_INLINE void write(int row, int d, F* to) const {
      const F* from = rows(first + row) + d;
#pragma unroll 1
      for (int l = 0; l < Pack<F>::kSize; ++l) to[l] = l < D - d ? from[l] : F(0.0f);
    }
  };

  // A row of float32 times scale_of(its square) is the sum of kParts rows: each takes as many digits as it
  // can of what those before it leave.
  static __host__ __device__ KERNELMETA_NOINLINE void write_part(int part, const float* from, int left,
                                                                 float scale, F* to) {
#pragma unroll 2
    for (int l = 0; l < Pack<F>::kSize; ++l) {
      float rest = l < left ? from[l] * scale : 0.0f;
      for (int p = 0; p < part; ++p) rest -= float(F(rest));
      to[l] = F(rest);
    }
  }

  // Q rows of features, then the kParts rows of each row of theta0.
  struct Stack {
    StagedRows x;
    int Q;
    const float *theta0, *squares;

    KERNELMETA_INLINE const Pack<F>* whole(int row, int d) const {
      return row < Q ? x.whole(row, d) : nullptr;
    }
    KERNELMETA_INLINE void write(int row, int d, F* to) const {
      if (row < Q) return x.write(row, d, to);
      const int n = (row - Q) / kParts;
      write_part((row - Q) % kParts, theta0 + int64_t(n) * x.D + d, x.D - d, scale_of(squares[n]), to);
    }
  };

  // store(i, j, <a(i), b(j)>) for i < m, j < n; with kSelf a and b are the same, and j <= i. Where there are
  // more warps than tiles, groups of warps take turns along D and their sums meet in the stage.
  template <bool kSelf, class A, class B, class Store>
  static KERNELMETA_INLINE void tiles(int m, int n, int D, A a, B b, Store store) {
    using Sums = typename Team::Sums;
    constexpr int kTileDown = kSelf ? kTile : kTile / 2;  // as many warps as can be have one
    constexpr int kDown = kTileDown / 16, kAcross = kTile / 8, kSteps = kChunk / 16, kPack = Pack<F>::kSize;
    constexpr int kRows = Stage::kManyRows;
    constexpr int kPacks = kChunk / kPack, kLoads = (kRows * kPacks + kThreads - 1) / kThreads;
    constexpr int kTileSums = kTileDown * kTile, kMeet = Stage::kElements / kTileSums;
    const int down = (m + kTileDown - 1) / kTileDown, across = (n + kTile - 1) / kTile;
    const int count = kSelf ? down * (down + 1) / 2 : down * across;
    int groups = kWarps / count < kSteps ? kWarps / count : kSteps;
    while (groups > 1 && (groups - 1) * count > kMeet) --groups;
    if (groups < 1) groups = 1;
    float* const meet = Team::template stage<float>();
    F* const stage = reinterpret_cast<F*>(meet);
    const int staged = kSelf ? m : m + n;
    const int offset = kSelf ? 0 : m;  // of b's rows in the stage
    const int thread = Team::thread(), lane = thread % kLanes, warp = thread / kLanes;

    for (int first = 0; first < count; first += kWarps) {
      const int group = groups > 1 ? warp / count : 0;
      const int tile = groups > 1 ? warp % count : first + warp;
      const bool works = groups > 1 ? group < groups : tile < count;
      int i0 = 0, j0 = 0;
      Dots<Team, float>::template place<kSelf>(tile, across, i0, j0);
      i0 *= kTileDown;
      j0 *= kTile;
      Sums sums[kDown][kAcross];
      Pack<F> next[kLoads];
      uint32_t fetched[(kLoads + 31) / 32];  // bit l: next[l] is there
      // f(l, operand, its row, d): the packs of a chunk that are this thread's
      const auto each_pack = [&](int d0, auto f) {
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          const int e = thread + l * kThreads, row = e / kPacks, d = d0 + e % kPacks * kPack;
          if (row >= staged) continue;
          if (kSelf || row < offset)
            f(l, a, row, d);
          else
            f(l, b, row - offset, d);
        }
      };
      const auto fetch = [&](int d0) {
#pragma unroll
        for (uint32_t& bits : fetched) bits = 0;
        each_pack(d0, [&](int l, const auto& rows, int row, int d) {
          if (const Pack<F>* from = rows.whole(row, d)) {
            next[l] = *from;
            fetched[l / 32] |= 1u << l % 32;
          }
        });
      };
      fetch(0);
      for (int d0 = 0; d0 < D; d0 += kChunk) {
        each_pack(d0, [&](int l, const auto& rows, int row, int d) {
          const int e = thread + l * kThreads;
          F* to = stage + e / kPacks * kStride + e % kPacks * kPack;
          if (fetched[l / 32] >> l % 32 & 1)
            *reinterpret_cast<Pack<F>*>(to) = next[l];
          else
            rows.write(row, d, to);
        });
        Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
        if (d0 + kChunk < D) fetch(d0 + kChunk);
        if (works) {
          // Rows beyond m or n are whatever the stage holds there; their sums are stored nowhere.
#pragma unroll
          for (int r = 0; r < kDown; ++r) {
            Sums of_chunk[kAcross];
#pragma unroll 1
            for (int step = group; step < kSteps; step += groups) {
              const typename Team::template Left<F> left{stage + (i0 + r * 16) * kStride + step * 16,
                                                         kStride};
#pragma unroll
              for (int s = 0; s < kAcross; ++s) {
                of_chunk[s].add(left, typename Team::template Right<F>{
                                          stage + (offset + j0 + s * 8) * kStride + step * 16, kStride});
              }
            }
#pragma unroll
            for (int s = 0; s < kAcross; ++s) {
#pragma unroll
              for (int v = 0; v < Sums::kValues; ++v) sums[r][s].values[v] += of_chunk[s].values[v];
            }
          }
        }
        Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
      }
      if (groups > 1) {
        const auto each_sum = [&](int g, auto f) {
          float* const of_tile = meet + (g * count + tile) * kTileSums + lane;
#pragma unroll
          for (int r = 0; r < kDown; ++r) {
#pragma unroll
            for (int s = 0; s < kAcross; ++s) {
#pragma unroll
              for (int v = 0; v < Sums::kValues; ++v) {
                f(of_tile[((r * kAcross + s) * Sums::kValues + v) * kLanes], sums[r][s].values[v]);
              }
            }
          }
        };
        if (works && group > 0) each_sum(group - 1, [](float& met, float& own) { met = own; });
        Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
        if (works && group == 0) {
          for (int g = 0; g < groups - 1; ++g) each_sum(g, [](float& met, float& own) { own += met; });
        }
      }
      if (works && group == 0) {
#pragma unroll
        for (int r = 0; r < kDown; ++r) {
#pragma unroll
          for (int s = 0; s < kAcross; ++s) {
            sums[r][s].each([&](int i, int j, float value) {
              const int row = i0 + r * 16 + i, column = j0 + s * 8 + j;
              if (row < m && column < (kSelf ? row + 1 : n)) store(row, column, value);
            });
          }
        }
      }
      Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
    }
  }
};

}  // namespace kernelmeta
