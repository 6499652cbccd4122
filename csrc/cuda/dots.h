// Dot products of feature rows, in register tiles: of float64, and of features with rows of another type.
#pragma once

#include "cuda/packs.h"
#include "cuda/source_line.h"
#include "engine/feature_rows.h"

namespace kernelmeta {

// Where feature rows meet in dot products: up to kManyRows of them with themselves, or kSomeRows with
// kFewRows others, in chunks of kChunk features; two more come in while one is multiplied. kStride: a row of
// the stage, in elements; an odd number of packs, so that neighbouring rows lie in different banks.
template <class C>
struct Staging {
  static constexpr int kChunk = 128 / int(sizeof(C));
  static constexpr int kStride = kChunk + Pack<C>::kSize;
  static constexpr int kTileRows = 6, kManyRows = 96;
  static constexpr int kFewTile = 2, kSomeTile = 6, kFewRows = 32;
  static constexpr int kSomeRows = (kManyRows - kFewRows) / kSomeTile * kSomeTile;
  static constexpr int kBuffer = kManyRows * kStride, kBuffers = 3, kElements = kBuffers * kBuffer;
  static_assert(kManyRows % kTileRows == 0 && kFewRows % kFewTile == 0);  // whole tiles
};

template <class Team, class C>
struct Dots {
  using Stage = Staging<C>;
  static constexpr int kThreads = Team::kThreads, kLanes = Team::kLanes;

  // out[i][j] = <a(i), b(j)>
  template <class X, class Y>
  static __host__ __device__ KERNELMETA_NOINLINE void dots(int64_t m, FeatureRows<X> a, int64_t n,
                                                           FeatureRows<Y> b, int64_t D, C* out, int64_t ldo) {
    for (int64_t i = 0; i < m; i += Stage::kFewRows) {
      for (int64_t j = 0; j < n; j += Stage::kSomeRows) {
        dot_tiles<Stage::kFewTile, Stage::kSomeTile, false>(
            least(m - i, Stage::kFewRows), least(n - j, Stage::kSomeRows), D,
            [&](int64_t r) { return a(i + r); }, [&](int64_t r) { return b(j + r); },
            [&](int64_t r, int64_t c, C value) { out[(i + r) * ldo + j + c] = value; });
      }
    }
  }

  // gram[i][j] = <x(i), x(j)>, cross[n][i] = <theta0[n], x(i)>, squares[n] = |theta0[n]|^2, from one stack of
  // rows that is read once where it fits the stage.
  static KERNELMETA_INLINE void stacked(int64_t Q, FeatureRows<C> x, int64_t N, const C* theta0, int64_t D,
                                        C* gram, C* cross, int64_t ld, C* squares) {
    const auto row_at = [=](int64_t i) { return i < Q ? x(i) : theta0 + (i - Q) * D; };
    // Of rows i and j, of which the later one says where their product goes.
    const auto store = [=](int i, int j, C value) {
      const int late = i < j ? j : i, early = i < j ? i : j;
      if (late < Q) gram[early * ld + late] = value;
      if (early < Q)
        (late < Q ? gram + late * ld : cross + (late - Q) * ld)[early] = value;
      else if (early == late)
        squares[late - Q] = value;
    };
    const int64_t rows = Q + N;
    if (rows <= Stage::kManyRows)
      few_stacked_dots(rows, D, row_at, store);
    else
      many_stacked_dots(rows, D, row_at, store);
  }

 private:
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

  static KERNELMETA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  template <class Read, class Store>
  static __host__ __device__ KERNELMETA_NOINLINE void few_stacked_dots(int64_t rows, int64_t D, Read row_at,
                                                                       Store store) {
    dot_tiles<Stage::kTileRows, Stage::kTileRows, true>(rows, rows, D, row_at, row_at, store);
  }

  template <class Read, class Store>
  static __host__ __device__ KERNELMETA_NOINLINE void many_stacked_dots(int64_t rows, int64_t D, Read row_at,
                                                                        Store store) {
    for (int64_t i = 0; i < rows; i += Stage::kSomeRows) {
      const int64_t end = least(i + Stage::kSomeRows, rows);
      for (int64_t j = 0; j < end; j += Stage::kFewRows) {
        dot_tiles<Stage::kFewTile, Stage::kSomeTile, false>(
            least(end - j, Stage::kFewRows), end - i, D, [&](int64_t r) { return row_at(j + r); },
            [&](int64_t r) { return row_at(i + r); },
            [&](int64_t r, int64_t c, C value) {
              if (j + r <= i + c) store(j + r, i + c, value);
            });
      }
    }
  }

  // a(i): row i. store(i, j, <a(i), b(j)>) for i < m, j < n; with
  // kSelf a and b are the same and only half of the tiles are computed. R x S pairs (i0 + r * down, j0 + s *
  // across) are a tile; as many neighbouring lanes as there are threads for take turns along D, and their
  // sums meet in shuffles.
  template <int R, int S, bool kSelf, class A, class B, class Store>
  static KERNELMETA_INLINE void dot_tiles(int64_t m, int64_t n, int64_t D, A a, B b, Store store) {
    constexpr int kMost = R * S % 8 == 0 ? 8 : 4, kMore = kMost < kLanes ? kMost : kLanes;
    constexpr int kFew = kSelf ? 4 : kThreads >= 512 ? 2 : 1;
    const int down = int((m + R - 1) / R), across = int((n + S - 1) / S);
    const int tiles = kSelf ? down * (down + 1) / 2 : down * across;
    if (tiles * kMore <= kThreads)
      shared_tiles<R, S, kMore, kSelf>(int(m), int(n), int(D), tiles, a, b, store);
    else
      shared_tiles<R, S, kFew, kSelf>(int(m), int(n), int(D), tiles, a, b, store);
  }

  // kTurns lanes a tile. Where they read a row's packs together no banks collide, and a tile's rows are
  // neighbours; else neighbouring tiles have neighbouring rows.
  template <int R, int S, int kTurns, bool kSelf, class A, class B, class Store>
  static KERNELMETA_INLINE void shared_tiles(int m, int n, int D, int tiles, A a, B b, Store store) {
    constexpr int P = Pack<C>::kSize, kChunk = Stage::kChunk, kStride = Stage::kStride;
    constexpr int kQuads = kChunk / 4, kLoads = (Stage::kManyRows * kQuads + kThreads - 1) / kThreads;
    const int down = (m + R - 1) / R, across = (n + S - 1) / S;
    C* const stage = placed<true>(Team::template stage<C>());
    constexpr bool kNear = kTurns >= 4;
    // The rows of the tiles; those beyond m and n are zeros.
    const int offset = kSelf ? 0 : down * R, staged = offset + across * S;
    const int apart_i = kNear ? 1 : down, apart_j = kNear ? 1 : across;
    const int thread = Team::thread(), turn = thread % kTurns;

    KERNELMETA_ROLLED
    for (int first = 0; first < tiles; first += kThreads / kTurns) {
      const int tile = first + thread / kTurns;
      const bool works = tile < tiles;
      int i0 = 0, j0 = 0;
      place<kSelf>(works ? tile : 0, across, i0, j0);
      if (kNear) {
        i0 *= R;
        j0 *= S;
      }
      const C *const a_rows = stage + i0 * kStride, *const b_rows = stage + (offset + j0) * kStride;
      C sum[R * S];
#pragma unroll
      for (int e = 0; e < R * S; ++e) sum[e] = C(0);
      // What this thread brings: four features of kLoads rows, or nothing (-1).
      int rows[kLoads];
      const void* from[kLoads];
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int e = thread + l * kThreads, row = e / kQuads;
        const bool of_a = kSelf || row < offset, there = of_a ? row < m : row < staged && row - offset < n;
        rows[l] = there ? row : -1;
        from[l] = nullptr;
        if (!there) {
          if (row >= staged) continue;
          C* const four = stage + row * kStride + e % kQuads * 4;
          for (int i = 0; i < Stage::kBuffers; ++i) bring_four<C>(nullptr, 0, four + i * Stage::kBuffer);
        } else if (of_a) {
          from[l] = a(row);
        } else {
          from[l] = b(row - offset);
        }
      }
      const auto fetch = [&](int d0, C* to) {
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          if (rows[l] < 0) continue;
          const int of_row = (thread + l * kThreads) % kQuads * 4, d = d0 + of_row;
          C* const four = to + rows[l] * kStride + of_row;
          if (kSelf || rows[l] < offset)
            bring_four(static_cast<decltype(a(0))>(from[l]) + d, D - d, four);
          else
            bring_four(static_cast<decltype(b(0))>(from[l]) + d, D - d, four);
        }
      };
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
        if (works) {
          KERNELMETA_ROLLED
          for (int pack = turn; pack < kChunk / P; pack += kTurns) {
            Pack<C> av[R];
#pragma unroll
            for (int r = 0; r < R; ++r) {
              av[r] = *reinterpret_cast<const Pack<C>*>(a_rows + buffer + pack * P + r * apart_i * kStride);
            }
#pragma unroll
            for (int s = 0; s < S; ++s) {
              const Pack<C> bv =
                  *reinterpret_cast<const Pack<C>*>(b_rows + buffer + pack * P + s * apart_j * kStride);
#pragma unroll
              for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int l = 0; l < P; ++l) sum[r * S + s] += av[r].v[l] * bv.v[l];
              }
            }
          }
        }
        buffer = buffer == (Stage::kBuffers - 1) * Stage::kBuffer ? 0 : buffer + Stage::kBuffer;
        coming = coming == (Stage::kBuffers - 1) * Stage::kBuffer ? 0 : coming + Stage::kBuffer;
      }
      const int mine = share_out<kTurns, R * S>(sum, turn);
      if (works) {
#pragma unroll
        for (int e = 0; e < R * S / kTurns; ++e) {
          const int i = i0 + (mine + e) / S * apart_i, j = j0 + (mine + e) % S * apart_j;
          if (i < m && j < n && (!kSelf || j <= i)) store(i, j, sum[e]);
        }
      }
      Team::sync(SourceLine{__builtin_FILE(), __builtin_LINE()});
    }
  }

  // Four features, of which `left` are there, into the stage, where they are after the next await_copies.
  template <class X>
  static KERNELMETA_INLINE void bring_four(const X* from, int left, C* to) {
    constexpr int P = Pack<C>::kSize;
    if constexpr (sizeof(X) == sizeof(C)) {
      if (left >= 4 && reinterpret_cast<uintptr_t>(from) % sizeof(Pack<C>) == 0) {
#pragma unroll
        for (int l = 0; l < 4; l += P) Team::copy_pack(from + l, to + l);
        return;
      }
    }
    C four[4];
    read_four(from, left, four);
#pragma unroll
    for (int l = 0; l < 4; l += P) {
      Pack<C> pack;
#pragma unroll
      for (int v = 0; v < P; ++v) pack.v[v] = four[l + v];
      *reinterpret_cast<Pack<C>*>(to + l) = pack;
    }
  }

  // Adds up `values` over kTurns neighbouring lanes, each of which is left with count / kTurns of the sums:
  // those from the index on that is returned.
  template <int kTurns, int count>
  static KERNELMETA_INLINE int share_out(C* values, int turn) {
    if constexpr (kTurns == 1) {
      return 0;
    } else {
      static_assert(count % 2 == 0);
      const bool upper = turn & (kTurns / 2);
#pragma unroll
      for (int e = 0; e < count / 2; ++e) {
        const C kept = upper ? values[e + count / 2] : values[e];
        const C given = upper ? values[e] : values[e + count / 2];
        values[e] = kept + Team::swap_lanes(given, kTurns / 2);
      }
      return (upper ? count / 2 : 0) + share_out<kTurns / 2, count / 2>(values, turn);
    }
  }
};

}  // namespace kernelmeta
