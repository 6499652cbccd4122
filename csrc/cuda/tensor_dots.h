// Dot products of feature rows on the tensor cores.
//
// A product of two features of 16 bits is exact in float32; one of two float32 is three products of their
// parts in TF32 (tensor_core.h). The tensor cores add with less care than float32 arithmetic does (they cut
// off, they do not round), so they add the products of one step along D only; the steps' sums meet in
// float32.
//
// A warp owns a tile of kDown x kAcross pairs of rows. The Team gives its parts: Left<F>, 16 rows of the
// stage and kStep words of each, Right<F>, 8 rows, and Sums<F>, of their 16 x 8 pairs: add(Left, Right),
// finish() after the last, values[kValues]: those of one lane; left(value), right(value): the rows that it is
// of.
#pragma once

#include <bit>
#include <type_traits>

#include "cuda/dots.h"
#include "cuda/row.h"

namespace kernelmeta {

template <class Team, class F>
struct TensorDots {
  static constexpr bool kFloat = sizeof(F) == 4;
  using Stage = Staging<float>;
  // Rows of the stage, in words of 32 bits: neighbouring ones lie four banks apart. kChunk: features that are
  // multiplied while others come in.
  static constexpr int kWords = Stage::kChunk, kStride = Stage::kStride, kStep = 8, kSteps = kWords / kStep;
  static constexpr int kPerWord = 4 / int(sizeof(F)), kChunk = kWords * kPerWord;
  static constexpr int kDown = 16, kRows = Stage::kManyRows, kParts = kFloat ? 1 : 3;
  static constexpr int kThreads = Team::kThreads, kLanes = Team::kLanes, kWarps = kThreads / kLanes;
  // Of fewer features than this float32 arithmetic is more exact than three products in TF32 (docs/cuda.md).
  static constexpr int kExact = 21;

  // out[i][j] = <a(i), b(j)>
  static __host__ __device__ KERNELMETA_NOINLINE void dots(int64_t m, FeatureRows<F> a, int64_t n,
                                                           FeatureRows<F> b, int D, float* out, int64_t ldo) {
    for (int64_t i = 0; i < m; i += Stage::kFewRows) {
      const int down = least(m - i, Stage::kFewRows);
      const int most = down > kDown ? kOtherRows : kRows - kDown;
      for (int64_t j = 0; j < n; j += most) {
        tiles<false>(down, least(n - j, most), D, StagedRows{a, i}, StagedRows{b, j},
                     [&](int r, int c, float value) { out[(i + r) * ldo + j + c] = value; });
      }
    }
  }

  // gram[i][j] = <x(i), x(j)>, cross[n][i] = <theta0[n], x(i)>, squares[n] = |theta0[n]|^2, from one stack of
  // rows that is read once where it fits the stage. For features of 16 bits theta0 is the sum of kParts rows
  // each there; `cross` and the stage are free after the caller's next barrier.
  static KERNELMETA_INLINE void stacked(int64_t Q, FeatureRows<F> x, int64_t N, const float* theta0, int D,
                                        float* gram, float* cross, int64_t ld, float* squares) {
    if (!kFloat && N > 0) {
      for (int64_t n = Team::thread() / kLanes; n < N; n += kWarps) {
        const Row<Team, float, false> row{D};
        const float* t = theta0 + n * D;
        const float sum = row.sum([&](auto d) { return d.load(t) * d.load(t); });
        row.one([&] { squares[n] = sum; });
      }
      Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
    }
    const bool one_stack = kFloat || Q + kParts * N <= kRows;
    const int64_t of_stack = one_stack ? N : 0;
    if (Q + kParts * of_stack <= kRows)
      few_stacked_dots(int(Q), x, int(of_stack), theta0, D, gram, cross, ld, squares);
    else
      many_stacked_dots(Q, x, of_stack, theta0, D, gram, cross, ld, squares);
    if (!one_stack) Dots<Team, float>::dots(N, FeatureRows<float>{theta0, D, nullptr}, Q, x, D, cross, ld);
  }

 private:
  static constexpr int kSelfAcross = 32, kOtherAcross = 16;
  // Tiles that have pairs of rows i and j <= i, of so many rows of tiles.
  static KERNELMETA_INLINE constexpr int below_diagonal(int down) {
    int count = 0;
    for (int i = 0; i < down; ++i) count += i * kDown / kSelfAcross + 1;
    return count;
  }
  // Up to kRows rows meet themselves; up to kFewRows meet up to kOtherRows others, always in as many groups,
  // so that equal rows give the same bits. There is a warp for each of the tiles.
  static constexpr int kOtherRows = kRows - Stage::kFewRows;
  static constexpr int kOtherGroups = kWarps / (Stage::kFewRows / kDown * (kOtherRows / kOtherAcross));
  static_assert(kWarps >= below_diagonal(kRows / kDown) && kOtherGroups >= 1);

  // Functions of their own, none of which calls another: what a call needs comes on top of its caller's
  // registers.
  static __host__ __device__ KERNELMETA_NOINLINE void few_stacked_dots(int Q, FeatureRows<F> x, int N,
                                                                       const float* theta0, int D,
                                                                       float* gram, float* cross, int64_t ld,
                                                                       float* squares) {
    const int count = Q + kParts * N;
    const Stack stack{x, 0, Q, theta0, squares, D};
    if constexpr (kFloat) {
      tiles<true>(count, count, D, stack, stack, Symmetric{gram, cross, ld, squares, Q});
    } else {
      // [kParts * N][Q], at the end of the stage: what the tiles' sums meet in lies before it.
      float* const of_parts = Team::template stage<float>() + Stage::kElements - kParts * N * Q;
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
  }

  static __host__ __device__ KERNELMETA_NOINLINE void many_stacked_dots(int64_t Q, FeatureRows<F> x,
                                                                        int64_t N, const float* theta0, int D,
                                                                        float* gram, float* cross, int64_t ld,
                                                                        float* squares) {
    const int64_t rows = Q + N;
    const Symmetric store{gram, cross, ld, squares, Q};
    for (int64_t j = 0; j < rows; j += kOtherRows) {
      const int64_t end = j + least(rows - j, kOtherRows);
      for (int64_t i = 0; i < end; i += Stage::kFewRows) {
        tiles<false>(least(end - i, Stage::kFewRows), int(end - j), D, Stack{x, i, Q, theta0, squares, D},
                     Stack{x, j, Q, theta0, squares, D}, [=](int r, int c, float value) {
                       if (i + r <= j + c) store(j + c, i + r, value);
                     });
      }
    }
  }

  static KERNELMETA_INLINE int least(int64_t a, int b) { return a < b ? int(a) : b; }

  // Where the product of rows i and j <= i of a stack belongs.
  struct Symmetric {
    float *gram, *cross;
    int64_t ld;
    float* squares;
    int64_t Q;

    KERNELMETA_INLINE void operator()(int64_t i, int64_t j, float value) const {
      if (i < Q) {
        gram[i * ld + j] = value;
        gram[j * ld + i] = value;
      } else if (j < Q) {
        cross[(i - Q) * ld + j] = value;
      } else if (i == j) {
        squares[i - Q] = value;
      }
    }
  };

  // Rows for the stage: row(i), or null where it is not there as such and part(i, d, to) writes its features
  // from d on, a pack of them.
  struct StagedRows {
    FeatureRows<F> rows;
    int64_t first;

    KERNELMETA_INLINE const F* row(int i) const { return rows(first + i); }
    KERNELMETA_INLINE void part(int, int, F*) const {}
  };

  // Q rows of features, then theta0: rows of its own, or the kParts rows of each of its rows.
  struct Stack {
    FeatureRows<F> x;
    int64_t first, Q;
    const float *theta0, *squares;
    int D;

    KERNELMETA_INLINE const F* row(int i) const {
      const int64_t at = first + i;
      if (at < Q) return x(at);
      if constexpr (kFloat)
        return theta0 + (at - Q) * D;
      else
        return nullptr;
    }
    KERNELMETA_INLINE void part(int i, int d, F* to) const {
      if constexpr (!kFloat) {
        const int n = (i - int(Q)) / kParts;
        write_part((i - int(Q)) % kParts, theta0 + int64_t(n) * D + d, D - d, scale_of(squares[n]), to);
      }
    }
  };

  // A power of two that brings a row of this square close to 2^15, and none of its entries above: half
  // precision's range is small, and what lies below the parts' least bit is lost.
  static KERNELMETA_INLINE float scale_of(float squares) {
    if (!(squares > 0 && squares * 0 == 0)) return 1;
    return ::ldexp(1.0f, 14 - ::ilogb(squares) / 2);
  }

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

  static KERNELMETA_INLINE bool is_finite(float x) { return x - x == 0.0f; }

  // <a, b> by float32 arithmetic.
  static __host__ __device__ KERNELMETA_NOINLINE float plain_dot(const F* a, const F* b, int D) {
    float sum = 0;
#pragma unroll 4
    for (int d = 0; d < D; ++d) sum = ::fmaf(float(a[d]), float(b[d]), sum);
    return sum;
  }

  // The products of 16 rows with the next kCount * 8, of one step.
  template <int kCount, class Left, class Sums, int kUnits>
  static KERNELMETA_INLINE void add(const Left& left, const uint32_t* others, Sums (&sums)[kUnits]) {
    typename Team::template Right<F> right[kCount];
#pragma unroll
    for (int s = 0; s < kCount; ++s) right[s] = {others + s * 8 * kStride, kStride};
#pragma unroll
    for (int s = 0; s < kCount; ++s) sums[s].add(left, right[s]);
  }

  // ... in float32 arithmetic.
  template <class Sums, int kUnits>
  static KERNELMETA_INLINE void add_plainly(const uint32_t* rows, const uint32_t* others,
                                            Sums (&sums)[kUnits]) {
    KERNELMETA_ROLLED
    for (int d = 0; d < kStep; ++d) {
#pragma unroll
      for (int s = 0; s < kUnits; ++s) {
#pragma unroll
        for (int value = 0; value < Sums::kValues; ++value) {
          const float x = std::bit_cast<float>(rows[Sums::left(value) * kStride + d]);
          const float y = std::bit_cast<float>(others[(s * 8 + Sums::right(value)) * kStride + d]);
          sums[s].values[value] = ::fmaf(x, y, sums[s].values[value]);
        }
      }
    }
  }

  // store(i, j, <a(i), b(j)>) for i < m, j < n; with kSelf a and b are the same, and j <= i. Where there are
  // more warps than tiles, groups of warps take turns along D and their sums meet in the stage. For
  // float32 what is not finite is computed anew.
  template <bool kSelf, class A, class B, class Store>
  static KERNELMETA_INLINE void tiles(int m, int n, int D, A a, B b, Store store) {
    using Sums = typename Team::template Sums<F>;
    constexpr int kAcross = kSelf ? kSelfAcross : kOtherAcross, kUnits = kAcross / 8;
    constexpr int kPack = Pack<F>::kSize, kTileSums = kDown * kAcross;
    constexpr int kValues = kUnits * Sums::kValues;
    static_assert(kValues <= 32);
    constexpr int kPacks = kChunk / kPack, kLoads = (kRows * kPacks + kThreads - 1) / kThreads;
    constexpr int kMeet = Stage::kBuffer / kTileSums;  // tiles whose sums a buffer of the stage holds
    const int down = m > 0 ? (m + kDown - 1) / kDown : 1, across = (n + kAcross - 1) / kAcross;
    const int count = kSelf ? below_diagonal(down) : down * across;
    int groups = kSelf ? least(kWarps / count, kSteps) : least(kOtherGroups, kSteps);
    while (groups > 1 && (groups - 1) * count > 2 * kMeet) --groups;
    float* const of_stage = placed<true>(Team::template stage<float>());
    uint32_t* const stage = reinterpret_cast<uint32_t*>(of_stage);
    const int staged = kSelf ? m : m + n;
    const int offset = kSelf ? 0 : m;  // of b's rows in the stage
    const int thread = Team::thread(), lane = thread % kLanes, warp = thread / kLanes;
    const int group = warp / count, tile = warp % count;
    const bool works = group < groups;
    int i0 = kSelf ? 0 : tile / across, j0 = kSelf ? tile : tile % across;
    if (kSelf) {
      for (; j0 > i0 * kDown / kAcross; ++i0) j0 -= i0 * kDown / kAcross + 1;
    }
    i0 *= kDown;
    j0 *= kAcross;
    const int end = (kSelf ? least(n, i0 + kDown) : n) - j0;  // of the columns that are wanted

    // What this thread brings: a pack of features of kLoads rows.
    const F* from[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int row = (thread + l * kThreads) / kPacks;
      from[l] = nullptr;
      if (row < staged) from[l] = kSelf || row < offset ? a.row(row) : b.row(row - offset);
    }
    const auto fetch = [&](int d0, uint32_t* to) {
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int e = thread + l * kThreads, row = e / kPacks, d = d0 + e % kPacks * kPack;
        if (row >= staged) continue;
        F* const pack = reinterpret_cast<F*>(to + row * kStride) + e % kPacks * kPack;
        if (from[l] && D - d >= kPack && reinterpret_cast<uintptr_t>(from[l] + d) % sizeof(Pack<F>) == 0) {
          Team::copy_pack(from[l] + d, pack);
        } else if (kFloat || from[l]) {
#pragma unroll 1
          for (int i = 0; i < kPack; ++i) pack[i] = i < D - d ? from[l][d + i] : F(0.0f);
        } else {
          a.part(row, d, pack);
        }
      }
    };
    Sums sums[kUnits];
    fetch(0, stage);
    Team::end_copies();
    if (kChunk < D) fetch(kChunk, stage + Stage::kBuffer);
    Team::end_copies();
    int buffer = 0, coming = 2 * Stage::kBuffer;
    KERNELMETA_ROLLED
    for (int d0 = 0; d0 < D; d0 += kChunk) {
      Team::await_copies();
      Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
      if (d0 + 2 * kChunk < D) fetch(d0 + 2 * kChunk, stage + coming);
      Team::end_copies();
      // Rows beyond m or n are whatever the stage holds there; their sums are stored nowhere.
      if (works) {
        KERNELMETA_ROLLED
        for (int step = group; step < kSteps; step += groups) {
          const uint32_t* const words = stage + buffer + step * kStep;
          const typename Team::template Left<F> left{words + i0 * kStride, kStride};
          const uint32_t* const others = words + (offset + j0) * kStride;
          if (kFloat && D < kExact)
            add_plainly(words + i0 * kStride, others, sums);
          else if (end > kAcross / 2)
            add<kUnits>(left, others, sums);
          else
            add<kUnits / 2>(left, others, sums);
        }
      }
      buffer = buffer == (Stage::kBuffers - 1) * Stage::kBuffer ? 0 : buffer + Stage::kBuffer;
      coming = coming == (Stage::kBuffers - 1) * Stage::kBuffer ? 0 : coming + Stage::kBuffer;
    }
#pragma unroll
    for (Sums& of_unit : sums) of_unit.finish();
    if (kSelf && !kFloat) {  // sums may be stored where the last rows lie
      Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
      buffer = 0;
      coming = 2 * Stage::kBuffer;
    }
    if (groups > 1) {
      // Of the three buffers the last rows are in `coming`, where other warps may still read.
      const int other = 3 * Stage::kBuffer - buffer - coming - kMeet * kTileSums;
      const auto each_sum = [&](int g, auto f) {
        const int piece = g * count + tile;
        float* const of_tile = of_stage + (piece < kMeet ? buffer : other) + piece * kTileSums + lane;
#pragma unroll
        for (int value = 0; value < kValues; ++value)
          f(of_tile[value * kLanes], sums[value / Sums::kValues].values[value % Sums::kValues]);
      };
      if (works && group > 0) each_sum(group - 1, [](float& met, float& own) { met = own; });
      Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
      if (works && group == 0) {
        for (int g = 0; g < groups - 1; ++g) each_sum(g, [](float& met, float& own) { own += met; });
      }
    }
    if (works && group == 0) {
      const auto place_of = [&](int value, auto f) {
        const int row = i0 + Sums::left(value % Sums::kValues);
        const int column = j0 + value / Sums::kValues * 8 + Sums::right(value % Sums::kValues);
        if (row < m && column < (kSelf ? row + 1 : n)) f(row, column);
      };
      uint32_t anew = 0;
#pragma unroll
      for (int value = 0; value < kValues; ++value) {
        const float sum = sums[value / Sums::kValues].values[value % Sums::kValues];
        if (kFloat && !is_finite(sum)) anew |= 1u << value;
        place_of(value, [&](int row, int column) { store(row, column, sum); });
      }
      if constexpr (kFloat) {
        for (int value = 0; anew != 0; ++value, anew >>= 1) {
          if (anew & 1)
            place_of(value, [&](int row, int column) {
              store(row, column, plain_dot(a.row(row), b.row(column), D));
            });
        }
      }
    }
    Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
  }
};

}  // namespace kernelmeta
