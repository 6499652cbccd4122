// Block on a CPU core: one thread plays a whole thread block, a vector register plays its lanes.
//
// The engine (csrc/engine) says what to compute in these words:
//   each_item(n, f)        f(i) for every i
//   rows(n, Q, f)          f(i, row) for every row of a padded array; row.each, row.sum, row.most (the
//                          largest, if it is not NaN; minus infinity of none), row.sums and row.mosts (of
//                          several functions at once), row.one, row.value, row.entry; row.part(first, n): the
//                          same for n entries of the row, from one on; it sees what the row stored before,
//                          and the row what it stored. An entry knows its place: n.is(y, a, b) is a for the
//                          entry y, b for others; n.before(y, a, b) alike
//   row_steps(n, Q, K, f)  f(i, k, row) for every row and, one after the other, for every k; rows look at
//                          nothing that other rows' steps store
//   columns(Q, f)          f(at) for every entry of a row: at walks over the rows of padded arrays by itself
//   row_sums(n, Q, out, f) out[i] = the sum of f(i, at) over row i, for many rows at once; f may store
//   features(n, D, f)      the same for rows of plain, unpadded memory
//   mm, mm_add             small matrix times padded rows
//   outer                  sums over rows of products of two padded arrays: weight gradients
//   dots, self_dots        dot products over D of two sets of feature rows, or of one with itself
//   stacked_dots           of the rows and theta0 with themselves: Gram matrix, rows times theta0, |theta0|^2
//   features_mm_add        small matrix times feature rows
//   any(n, f)              whether f(i) holds for some i
// Each ends with a barrier (nothing to do here); unfenced() gives the same words without it, for where the
// next word touches nothing that this one does. Padded arrays hold anything in their padding as far as mm
// writes them, and zeros where row.each does; sums never look at it.
#pragma once

#include <cmath>

#include "cpu/panels.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"
#include "cpu/widen.h"
#include "engine/several.h"

namespace kernelmeta {
namespace {

// w(i, j) = data[i * row + j * column]
template <class C>
struct Matrix {
  const C* data;
  int64_t row, column;
};

template <class C>
struct CpuBlock {
  using Scalar = C;
  using Feature = C;
  using Sizes = kernelmeta::Sizes;
  using V = typename Simd<C>::V;
  static constexpr int64_t W = kLanes<C>;
  // Whether programs may have joint steps, entropies of means and classifiers by distances.
  static constexpr bool kJointSteps = true;

  static __forceinline__ C sqrt(C x) { return __builtin_sqrt(x); }
  static __forceinline__ C exp(C x) {
    return sizeof(C) == 4 ? C(__builtin_expf(float(x))) : C(__builtin_exp(double(x)));
  }
  static __forceinline__ C log(C x) {
    return sizeof(C) == 4 ? C(__builtin_logf(float(x))) : C(__builtin_log(double(x)));
  }
  static __forceinline__ C expm1(C x) {
    return sizeof(C) == 4 ? C(__builtin_expm1f(float(x))) : C(__builtin_expm1(double(x)));
  }
  static __forceinline__ C log1p(C x) {
    return sizeof(C) == 4 ? C(__builtin_log1pf(float(x))) : C(__builtin_log1p(double(x)));
  }
  static __forceinline__ C max(C a, C b) { return a < b ? b : a; }
  static __forceinline__ V max(V a, V b) { return a < b ? b : a; }
  static __forceinline__ V exp(V v) { return exp_lanes<C>(v); }
  // 0 where e^x would not have all its digits; of x up to 88, or 709.
  static __forceinline__ V exp_or_zero(V v) { return v < kLowestExponent<C> ? V{} : exp_in_range<C>(v); }
  static __forceinline__ C exp_or_zero(C x) { return x < kLowestExponent<C> ? C(0) : exp(x); }
  static constexpr double kSmall = kSmallExponent;
  static __forceinline__ V exp_small(V v) { return kernelmeta::exp_small<C>(v); }
  static __forceinline__ V expm1_small(V v) { return kernelmeta::expm1_small<C>(v); }
  static __forceinline__ V log(V v) {
    for (int64_t i = 0; i < W; ++i)
      v[i] = sizeof(C) == 4 ? C(__builtin_logf(float(v[i]))) : C(__builtin_log(v[i]));
    return v;
  }
  static __forceinline__ V pow(V v, C power) {
    for (int64_t i = 0; i < W; ++i) {
      v[i] = sizeof(C) == 4 ? C(__builtin_powf(float(v[i]), float(power)))
                            : C(__builtin_pow(double(v[i]), double(power)));
    }
    return v;
  }
  // 1 / sqrt(squares / count + eps) in double, whose rounding every row of the unit would share.
  static __forceinline__ C inverse_std(C squares, int64_t count, double eps) {
    return C(1 / __builtin_sqrt(double(squares) / double(count) + eps));
  }
  static __forceinline__ V relu(V v) { return v < V{} ? V{} : v; }  // keeps NaN
  static __forceinline__ V where_positive(V test, V v) { return test <= V{} ? V{} : v; }

  // One vector of a row. kFull: all lanes. kPadded: the memory holds whole vectors, `count` lanes matter.
  // kPartial: only `count` lanes may be touched.
  enum Kind { kFull, kPadded, kPartial };

  template <Kind kind>
  struct At {
    int64_t at, count;

    __forceinline__ V zero() const { return V{}; }
    __forceinline__ V before(int64_t y, V a, V b) const { return lanes_before<C>(y - at) ? a : b; }
    __forceinline__ V is(int64_t y, V a, V b) const {
      const bool here = y >= at && y < at + W;
      return here ? before(y, b, before(y + 1, a, b)) : b;
    }
    __forceinline__ V first(V v) const {
      if constexpr (kind == kFull)
        return v;
      else
        return keep_first<C>(v, count);
    }
    __forceinline__ V first_or(V v, C other) const {
      if constexpr (kind == kFull)
        return v;
      else
        return lanes_before<C>(count) ? v : all_lanes<C>(other);
    }
    __forceinline__ V load(const C* p) const {
      if constexpr (kind == kPartial)
        return load_first(p + at, count);
      else
        return kernelmeta::load(p + at);
    }
    __forceinline__ void store(C* p, V v) const {
      if constexpr (kind == kPartial)
        store_first(p + at, v, count);
      else if constexpr (kind == kPadded)
        kernelmeta::store(p + at, first(v));
      else
        kernelmeta::store(p + at, v);
    }
  };

  template <Kind tail>
  struct Row {
    int64_t length;

    __forceinline__ Row part(int64_t, int64_t count) const { return {count}; }
    __forceinline__ C value(const C* p) const { return *p; }
    __forceinline__ C entry(const C* p, int64_t i) const { return p[i]; }
    template <class F>
    __forceinline__ void each(F f) const {
      int64_t at = 0;
      for (; at + W <= length; at += W) f(At<kFull>{at, W});
      if (at < length) f(At<tail>{at, length - at});
    }
    template <class... F>
    __forceinline__ Several<C, sizeof...(F)> sums(F... f) const {
      V totals[sizeof...(F)] = {};
      each([&](auto at) {
        V* total = totals;
        ((*total++ += at.first(f(at))), ...);
      });
      Several<C, sizeof...(F)> found;
      for (size_t k = 0; k < sizeof...(F); ++k) found.of[k] = sum_lanes<C>(totals[k]);
      return found;
    }
    template <class... F>
    __forceinline__ Several<C, sizeof...(F)> mosts(F... f) const {
      constexpr C kNone = -C(__builtin_inf());
      V largest[sizeof...(F)];
      for (V& none : largest) none = all_lanes<C>(kNone);
      each([&](auto at) {
        V* found = largest;
        ((*found = max(*found, at.first_or(f(at), kNone)), ++found), ...);
      });
      Several<C, sizeof...(F)> found;
      for (size_t k = 0; k < sizeof...(F); ++k) found.of[k] = most_lane<C>(largest[k]);
      return found;
    }
    template <class F>
    __forceinline__ C sum(F f) const {
      return sums(f).of[0];
    }
    template <class F>
    __forceinline__ C most(F f) const {
      return mosts(f).of[0];
    }
    template <class F>
    __forceinline__ void one(F f) const {
      f();
    }
  };

  template <class F>
  __forceinline__ void each_item(int64_t n, F f) const {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) f(i);
  }
  template <class F>
  __forceinline__ void row_items(int64_t n, F f) const {
    each_item(n, f);
  }
  template <class F>
  __forceinline__ void columns(int64_t length, F f) const {
    Row<kPadded>{length}.each(f);
  }
  template <class F>
  __forceinline__ void feature_columns(int64_t length, F f) const {
    Row<kPartial>{length}.each(f);
  }
  // Writes `out` up to padded(n). The lanes of W rows are summed in one tree.
  template <class F>
  __forceinline__ void row_sums(int64_t n, int64_t length, C* out, F f) const {
    for (int64_t i = 0; i < n; i += W) {
      V sums[W];
      for (int64_t r = 0; r < W; ++r) {
        V sum = {};
        if (i + r < n) Row<kPadded>{length}.each([&](auto at) { sum += at.first(f(i + r, at)); });
        sums[r] = sum;
      }
      kernelmeta::store(out + i, sum_each<C>(sums));
    }
  }
  template <class F>
  __forceinline__ void rows(int64_t n, int64_t length, F f) const {
    for (int64_t i = 0; i < n; ++i) f(i, Row<kPadded>{length});
  }
  template <class F>
  __forceinline__ void row_steps(int64_t n, int64_t length, int64_t steps, F f) const {
    for (int64_t k = 0; k < steps; ++k) {
      for (int64_t i = 0; i < n; ++i) f(i, k, Row<kPadded>{length});
    }
  }
  template <class F>
  __forceinline__ void features(int64_t n, int64_t length, F f) const {
    for (int64_t i = 0; i < n; ++i) f(i, Row<kPartial>{length});
  }
  template <class F>
  __forceinline__ void feature_entries(int64_t n, int64_t length, F f) const {
    for (int64_t i = 0; i < n; ++i) Row<kPartial>{length}.each([&](auto at) { f(i, at); });
  }
  template <class F>
  __forceinline__ bool any(int64_t n, F f) const {
    for (int64_t i = 0; i < n; ++i) {
      if (f(i)) return true;
    }
    return false;
  }
  void features_zero(int64_t n, int64_t length, C* out) const { memset(out, 0, sizeof(C) * n * length); }

  // out[i] = (bias[i] or 0) + sum_j w(i, j) in[j] for i < m, j < k, over Q entries of padded rows.
  void mm(int64_t m, int64_t k, int64_t Q, Matrix<C> w, const C* in, int64_t ld, C* out, int64_t ldo,
          const C* bias) const {
    mm_columns<false>(m, k, (Q + W - 1) / W * W, w, FeatureRows<C>{in, ld, nullptr}, out, ldo, bias, false);
  }
  void mm_add(int64_t m, int64_t k, int64_t Q, Matrix<C> w, const C* in, int64_t ld, C* out,
              int64_t ldo) const {
    mm_columns<false>(m, k, (Q + W - 1) / W * W, w, FeatureRows<C>{in, ld, nullptr}, out, ldo, nullptr, true);
  }
  // out[i] += sum_j w(i, j) in(j), over rows of D features; out is [m][D].
  void features_mm_add(int64_t m, int64_t k, int64_t D, Matrix<C> w, FeatureRows<C> in, C* out) const {
    if (D < W) {
      for (int64_t i = 0; i < m; ++i) {
        V sum = load_first(out + i * D, D);
        for (int64_t j = 0; j < k; ++j) sum += load_first(in(j), D) * w.data[i * w.row + j * w.column];
        store_first(out + i * D, sum, D);
      }
    } else {
      mm_columns<true>(m, k, D, w, in, out, D, nullptr, true);
    }
  }

  // out[i][j] += sum_q g[i][q] x[j][q] for i < m, j < n; reads x and writes out up to padded(n).
  //
  // A few columns of x at a time are transposed, so that a vector holds neighbouring j and no lanes are left
  // to be summed.
  void outer(int64_t m, int64_t n, int64_t Q, const C* g, int64_t ldg, const C* x, int64_t ldx, C* out,
             int64_t ldo) const {
    alignas(64) C columns[kOuterDepth * W * kOuterVectors * W];
    for (int64_t j = 0; j < n; j += kOuterVectors * W) {
      const int64_t vectors = (n - j + W - 1) / W < kOuterVectors ? (n - j + W - 1) / W : kOuterVectors;
      for (int64_t first = 0; first < Q; first += kOuterDepth * W) {
        const int64_t count = Q - first < kOuterDepth * W ? Q - first : kOuterDepth * W;
        for (int64_t q = 0; q < count; q += W) {
          for (int64_t v = 0; v < vectors; ++v) {
            const C* from = x + (j + v * W) * ldx + first + q;
            transpose<C>([&](int64_t i) { return kernelmeta::load(from + i * ldx); },
                         columns + (q * kOuterVectors + v) * W, kOuterVectors * W);
          }
        }
        const Strip strip{m, count, g + first, ldg, columns, out + j, ldo};
        if (vectors == kOuterVectors)
          outer_strip<kOuterRows, kOuterVectors>(strip);
        else if (kOuterVectors > 2 && vectors == 2)
          outer_strip<kOuterRows, 2>(strip);
        else
          outer_strip<kOuterTall, 1>(strip);
      }
    }
  }

  // out[i][j] = <a(i), b(j)>
  void dots(int64_t m, FeatureRows<C> a, int64_t n, FeatureRows<C> b, int64_t D, C* out, int64_t ldo) const {
    if (m < n)
      dots_by(m, a, n, b, D, out, ldo, 1);
    else
      dots_by(n, b, m, a, D, out, 1, ldo);
  }

  // dots of a with itself, computed for half of the pairs.
  void self_dots(int64_t m, FeatureRows<C> a, int64_t D, C* out, int64_t ldo) const {
    if constexpr (kHasPanels) {
      Panels<C>::self_dots(m, a, D, out, ldo);
    } else {
      constexpr int R = kDotRows, N = kDotColumns;
      C tile[R * N + W];
      for (int64_t i = 0; i < m; i += R) {
        for (int64_t j = 0; j < m && j < i + R; j += N) {
          dot_tile<R, N>(a, i, m, a, j, m, D, tile);
          for (int64_t r = 0; r < R && i + r < m; ++r) {
            for (int64_t c = 0; c < N && j + c < m; ++c) {
              const C value = tile[r * N + c];
              out[(i + r) * ldo + j + c] = value;
              out[(j + c) * ldo + i + r] = value;
            }
          }
        }
      }
    }
  }

  // gram[i][j] = <x(i), x(j)>, cross[n][i] = <theta0[n], x(i)>, squares[n] = |theta0[n]|^2
  void stacked_dots(int64_t Q, FeatureRows<C> x, int64_t N, const C* theta0, int64_t D, C* gram, C* cross,
                    int64_t ld, C* squares) const {
    self_dots(Q, x, D, gram, ld);
    dots(N, FeatureRows<C>{theta0, D, nullptr}, Q, x, D, cross, ld);
    features(N, D, [&](int64_t n, auto row) {
      const C* t = theta0 + n * D;
      squares[n] = row.sum([&](auto d) { return d.load(t) * d.load(t); });
    });
  }

  static constexpr bool kHasLayers = false;
  const CpuBlock& unfenced() const { return *this; }

  // Features narrower than the computation are copied.
  static __forceinline__ C* widening_buffer(Arena<C>& arena, const Features& f, int64_t D) {
    return widened_rows(arena, f, D);
  }
  static __forceinline__ FeatureRows<C> task_rows(const Features& f, int64_t task, int64_t D, C* buffer) {
    return widen(f, task, D, buffer);
  }
  static __forceinline__ FeatureRows<C> theta0_rows(const Features& f, int64_t task, int64_t D, C* buffer) {
    return widen(f, task, D, buffer);
  }

 private:
  // As many columns at a time as stay in the second-level cache while all rows of w meet them.
  template <bool overlapping>
  void mm_columns(int64_t m, int64_t k, int64_t length, Matrix<C> w, FeatureRows<C> in, C* out, int64_t ldo,
                  const C* bias, bool add) const {
    const int64_t fit = m > kMmRows ? rows_in_cache(k, kMmVectors * W) : length;
    for (int64_t at = 0, count; at < length; at += count) {
      // (The last columns need a whole vector to overlap.)
      count = length - at < fit + W ? length - at : fit;
      mm_rows<overlapping>(m, k, count, w, {in.data + at, in.stride, in.index}, out + at, ldo, bias, add);
    }
  }

  // How many rows of so many numbers lie in the second-level cache beside what meets them, a multiple of
  // `of`.
  static int64_t rows_in_cache(int64_t numbers, int64_t of) {
    const int64_t fit = kCacheBytes / int64_t(sizeof(C)) / (numbers + 1) / of * of;
    return fit < of ? of : fit;
  }

  // Where a row is not a whole number of vectors, the last vector overlaps the one before it (features):
  // it is computed whole and only its new lanes are stored. The tail goes first: it must see `out` as it was.
  template <bool overlapping>
  void mm_rows(int64_t m, int64_t k, int64_t length, Matrix<C> w, FeatureRows<C> in, C* out, int64_t ldo,
               const C* bias, bool add) const {
    const int64_t whole = length / W * W;
    for (int64_t i = 0; i < m;) {
      const int64_t rows = m - i >= kMmRows ? kMmRows : m - i >= 2 ? 2 : 1;
      const Tile t{
          k, {w.data + i * w.row, w.row, w.column}, in, out + i * ldo, ldo, bias ? bias + i : nullptr, add};
      if (rows == kMmRows)
        mm_strip<kMmRows, overlapping>(t, whole, length);
      else if (rows == 2)
        mm_strip<2, overlapping>(t, whole, length);
      else
        mm_strip<1, overlapping>(t, whole, length);
      i += rows;
    }
  }

  struct Tile {
    int64_t k;
    Matrix<C> w;
    FeatureRows<C> in;
    C* out;
    int64_t ldo;
    const C* bias;
    bool add;
  };

  template <int R, bool overlapping>
  static __attribute__((noinline)) void mm_strip(const Tile t, int64_t whole, int64_t length) {
    if (overlapping && whole < length) mm_tile<R, 1, overlapping>(t, length - W, length - whole);
    int64_t at = 0;
    for (; at + kMmVectors * W <= whole; at += kMmVectors * W) mm_tile<R, kMmVectors, overlapping>(t, at, W);
    const int64_t rest = (whole - at) / W;
    if (kMmVectors > 4 && rest == 4)
      mm_tile<R, 4, overlapping>(t, at, W);
    else if (kMmVectors > 3 && rest == 3)
      mm_tile<R, 3, overlapping>(t, at, W);
    else if (kMmVectors > 2 && rest == 2)
      mm_tile<R, 2, overlapping>(t, at, W);
    else if (rest == 1)
      mm_tile<R, 1, overlapping>(t, at, W);
  }

  // R rows by NV vectors from `at` on; of the last vector only the last `count` lanes are stored. ahead: asks
  // for what the next tile reads (feature rows are far apart, where no hardware does).
  template <int R, int NV, bool ahead>
  static __forceinline__ void mm_tile(const Tile& t, int64_t at, int64_t count) {
    V acc[R][NV];
    const Matrix<C> w = t.w;
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < NV; ++v) acc[r][v] = t.bias ? all_lanes<C>(t.bias[r]) : V{};
    }
    for (int64_t j = 0; j < t.k; ++j) {
      const C* x = t.in(j) + at;
      V xv[NV];
      for (int v = 0; v < NV; ++v) xv[v] = kernelmeta::load(x + v * W);
      if constexpr (ahead) {
        for (int v = 0; v < NV; ++v) __builtin_prefetch(x + (NV + v) * W);
      }
      for (int r = 0; r < R; ++r) {
        const V weight = all_lanes<C>(w.data[r * w.row + j * w.column]);
        for (int v = 0; v < NV; ++v) acc[r][v] += weight * xv[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      C* to = t.out + r * t.ldo + at;
      for (int v = 0; v < NV; ++v) {
        const V value = t.add ? kernelmeta::load(to + v * W) + acc[r][v] : acc[r][v];
        if (v < NV - 1 || count == W) {
          kernelmeta::store(to + v * W, value);
        } else {
          for (int64_t l = W - count; l < W; ++l) to[v * W + l] = value[l];
        }
      }
    }
  }

  struct Strip {
    int64_t m, count;
    const C* g;
    int64_t ldg;
    const C* columns;
    C* out;
    int64_t ldo;
  };

  template <int R, int NV>
  static __attribute__((noinline)) void outer_strip(const Strip& t) {
    int64_t i = 0;
    for (; i + R <= t.m; i += R) outer_tile<R, NV>(t, i);
    if constexpr (R > kOuterRows) {
      for (; i + kOuterRows <= t.m; i += kOuterRows) outer_tile<kOuterRows, NV>(t, i);
    }
    for (; i < t.m; ++i) outer_tile<1, NV>(t, i);
  }

  template <int R, int NV>
  static __forceinline__ void outer_tile(const Strip& t, int64_t i) {
    V acc[R][NV];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < NV; ++v) acc[r][v] = kernelmeta::load(t.out + (i + r) * t.ldo + v * W);
    }
    for (int64_t q = 0; q < t.count; ++q) {
      V xv[NV];
      for (int v = 0; v < NV; ++v) xv[v] = kernelmeta::load(t.columns + (q * kOuterVectors + v) * W);
      for (int r = 0; r < R; ++r) {
        const V weight = all_lanes<C>(t.g[(i + r) * t.ldg + q]);
        for (int v = 0; v < NV; ++v) acc[r][v] += weight * xv[v];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < NV; ++v) kernelmeta::store(t.out + (i + r) * t.ldo + v * W, acc[r][v]);
    }
  }

  // out[i row + j column] = <a(i), b(j)>. A few rows of a stay in the first-level cache for all rows of b
  // that lie in the second one.
  void dots_by(int64_t m, FeatureRows<C> a, int64_t n, FeatureRows<C> b, int64_t D, C* out, int64_t row,
               int64_t column) const {
    constexpr int R = kDotRows, N = kDotColumns;
    C tile[R * N + W];
    const int64_t fit = rows_in_cache(D, N);
    for (int64_t first = 0; first < n; first += fit) {
      const int64_t end = n - first < fit ? n : first + fit;
      for (int64_t i = 0; i < m; i += R) {
        for (int64_t j = first; j < end; j += N) {
          dot_tile<R, N>(a, i, m, b, j, n, D, tile);
          for (int64_t r = 0; r < R && i + r < m; ++r) {
            for (int64_t c = 0; c < N && j + c < n; ++c)
              out[(i + r) * row + (j + c) * column] = tile[r * N + c];
          }
        }
      }
    }
  }

  // tile[r][c] = <a(i + r), b(j + c)>; rows beyond m and n repeat the last one. Where j is 0, rows of a are
  // met for the first time: those of the next tile are asked for meanwhile.
  template <int R, int N>
  static __attribute__((noinline)) void dot_tile(FeatureRows<C> a, int64_t i, int64_t m, FeatureRows<C> b,
                                                 int64_t j, int64_t n, int64_t D, C* tile) {
    const C *ar[R], *br[N], *next[R];
    for (int r = 0; r < R; ++r) {
      ar[r] = a(i + r < m ? i + r : m - 1);
      next[r] = a(i + R + r < m ? i + R + r : m - 1);
    }
    for (int c = 0; c < N; ++c) br[c] = b(j + c < n ? j + c : n - 1);
    V acc[R][N] = {};
    const auto step = [&](auto load_a, auto load_b) {
      V bv[N];
      for (int c = 0; c < N; ++c) bv[c] = load_b(br[c]);
      for (int r = 0; r < R; ++r) {
        const V av = load_a(ar[r]);
        for (int c = 0; c < N; ++c) acc[r][c] += av * bv[c];
      }
    };
    int64_t d = 0;
    const auto whole_vectors = [&](auto meanwhile) {
      for (; d + W <= D; d += W) {
        const auto at = [d](const C* p) { return kernelmeta::load(p + d); };
        meanwhile();
        step(at, at);
      }
    };
    if (j == 0) {
      whole_vectors([&] {
        for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + d);
      });
    } else {
      whole_vectors([] {});
    }
    if (d < D && D >= W) {  // the last vector overlaps: its old lanes count as zeros
      const auto at = [D](const C* p) { return kernelmeta::load(p + D - W); };
      const auto masked = [D, d](const C* p) {
        return drop_first<C>(kernelmeta::load(p + D - W), W - (D - d));
      };
      step(masked, at);
    } else if (d < D) {
      const auto at = [D](const C* p) { return load_first(p, D); };
      step(at, at);
    }
#pragma GCC unroll 8
    for (int l = 0; l < R * N; l += W) {
      V each[W];
      for (int i = 0; i < W; ++i) each[i] = l + i < R * N ? acc[(l + i) / N][(l + i) % N] : V{};
      kernelmeta::store(tile + l, sum_each<C>(each));
    }
  }
};

}  // namespace
}  // namespace kernelmeta
