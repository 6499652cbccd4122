// Dot products of feature rows, in register tiles.
#pragma once

#include "cuda/packs.h"
#include "cuda/source_line.h"
#include "engine/feature_rows.h"

namespace kernelmeta {

// Where feature rows meet in dot products: up to kManyRows of them with themselves, or with kFewRows others,
// in chunks of kChunk features. kStride: a row of the stage, in elements; an odd number of packs, so that
// neighbouring rows lie in different banks.
template <class C>
struct Staging {
  static constexpr int kChunk = 128 / int(sizeof(C));
  static constexpr int kStride = kChunk + Pack<C>::kSize;
  static constexpr int kTileRows = 6, kManyRows = 96, kFewRows = 32;
  static constexpr int kElements = (kManyRows + kFewRows) * kStride;
};

template <class Team, class C>
struct Dots {
  using Stage = Staging<C>;
  static constexpr int kThreads = Team::kThreads;

  // out[i][j] = <a(i), b(j)>
  template <class X, class Y>
  static __host__ __device__ KERNELMETA_NOINLINE void dots(int64_t m, FeatureRows<X> a, int64_t n,
                                                           FeatureRows<Y> b, int64_t D, C* out, int64_t ldo) {
    for (int64_t i = 0; i < m; i += Stage::kFewRows) {
      for (int64_t j = 0; j < n; j += Stage::kManyRows) {
        dot_tiles<2, false>(
            least(m - i, Stage::kFewRows), least(n - j, Stage::kManyRows), D,
            [&](int64_t r, int64_t d, C(&to)[4]) { read_four(a(i + r) + d, D - d, to); },
            [&](int64_t r, int64_t d, C(&to)[4]) { read_four(b(j + r) + d, D - d, to); },
            [&](int64_t r, int64_t c, C value) { out[(i + r) * ldo + j + c] = value; });
      }
    }
  }

  // gram[i][j] = <x(i), x(j)>, cross[n][i] = <theta0[n], x(i)>, squares[n] = |theta0[n]|^2, from one stack of
  // rows that is read once where it fits the stage.
  template <class F>
  static KERNELMETA_INLINE void stacked(int64_t Q, FeatureRows<F> x, int64_t N, const C* theta0, int64_t D,
                                        C* gram, C* cross, int64_t ld, C* squares) {
    const auto read_row = [=](int64_t i, int64_t d, C(&to)[4]) {
      if (i < Q)
        read_four(x(i) + d, D - d, to);
      else
        read_four(theta0 + (i - Q) * D + d, D - d, to);
    };
    const auto store = [=](int64_t i, int64_t j, C value) {
      if (i < Q && j < Q) {
        gram[i * ld + j] = value;
        gram[j * ld + i] = value;
      } else if (i < Q || j < Q) {
        const int64_t n = (i < Q ? j : i) - Q;
        cross[n * ld + (i < Q ? i : j)] = value;
      } else if (i == j) {
        squares[i - Q] = value;
      }
    };
    const int64_t rows = Q + N;
    if (rows <= Stage::kManyRows)
      few_stacked_dots(rows, D, read_row, store);
    else
      many_stacked_dots(rows, D, read_row, store);
  }

  // First row and column of a tile; with kSelf of the tiles with j <= i, row after row.
  template <bool kSelf>
  static KERNELMETA_INLINE void place(int tile, int across, int& i, int& j) {
    if constexpr (kSelf) {
      i = int((::sqrtf(8.0f * float(tile) + 1.0f) - 1.0f) * 0.5f);
      while (i * (i + 1) / 2 > tile) --i;
      while ((i + 1) * (i + 2) / 2 <= tile) ++i;
      j = tile - i * (i + 1) / 2;
    } else {
      i = tile / across;
      j = tile % across;
    }
  }

 private:
  static KERNELMETA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  template <class Read, class Store>
  static __host__ __device__ KERNELMETA_NOINLINE void few_stacked_dots(int64_t rows, int64_t D, Read read_row,
                                                                       Store store) {
    dot_tiles<Stage::kTileRows, true>(rows, rows, D, read_row, read_row, store);
  }

  template <class Read, class Store>
  static __host__ __device__ KERNELMETA_NOINLINE void many_stacked_dots(int64_t rows, int64_t D,
                                                                        Read read_row, Store store) {
    for (int64_t i = 0; i < rows; i += Stage::kManyRows) {
      const int64_t end = least(i + Stage::kManyRows, rows);
      for (int64_t j = 0; j < end; j += Stage::kFewRows) {
        dot_tiles<2, false>(
            least(end - j, Stage::kFewRows), end - i, D,
            [&](int64_t r, int64_t d, C(&to)[4]) { read_row(j + r, d, to); },
            [&](int64_t r, int64_t d, C(&to)[4]) { read_row(i + r, d, to); },
            [&](int64_t r, int64_t c, C value) {
              if (j + r <= i + c) store(j + r, i + c, value);
            });
      }
    }
  }

  // a(i, d, to) reads four features of row i, from d on. store(i, j, <a(i), b(j)>) for i < m, j < n; with
  // kSelf a and b are the same and only half of the tiles are computed. A thread owns R x kTileRows pairs (i0
  // + r * down, j0 + s * across). Where there are more threads than tiles, groups of threads take turns along
  // D and their sums meet in the stage.
  template <int R, bool kSelf, class A, class B, class Store>
  static KERNELMETA_INLINE void dot_tiles(int64_t m, int64_t n, int64_t D, A a, B b, Store store) {
    constexpr int S = Stage::kTileRows, P = Pack<C>::kSize, kChunk = Stage::kChunk, kStride = Stage::kStride;
    constexpr int kRows = kSelf ? Stage::kManyRows : Stage::kManyRows + Stage::kFewRows;
    constexpr int kQuads = kChunk / 4, kLoads = (kRows * kQuads + kThreads - 1) / kThreads;
    const int down = int((m + R - 1) / R), across = int((n + S - 1) / S);
    const int tiles = kSelf ? down * (down + 1) / 2 : down * across;
    int groups = kThreads / tiles;
    while (groups > 1 && (groups - 1) * tiles * R * S > Stage::kElements) --groups;
    if (groups < 1) groups = 1;
    C* const stage = Team::template stage<C>();
    const int staged = int(kSelf ? m : m + n);
    const int offset = kSelf ? 0 : int(m);  // of b's rows in the stage

    for (int first = 0; first < tiles; first += kThreads) {
      const int thread = Team::thread(), group = thread / tiles, tile = first + thread % tiles;
      const bool works = groups > 1 ? group < groups : first + thread < tiles;
      int i0 = 0, j0 = 0;
      if (groups == 1) {
        place<kSelf>(first + thread, across, i0, j0);
      } else {
        place<kSelf>(tile, across, i0, j0);
      }
      C sum[R][S];
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int s = 0; s < S; ++s) sum[r][s] = C(0);
      }
      C next[kLoads][4];
      const auto fetch = [&](int64_t d0) {
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          const int e = thread + l * kThreads, row = e / kQuads;
          const int64_t d = d0 + e % kQuads * 4;
          if (row >= staged) continue;
          if (kSelf || row < offset)
            a(row, d, next[l]);
          else
            b(row - offset, d, next[l]);
        }
      };
      fetch(0);
      for (int64_t d0 = 0; d0 < D; d0 += kChunk) {
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          const int e = thread + l * kThreads;
          if (e / kQuads >= staged) continue;
          C* to = stage + e / kQuads * kStride + e % kQuads * 4;
#pragma unroll
          for (int pack = 0; pack < 4 / P; ++pack) {
            Pack<C> values;
#pragma unroll
            for (int v = 0; v < P; ++v) values.v[v] = next[l][pack * P + v];
            reinterpret_cast<Pack<C>*>(to)[pack] = values;
          }
        }
        Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
        if (d0 + kChunk < D) fetch(d0 + kChunk);
        if (works) {
#pragma unroll 1
          for (int pack = groups > 1 ? group : 0; pack < kChunk / P; pack += groups) {
            Pack<C> av[R];
#pragma unroll
            for (int r = 0; r < R; ++r) {
              const int row = i0 + r * down < staged - (kSelf ? 0 : int(n)) ? i0 + r * down : i0;
              av[r] = *reinterpret_cast<const Pack<C>*>(stage + row * kStride + pack * P);
            }
#pragma unroll
            for (int s = 0; s < S; ++s) {
              const int row = offset + (j0 + s * across < int(n) ? j0 + s * across : j0);
              const Pack<C> bv = *reinterpret_cast<const Pack<C>*>(stage + row * kStride + pack * P);
#pragma unroll
              for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int l = 0; l < P; ++l) sum[r][s] += av[r].v[l] * bv.v[l];
              }
            }
          }
        }
        Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
      }
      if (groups > 1) {
        if (works && group > 0) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int s = 0; s < S; ++s) {
              stage[(((group - 1) * R + r) * S + s) * tiles + tile] = sum[r][s];
            }
          }
        }
        Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
        if (works && group == 0) {
          for (int g = 0; g < groups - 1; ++g) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
              for (int s = 0; s < S; ++s) sum[r][s] += stage[((g * R + r) * S + s) * tiles + tile];
            }
          }
        }
      }
      if (works && (groups == 1 || group == 0)) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int s = 0; s < S; ++s) {
            if (i0 + r * down < int(m) && j0 + s * across < int(n)) {
              store(i0 + r * down, j0 + s * across, sum[r][s]);
            }
          }
        }
      }
      Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
    }
  }
};

}  // namespace kernelmeta
