// A layer of the synthetic-gradient MLP in registers: a warp takes up to kRows units, its lanes the query
// rows, so that sums over the rows are sums over lanes, and nothing is written before it is normalised.
#pragma once

#include "cuda/packs.h"
#include "engine/mlp.h"

namespace kernelmeta {

template <class Team, class C>
struct Layers {
  static constexpr int kLanes = Team::kLanes, kWarps = Team::kThreads / kLanes;
  static constexpr int kRows = 3, kColumns = 3;

  using Values = C[kRows][kColumns];

  // Both give false, having done nothing, where there are no registers for as many rows, or something is not
  // in shared memory.
  template <class M>
  static __host__ __device__ KERNELMETA_NOINLINE bool forward(const M& mlp, bool second, const C* from,
                                                              C* stats) {
    const Layer<C> l = mlp.layer_of(second);
    if (l.Q > kColumns * kLanes || !all_shared(l.w, l.bias, from, l.a, l.n, l.istd)) return false;
    const int units = int(l.units), Q = int(l.Q), ld = int(padded(l.Q));
    const C* const w = placed<true>(l.w);
    const C* const in = placed<true>(from);
    C* const to_a = placed<true>(l.a);
    C* const to_n = placed<true>(l.n);
    KERNELMETA_ROLLED
    for (int first = warp(); first < units; first += kRows * kWarps) {
      Values a;
      products(first, units, int(l.inputs), Q, w, int(l.inputs), 1, in, ld, l.bias, a);
      C mean[kRows], istd[kRows];
      if (l.fixed_mean) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int unit = unit_of(first, r, units);
          mean[r] = l.fixed_mean[unit];
          istd[r] = l.fixed_istd[unit];
        }
      } else {
        sums(Q, [&](int r, int c) { return relu(a[r][c]); }, mean);
#pragma unroll
        for (int r = 0; r < kRows; ++r) mean[r] /= C(Q);
        C squares[kRows];
        sums(
            Q,
            [&](int r, int c) {
              const C apart = relu(a[r][c]) - mean[r];
              return apart * apart;
            },
            squares);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          istd[r] = C(1) / ::sqrt(squares[r] / C(Q) + C(kNormEps));
          const int unit = first + r * kWarps;
          if (unit >= units || lane() != r) continue;
          if (l.istd) l.istd[unit] = istd[r];
          if (!stats) continue;
          stats[unit] = mean[r];
          stats[units + unit] = squares[r] / C(Q > 1 ? Q - 1 : 1);
        }
      }
      each(first, units, ld, [&](int r, int c, int at, int q) {
        if (l.a != l.n && q < Q) to_a[at] = a[r][c];
        to_n[at] = q < Q ? (relu(a[r][c]) - mean[r]) * istd[r] : C(0);
      });
    }
    return true;
  }

  template <class M>
  static __host__ __device__ KERNELMETA_NOINLINE bool backward(const M& mlp, bool second, const C* of_out,
                                                               C* of_in, C* grad_bias) {
    const LayerAdjoint<C> l = mlp.adjoint_of(second);
    if (l.Q > kColumns * kLanes || !all_shared(l.w, of_out, l.a, l.n, l.istd, of_in)) return false;
    const C* const w = placed<true>(l.w);
    const C* const g_out = placed<true>(of_out);
    const C* const of_a = placed<true>(l.a);
    const C* const of_n = placed<true>(l.n);
    C* const to_g = placed<true>(of_in);
    const int units = int(l.units), Q = int(l.Q), ld = int(padded(l.Q));
    const C share = l.fixed_istd ? C(0) : C(1) / C(Q);
    const C* scale = l.fixed_istd ? l.fixed_istd : l.istd;
    KERNELMETA_ROLLED
    for (int first = warp(); first < units; first += kRows * kWarps) {
      Values g, n;
      products(first, units, int(l.outputs), Q, w, 1, units, g_out, ld, nullptr, g);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          n[r][c] = of_n[unit_of(first, r, units) * ld + column(c, Q)];
        }
      }
      if (!l.fixed_istd) {
        C along[kRows], across[kRows];
        sums(Q, [&](int r, int c) { return g[r][c] * n[r][c]; }, along);
        sums(Q, [&](int r, int c) { return g[r][c] - n[r][c] * (along[r] * share); }, across);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            g[r][c] = g[r][c] - n[r][c] * (along[r] * share) - across[r] * share;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int unit = unit_of(first, r, units);
        const C of_unit = scale[unit];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          g[r][c] = of_a[unit * ld + column(c, Q)] <= C(0) ? C(0) : g[r][c] * of_unit;
        }
      }
      C passed[kRows];
      sums(Q, [&](int r, int c) { return g[r][c]; }, passed);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int unit = first + r * kWarps;
        if (unit < units && lane() == r) grad_bias[unit] += passed[r];
      }
      Team::sync_warp();
      each(first, units, ld, [&](int r, int c, int at, int q) { to_g[at] = q < Q ? g[r][c] : C(0); });
    }
    return true;
  }

 private:
  static KERNELMETA_INLINE int warp() { return Team::thread() / kLanes; }
  static KERNELMETA_INLINE int lane() { return Team::thread() % kLanes; }
  static KERNELMETA_INLINE C relu(C v) { return v < C(0) ? C(0) : v; }
  static KERNELMETA_INLINE int unit_of(int first, int r, int units) {
    return first + r * kWarps < units ? first + r * kWarps : first;
  }
  static KERNELMETA_INLINE int column(int c, int Q) {
    const int q = lane() + c * kLanes;
    return q < Q ? q : Q - 1;
  }

  // to[r][c] = bias of unit r (or 0) + sum_j w(r, j) in[j][q]; beyond Q the last row again.
  static KERNELMETA_INLINE void products(int first, int units, int inputs, int Q, const C* w, int row,
                                         int step, const C* in, int ld, const C* bias, Values& to) {
    constexpr int P = Pack<C>::kSize;
    const C* weights[kRows];
    const C* columns[kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int unit = unit_of(first, r, units);
      weights[r] = w + unit * row;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) to[r][c] = bias ? bias[unit] : C(0);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) columns[c] = in + column(c, Q);
    int j = 0;
    if (step == 1 && row % P == 0 && reinterpret_cast<uintptr_t>(w) % sizeof(Pack<C>) == 0) {
      KERNELMETA_ROLLED
      for (; j + P <= inputs; j += P) {
        C x[P][kColumns];
#pragma unroll
        for (int l = 0; l < P; ++l) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) x[l][c] = columns[c][(j + l) * ld];
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Pack<C> pack = *reinterpret_cast<const Pack<C>*>(weights[r] + j);
#pragma unroll
          for (int l = 0; l < P; ++l) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) to[r][c] += pack.v[l] * x[l][c];
          }
        }
      }
    }
#pragma unroll 4
    for (; j < inputs; ++j) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const C x = columns[c][j * ld];
#pragma unroll
        for (int r = 0; r < kRows; ++r) to[r][c] += weights[r][j * step] * x;
      }
    }
  }

  // Over the query rows.
  template <class Fn>
  static KERNELMETA_INLINE void sums(int Q, Fn f, C (&to)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      to[r] = C(0);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (lane() + c * kLanes < Q) to[r] += f(r, c);
      }
    }
    Team::add_lanes(to);
  }

  // f(r, c, place in an array [units][ld], query row), padding and all; where the lanes are so few that
  // padding goes beyond their columns, of the last of these.
  template <class Fn>
  static KERNELMETA_INLINE void each(int first, int units, int ld, Fn f) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int unit = first + r * kWarps;
      if (unit >= units) break;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int q = lane() + c * kLanes;
        if (q < ld) f(r, c, unit * ld + q, q);
      }
      if constexpr (kLanes < kAlign) {
        for (int q = lane() + kColumns * kLanes; q < ld; q += kLanes) f(r, kColumns - 1, unit * ld + q, q);
      }
    }
  }
};

}  // namespace kernelmeta
