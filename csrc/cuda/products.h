// Small matrices times rows, in register tiles.
#pragma once

#include "cuda/packs.h"
#include "engine/feature_rows.h"

namespace kernelmeta {

// w(i, j) = data[i * row + j * column]
template <class C>
struct Matrix {
  const C* data;
  int64_t row, column;
};

template <class Team, class C>
struct Products {
  static constexpr int kThreads = Team::kThreads, kLanes = Team::kLanes;

  // out[i] += sum_j w(i, j) in(j), over rows of D features; out is [m][D]. Which thread takes a column
  // depends on m and D alone, so that no barrier need part two of these that add to the same rows.
  template <class X>
  static __host__ __device__ KERNELMETA_NOINLINE void features_mm_add(int64_t m, int64_t k, int64_t D,
                                                                      Matrix<C> w, FeatureRows<X> in,
                                                                      C* out) {
    const bool aligned = in.stride % 2 == 0 && reinterpret_cast<uintptr_t>(in.data) % (2 * sizeof(X)) == 0;
    if (m > 5)
      feature_tiles<15, 1, false>(int(m), int(k), int(D), w, in, out);
    else if (D % 2 != 0)
      feature_tiles<5, 1, false>(int(m), int(k), int(D), w, in, out);
    else if (aligned)
      feature_tiles<5, 2, true>(int(m), int(k), int(D), w, in, out);
    else
      feature_tiles<5, 2, false>(int(m), int(k), int(D), w, in, out);
  }

  // out[i] = sum_j w(i, j) in[j] + bias[i] (or null), over rows of Q entries; with kAdd added to out.
  template <bool kAdd>
  static __host__ __device__ KERNELMETA_NOINLINE void product(int64_t m, int64_t k, int64_t Q, Matrix<C> w,
                                                              const C* in, int64_t ld, C* out, int64_t ldo,
                                                              const C* bias) {
    const bool shared = all_shared(w.data, in, out, bias);
    if (m * Q >= 4 * kThreads) {
      if (shared)
        product_tiles<4, kAdd, true>(int(m), int(k), int(Q), w, in, int(ld), out, int(ldo), bias);
      else
        product_tiles<4, kAdd, false>(int(m), int(k), int(Q), w, in, int(ld), out, int(ldo), bias);
    } else {
      if (shared)
        product_tiles<1, kAdd, true>(int(m), int(k), int(Q), w, in, int(ld), out, int(ldo), bias);
      else
        product_tiles<1, kAdd, false>(int(m), int(k), int(Q), w, in, int(ld), out, int(ldo), bias);
    }
  }

  // out[i][j] += sum_q g[i][q] x[j][q]; reads the padding of g and x, which holds zeros.
  static KERNELMETA_INLINE void outer(int64_t m, int64_t n, int64_t Q, const C* g, int64_t ldg, const C* x,
                                      int64_t ldx, C* out, int64_t ldo) {
    outer_of(int(m), int(n), int(Q), g, int(ldg), x, int(ldx), out, int(ldo));
  }

 private:
  static KERNELMETA_INLINE int clamp(int i, int m) { return i < m ? i : m - 1; }

  // A thread takes V neighbouring features of R rows, kDeep rows of `in` at a time, whose loads overlap.
  // kAligned: V features of `in` are loaded at once.
  template <int R, int V, bool kAligned, class X>
  static KERNELMETA_INLINE void feature_tiles(int m, int k, int D, Matrix<C> w, FeatureRows<X> in, C* out) {
    constexpr int kDeep = R > 5 ? 4 : 8, P = Pack<C>::kSize;
    struct alignas((kAligned ? V : 1) * sizeof(X)) Some {
      X v[V];
    };
    const int row = int(w.row), column = int(w.column);
    const bool packed =
        column == 1 && row % P == 0 && reinterpret_cast<uintptr_t>(w.data) % sizeof(Pack<C>) == 0;
    KERNELMETA_ROLLED
    for (int i = 0; i < m; i += R) {
      KERNELMETA_ROLLED
      for (int d = Team::thread() * V; d < D; d += kThreads * V) {
        C sum[R][V] = {};
        KERNELMETA_ROLLED
        for (int j = 0; j < k; j += kDeep) {
          Some x[kDeep];
#pragma unroll
          for (int l = 0; l < kDeep; ++l) {  // beyond k the last row again, times zero
            x[l] = *reinterpret_cast<const Some*>(in(j + l < k ? j + l : k - 1) + d);
          }
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const C* const weights = w.data + clamp(i + r, m) * row;
            C of_row[kDeep];
            if (packed) {  // up to the padding of the row
#pragma unroll
              for (int l = 0; l < kDeep; l += P) {
                const Pack<C> pack =
                    j + l < k ? *reinterpret_cast<const Pack<C>*>(weights + j + l) : Pack<C>{};
#pragma unroll
                for (int p = 0; p < P; ++p) of_row[l + p] = j + l + p < k ? pack.v[p] : C(0);
              }
            } else {
#pragma unroll
              for (int l = 0; l < kDeep; ++l) of_row[l] = j + l < k ? weights[(j + l) * column] : C(0);
            }
#pragma unroll
            for (int l = 0; l < kDeep; ++l) {
#pragma unroll
              for (int v = 0; v < V; ++v) sum[r][v] += of_row[l] * widened<X, C>(x[l].v[v]);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (i + r >= m) break;
#pragma unroll
          for (int v = 0; v < V; ++v) out[(i + r) * int64_t(D) + d + v] += sum[r][v];
        }
      }
    }
  }

  // A thread takes R rows and two neighbouring entries of each; `in` and `out` may be read and written up to
  // their padding, which is left alone.
  template <int R, bool kAdd, bool kShared>
  static KERNELMETA_INLINE void product_tiles(int m, int k, int Q, Matrix<C> w, const C* in, int ld, C* out,
                                              int ldo, const C* bias) {
    w.data = placed<kShared>(w.data);
    in = placed<kShared>(in);
    out = placed<kShared>(out);
    const int across = (Q + 1) / 2, tiles = (m + R - 1) / R * across;
    KERNELMETA_ROLLED
    for (int tile = Team::thread(); tile < tiles; tile += kThreads) {
      const int i = tile / across * R, q = tile % across * 2;
      C sum[R][2];
#pragma unroll
      for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = bias ? bias[clamp(i + r, m)] : C(0);
      weighted_sum<R>(i, m, k, w, in + q, ld, sum);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (i + r >= m) break;
        C* to = out + (i + r) * ldo + q;
        to[0] = kAdd ? to[0] + sum[r][0] : sum[r][0];
        if (q + 1 < Q) to[1] = kAdd ? to[1] + sum[r][1] : sum[r][1];
      }
    }
  }

  // sum[r] += sum_j w(i + r, j) in[j * ld]; weights are read in packs where their layout allows it.
  template <int R>
  static KERNELMETA_INLINE void weighted_sum(int i, int m, int k, Matrix<C> w, const C* in, int ld,
                                             C (&sum)[R][2]) {
    constexpr int P = Pack<C>::kSize;
    struct alignas(2 * sizeof(C)) Two {
      C v[2];
    };
    const auto entries = [&](int j) { return *reinterpret_cast<const Two*>(in + j * ld); };
    const bool aligned = reinterpret_cast<uintptr_t>(w.data) % 16 == 0;
    int j = 0;
    if (w.column == 1 && w.row % P == 0 && aligned) {
      const C* rows[R];
#pragma unroll
      for (int r = 0; r < R; ++r) rows[r] = w.data + clamp(i + r, m) * int(w.row);
#pragma unroll 2
      for (; j + P <= k; j += P) {
        Two x[P];
#pragma unroll
        for (int l = 0; l < P; ++l) x[l] = entries(j + l);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const Pack<C> weights = *reinterpret_cast<const Pack<C>*>(rows[r] + j);
#pragma unroll
          for (int l = 0; l < P; ++l) {
            sum[r][0] += weights.v[l] * x[l].v[0];
            sum[r][1] += weights.v[l] * x[l].v[1];
          }
        }
      }
    } else if (R % P == 0 && w.row == 1 && w.column % P == 0 && aligned) {
      // A pack may reach beyond m, into the padding of the column.
#pragma unroll 4
      for (; j < k; ++j) {
        const Two x = entries(j);
#pragma unroll
        for (int r = 0; r + P <= R; r += P) {
          const Pack<C> weights = *reinterpret_cast<const Pack<C>*>(w.data + j * int(w.column) + i + r);
#pragma unroll
          for (int l = 0; l < P; ++l) {
            sum[r + l][0] += weights.v[l] * x.v[0];
            sum[r + l][1] += weights.v[l] * x.v[1];
          }
        }
      }
    }
    const int row = int(w.row), column = int(w.column);
#pragma unroll 4
    for (; j < k; ++j) {
      const Two x = entries(j);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const C weight = w.data[clamp(i + r, m) * row + j * column];
        sum[r][0] += weight * x.v[0];
        sum[r][1] += weight * x.v[1];
      }
    }
  }

  static __host__ __device__ KERNELMETA_NOINLINE void outer_of(int m, int n, int Q, const C* g, int ldg,
                                                               const C* x, int ldx, C* out, int ldo) {
    const bool shared = all_shared(g, x, out);
    if (m * n >= 2 * kThreads) {
      if (shared)
        outer_tiles<2, 2, true>(m, n, Q, g, ldg, x, ldx, out, ldo);
      else
        outer_tiles<2, 2, false>(m, n, Q, g, ldg, x, ldx, out, ldo);
    } else {
      if (shared)
        outer_tiles<1, 1, true>(m, n, Q, g, ldg, x, ldx, out, ldo);
      else
        outer_tiles<1, 1, false>(m, n, Q, g, ldg, x, ldx, out, ldo);
    }
  }

  // Lanes start at different entries of their rows: the rows' distance, a multiple of 16 elements, would put
  // all of them into two banks.
  template <int R, int S, bool kShared>
  static KERNELMETA_INLINE void outer_tiles(int m, int n, int Q, const C* g, int ldg, const C* x, int ldx,
                                            C* out, int ldo) {
    g = placed<kShared>(g);
    x = placed<kShared>(x);
    out = placed<kShared>(out);
    constexpr int P = Pack<C>::kSize;
    const int down = (m + R - 1) / R, across = (n + S - 1) / S, packs = int(padded(Q)) / P;
    KERNELMETA_ROLLED
    for (int tile = Team::thread(); tile < down * across; tile += kThreads) {
      const int i = tile / across, j = tile % across;
      C sum[R][S];
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int s = 0; s < S; ++s) sum[r][s] = C(0);
      }
      int pack = Team::thread() % kLanes % packs;
#pragma unroll 2
      for (int step = 0; step < packs; ++step) {
        Pack<C> gv[R], xv[S];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          gv[r] = *reinterpret_cast<const Pack<C>*>(g + clamp(i + r * down, m) * ldg + pack * P);
        }
#pragma unroll
        for (int s = 0; s < S; ++s) {
          xv[s] = *reinterpret_cast<const Pack<C>*>(x + clamp(j + s * across, n) * ldx + pack * P);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int s = 0; s < S; ++s) {
#pragma unroll
            for (int l = 0; l < P; ++l) sum[r][s] += gv[r].v[l] * xv[s].v[l];
          }
        }
        pack = pack + 1 == packs ? 0 : pack + 1;
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int s = 0; s < S; ++s) {
          if (i + r * down < m && j + s * across < n) out[(i + r * down) * ldo + j + s * across] += sum[r][s];
        }
      }
    }
  }
};

}  // namespace kernelmeta
