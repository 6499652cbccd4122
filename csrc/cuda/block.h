// Block played by a team of threads in warps: a CUDA thread block.
// csrc/cpu/block.h says what the words mean.
//
// A warp takes a row, its lanes the entries of the row. Products run in register tiles: a thread owns the
// sums of R x C pairs whose rows lie apart by the number of tiles, so that neighbouring lanes read
// neighbouring rows of shared memory. All sums are taken in an order that depends on the sizes alone.
//
// Products are functions of their own: inlined, each of their many uses would compete for registers with the
// task around it.
//
// Team gives the threads: kThreads, kLanes (a power of two), thread(), sync(line), any(bool), sync_warp(),
// add_lanes(x), max_lanes(x): the sum over the lanes of the warp (of one number, or of several) and the
// largest, the same bits in each.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/layers.h"
#include "cuda/products.h"
#include "cuda/row.h"
#include "cuda/tensor_dots.h"
#include "engine/problem.h"

namespace kernelmeta {

// C: the precision of the computation. F: how the features are stored. Z: Sizes, or FixedSizes. kFenced:
// words end with a barrier.
template <class Team, class C, class F, class Z, bool kFenced = true>
struct TeamBlock {
  using Scalar = C;
  using Feature = F;
  using Sizes = Z;
  static constexpr int kThreads = Team::kThreads, kLanes = Team::kLanes, kWarps = kThreads / kLanes;
  static constexpr bool kTensorCores = sizeof(C) == 4;  // which multiply features

  static KERNELMETA_INLINE C sqrt(C x) { return ::sqrt(x); }
  static KERNELMETA_INLINE C exp(C x) { return ::exp(x); }
  static KERNELMETA_INLINE C exp_or_zero(C x) { return x < C(sizeof(C) == 4 ? -87 : -708) ? C(0) : ::exp(x); }
  static constexpr bool kJointSteps = false;  // (its registers are full)
  static constexpr double kSmall = 0.3465;    // as on a CPU
  static KERNELMETA_INLINE C exp_small(C x) { return ::exp(x); }
  static KERNELMETA_INLINE C expm1_small(C x) { return ::expm1(x); }
  static KERNELMETA_INLINE C expm1(C x) { return ::expm1(x); }
  static KERNELMETA_INLINE C log(C x) { return ::log(x); }
  static KERNELMETA_INLINE C log1p(C x) { return ::log1p(x); }
  static KERNELMETA_INLINE C pow(C x, C power) { return ::pow(x, power); }
  static KERNELMETA_INLINE C max(C a, C b) { return a < b ? b : a; }
  static KERNELMETA_INLINE C relu(C v) { return v < C(0) ? C(0) : v; }  // keeps NaN
  static KERNELMETA_INLINE C where_positive(C test, C v) { return test <= C(0) ? C(0) : v; }
  static KERNELMETA_INLINE C inverse_std(C squares, int64_t count, double eps) {
    return C(1) / ::sqrt(squares / C(count) + C(eps));
  }

  template <bool kPadded>
  using RowOf = Row<Team, C, kPadded>;

  // This block's words without the barrier at their end, for where the next word touches nothing that this
  // one does.
  KERNELMETA_INLINE TeamBlock<Team, C, F, Z, false> unfenced() const { return {}; }

  template <class Fn>
  KERNELMETA_INLINE void each_item(int64_t n, Fn f, KERNELMETA_CALLER) const {
    KERNELMETA_ROLLED
    for (int64_t i = Team::thread(); i < n; i += kThreads) f(i);
    fence({file, line});
  }
  // f(i) on the warp that takes row i, so that no barrier parts it from words on those rows; every lane takes
  // a row.
  template <class Fn>
  KERNELMETA_INLINE void row_items(int64_t n, Fn f, KERNELMETA_CALLER) const {
    Team::sync_warp();
    KERNELMETA_ROLLED
    for (int i = warp() + lane() * kWarps; i < int(n); i += kThreads) f(int64_t(i));
    Team::sync_warp();
    fence({file, line});
  }
  template <class Fn>
  KERNELMETA_INLINE bool any(int64_t n, Fn f) const {
    bool found = false;
    KERNELMETA_ROLLED
    for (int64_t i = Team::thread(); i < n; i += kThreads) found = found || f(i);
    return Team::any(found);
  }
  template <class Fn>
  KERNELMETA_INLINE void rows(int64_t n, int64_t length, Fn f, KERNELMETA_CALLER) const {
    KERNELMETA_ROLLED
    for (int i = warp(); i < int(n); i += kWarps) f(int64_t(i), RowOf<true>{length});
    fence({file, line});
  }
  template <class Fn>
  KERNELMETA_INLINE void row_steps(int64_t n, int64_t length, int64_t steps, Fn f, KERNELMETA_CALLER) const {
    KERNELMETA_ROLLED
    for (int i = warp(); i < int(n); i += kWarps) {
      KERNELMETA_ROLLED
      for (int64_t k = 0; k < steps; ++k) f(int64_t(i), k, RowOf<true>{length});
    }
    fence({file, line});
  }
  template <class Fn>
  KERNELMETA_INLINE void columns(int64_t length, Fn f, KERNELMETA_CALLER) const {
    KERNELMETA_ROLLED
    for (int i = Team::thread(); i < int(padded(length)); i += kThreads) f(PaddedAt<C>{{i}, i < length});
    fence({file, line});
  }
  template <class Fn>
  KERNELMETA_INLINE void row_sums(int64_t n, int64_t length, C* out, Fn f, KERNELMETA_CALLER) const {
    constexpr int kTogether = 4;
    const RowOf<true> row{length};
    Team::sync_warp();
    KERNELMETA_ROLLED
    for (int first = warp(); first < int(n); first += kTogether * kWarps) {
      C sums[kTogether] = {};
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int64_t i = first + r * kWarps;
        if (i < n) sums[r] = row.lane_sum([&](auto at) { return f(i, at); });
      }
      Team::add_lanes(sums);
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        if (lane() == r && first + r * kWarps < int(n)) out[first + r * kWarps] = sums[r];
      }
    }
    Team::sync_warp();
    fence({file, line});
  }
  template <class Fn>
  KERNELMETA_INLINE void features(int64_t n, int64_t length, Fn f, KERNELMETA_CALLER) const {
    KERNELMETA_ROLLED
    for (int i = warp(); i < int(n); i += kWarps) f(int64_t(i), RowOf<false>{length});
    fence({file, line});
  }
  // The entries of one row of features.
  // ... and of n of them, each by itself.
  template <class Fn>
  KERNELMETA_INLINE void feature_entries(int64_t n, int64_t length, Fn f, KERNELMETA_CALLER) const {
    const int width = int(length);
#pragma unroll 4
    for (int i = Team::thread(); i < int(n) * width; i += kThreads) f(int64_t(i / width), At<C>{i % width});
    fence({file, line});
  }
  template <class Fn>
  KERNELMETA_INLINE void feature_columns(int64_t length, Fn f, KERNELMETA_CALLER) const {
    KERNELMETA_ROLLED
    for (int i = Team::thread(); i < int(length); i += kThreads) f(At<C>{i});
    fence({file, line});
  }
  // Of pieces of an Arena.
  KERNELMETA_INLINE void copy(int64_t n, const C* from, C* to, KERNELMETA_CALLER) const {
    if ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % sizeof(Pack<C>) == 0) {
      const auto* packs = reinterpret_cast<const Pack<C>*>(from);
#pragma unroll 4
      for (int i = Team::thread(); i < int(padded(n)) / Pack<C>::kSize; i += kThreads) {
        reinterpret_cast<Pack<C>*>(to)[i] = packs[i];
      }
    } else {
      for (int i = Team::thread(); i < int(n); i += kThreads) to[i] = from[i];
    }
    fence({file, line});
  }
  KERNELMETA_INLINE void features_zero(int64_t n, int64_t length, C* out, KERNELMETA_CALLER) const {
#pragma unroll 4
    for (int64_t i = Team::thread(); i < n * length; i += kThreads) out[i] = C(0);
    fence({file, line});
  }

  // ---- small matrix times rows

  KERNELMETA_INLINE void mm(int64_t m, int64_t k, int64_t Q, Matrix<C> w, const C* in, int64_t ld, C* out,
                            int64_t ldo, const C* bias, KERNELMETA_CALLER) const {
    Products<Team, C>::template product<false>(m, k, Q, w, in, ld, out, ldo, bias);
    fence({file, line});
  }
  KERNELMETA_INLINE void mm_add(int64_t m, int64_t k, int64_t Q, Matrix<C> w, const C* in, int64_t ld, C* out,
                                int64_t ldo, KERNELMETA_CALLER) const {
    Products<Team, C>::template product<true>(m, k, Q, w, in, ld, out, ldo, nullptr);
    fence({file, line});
  }

  // out[i] += sum_j w(i, j) in(j), over rows of D features; out is [m][D].
  template <class X>
  KERNELMETA_INLINE void features_mm_add(int64_t m, int64_t k, int64_t D, Matrix<C> w, FeatureRows<X> in,
                                         C* out, KERNELMETA_CALLER) const {
    Products<Team, C>::features_mm_add(m, k, D, w, in, out);
    fence({file, line});
  }

  // out[i][j] += sum_q g[i][q] x[j][q]; reads the padding of g and x, which holds zeros.
  KERNELMETA_INLINE void outer(int64_t m, int64_t n, int64_t Q, const C* g, int64_t ldg, const C* x,
                               int64_t ldx, C* out, int64_t ldo, KERNELMETA_CALLER) const {
    Products<Team, C>::outer(m, n, Q, g, ldg, x, ldx, out, ldo);
    fence({file, line});
  }

  // ---- layers of the MLP; see engine/mlp.h. False, and nothing done, where there is no room for one.

  static constexpr bool kHasLayers = true;
  template <class Mlp>
  KERNELMETA_INLINE bool layer(const Mlp& mlp, bool second, const C* in, C* stats, KERNELMETA_CALLER) const {
    if (!Layers<Team, C>::forward(mlp, second, in, stats)) return false;
    fence({file, line});
    return true;
  }
  template <class Mlp>
  KERNELMETA_INLINE bool layer_backward(const Mlp& mlp, bool second, const C* g_out, C* g, C* grad_bias,
                                        KERNELMETA_CALLER) const {
    if (!Layers<Team, C>::backward(mlp, second, g_out, g, grad_bias)) return false;
    fence({file, line});
    return true;
  }

  // ---- dot products over D

  // out[i][j] = <a(i), b(j)>
  template <class X, class Y>
  KERNELMETA_INLINE void dots(int64_t m, FeatureRows<X> a, int64_t n, FeatureRows<Y> b, int64_t D, C* out,
                              int64_t ldo) const {
    if constexpr (kTensorCores && std::is_same_v<X, Y>)
      TensorDots<Team, X>::dots(m, a, n, b, D, out, ldo);
    else
      Dots<Team, C>::dots(m, a, n, b, D, out, ldo);
  }

  // dots of x with itself, computed for half of the pairs.
  KERNELMETA_INLINE void self_dots(int64_t m, FeatureRows<F> x, int64_t D, C* out, int64_t ldo) const {
    Stacked::stacked(m, x, 0, nullptr, D, out, nullptr, ldo, nullptr);
  }

  // gram[i][j] = <x(i), x(j)>, cross[n][i] = <theta0[n], x(i)>, squares[n] = |theta0[n]|^2, from one stack of
  // rows that is read once where it fits the stage.
  KERNELMETA_INLINE void stacked_dots(int64_t Q, FeatureRows<F> x, int64_t N, const C* theta0, int64_t D,
                                      C* gram, C* cross, int64_t ld, C* squares) const {
    Stacked::stacked(Q, x, N, theta0, D, gram, cross, ld, squares);
  }

  static KERNELMETA_INLINE C* stage() { return Team::template stage<C>(); }

  // Features are widened where they are read.
  static KERNELMETA_INLINE C* widening_buffer(Arena<C>&, const Features&, int64_t) { return nullptr; }
  static KERNELMETA_INLINE FeatureRows<F> task_rows(const Features& f, int64_t t, int64_t, C*) {
    return rows_of<F>(f, t);
  }
  static KERNELMETA_INLINE FeatureRows<C> theta0_rows(const Features& f, int64_t t, int64_t, C*) {
    return rows_of<C>(f, t);
  }

 private:
  using Stacked = std::conditional_t<kTensorCores, TensorDots<Team, F>, Dots<Team, C>>;

  static KERNELMETA_INLINE int warp() { return Team::thread() / kLanes; }
  static KERNELMETA_INLINE int lane() { return Team::thread() % kLanes; }
  static KERNELMETA_INLINE void fence(SourceLine line) {
    if constexpr (kFenced) Team::sync(line);
  }
  template <class X>
  static KERNELMETA_INLINE FeatureRows<X> rows_of(const Features& f, int64_t t) {
    const X* data = static_cast<const X*>(f.data);
    if (f.index) return {data, f.row, f.index + t * f.rows};
    return {data + t * f.task, f.row, nullptr};
  }
};

}  // namespace kernelmeta
