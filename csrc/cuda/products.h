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
  static constexpr int kThreads = Team::kThreads, kLanes = Team::kLanes, kWarps = kThreads / kLanes;

  // out[i] += sum_j w(i, j) in(j), over rows of D features; out is [m][D].
  template <class X>
  static __host__ __device__ KERNELMETA_NOINLINE void features_mm_add(int64_t m, int64_t k, int64_t D,
                                                                      Matrix<C> w, FeatureRows<X> in,
                                                                      C* out) {
    constexpr int R = 5;
    for (int64_t i = 0; i < m; i += R) {
      for (int64_t d = Team::thread(); d < D; d += kThreads) {
        C sum[R];
#pragma unroll
        for (int r = 0; r < R; ++r) sum[r] = C(0);
#pragma unroll 4
        for (int64_t j = 0; j < k; ++j) {
          const C x = widened<X, C>(in(j)[d]);
#pragma unroll
          for (int r = 0; r < R; ++r) sum[r] += w.data[clamp(i + r, m) * w.row + j * w.column] * x;
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (i + r < m) out[(i + r) * D + d] += sum[r];
        }
      }
    }
  }

  // out[i] = sum_j w(i, j) in[j] + bias[i] (or null), over rows of Q entries; with kAdd added to out.
  template <bool kAdd>
  static __host__ __device__ KERNELMETA_NOINLINE void product(int64_t m, int64_t k, int64_t Q, Matrix<C> w,
                                                              const C* in, int64_t ld, C* out, int64_t ldo,
                                                              const C* bias) {
    const int64_t across = (Q + kLanes - 1) / kLanes;
    if (m * across >= 4 * kWarps)
      product_tiles<4, kAdd>(m, k, Q, across, w, in, ld, out, ldo, bias);
    else
      product_tiles<1, kAdd>(m, k, Q, across, w, in, ld, out, ldo, bias);
  }

  // out[i][j] += sum_q g[i][q] x[j][q]; reads the padding of g and x, which holds zeros.
  static KERNELMETA_INLINE void outer(int64_t m, int64_t n, int64_t Q, const C* g, int64_t ldg, const C* x,
                                      int64_t ldx, C* out, int64_t ldo) {
    if (m * n >= 4 * kThreads)
      outer_tiles<4, 2>(m, n, Q, g, ldg, x, ldx, out, ldo);
    else
      outer_tiles<1, 1>(m, n, Q, g, ldg, x, ldx, out, ldo);
  }

 private:
  static KERNELMETA_INLINE int64_t clamp(int64_t i, int64_t m) { return i < m ? i : m - 1; }

  // A warp takes R rows and kLanes entries of each: the weights are the same for all lanes.
  template <int R, bool kAdd>
  static KERNELMETA_INLINE void product_tiles(int64_t m, int64_t k, int64_t Q, int64_t across, Matrix<C> w,
                                              const C* in, int64_t ld, C* out, int64_t ldo, const C* bias) {
    const int64_t tiles = (m + R - 1) / R * across;
    for (int64_t tile = Team::thread() / kLanes; tile < tiles; tile += kWarps) {
      const int64_t i = tile / across * R, q = tile % across * kLanes + Team::thread() % kLanes;
      if (q >= Q) continue;
      C sum[R];
#pragma unroll
      for (int r = 0; r < R; ++r) sum[r] = bias ? bias[clamp(i + r, m)] : C(0);
      weighted_sum<R>(i, m, k, w, in + q, ld, sum);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (i + r < m) {
          C* to = out + (i + r) * ldo + q;
          *to = kAdd ? *to + sum[r] : sum[r];
        }
      }
    }
  }

  // sum[r] += sum_j w(i + r, j) in[j * ld]; weights are read in packs where their layout allows it.
  template <int R>
  static KERNELMETA_INLINE void weighted_sum(int64_t i, int64_t m, int64_t k, Matrix<C> w, const C* in,
                                             int64_t ld, C (&sum)[R]) {
    constexpr int P = Pack<C>::kSize;
    const bool aligned = reinterpret_cast<uintptr_t>(w.data) % 16 == 0;
    int64_t j = 0;
    if (w.column == 1 && w.row % P == 0 && aligned) {
#pragma unroll 2
      for (; j + P <= k; j += P) {
        C x[P];
#pragma unroll
        for (int l = 0; l < P; ++l) x[l] = in[(j + l) * ld];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const Pack<C> weights = *reinterpret_cast<const Pack<C>*>(w.data + clamp(i + r, m) * w.row + j);
#pragma unroll
          for (int l = 0; l < P; ++l) sum[r] += weights.v[l] * x[l];
        }
      }
    } else if (R % P == 0 && w.row == 1 && w.column % P == 0 && aligned) {
      // A pack may reach beyond m, into the padding of the column.
#pragma unroll 2
      for (; j < k; ++j) {
        const C x = in[j * ld];
#pragma unroll
        for (int r = 0; r + P <= R; r += P) {
          const Pack<C> weights = *reinterpret_cast<const Pack<C>*>(w.data + j * w.column + i + r);
#pragma unroll
          for (int l = 0; l < P; ++l) sum[r + l] += weights.v[l] * x;
        }
      }
    }
    for (; j < k; ++j) {
      const C x = in[j * ld];
#pragma unroll
      for (int r = 0; r < R; ++r) sum[r] += w.data[clamp(i + r, m) * w.row + j * w.column] * x;
    }
  }

  // Lanes start at different entries of their rows: the rows' distance, a multiple of 16 elements, would put
  // all of them into two banks.
  template <int R, int S>
  static __host__ __device__ KERNELMETA_NOINLINE void outer_tiles(int64_t m, int64_t n, int64_t Q, const C* g,
                                                                  int64_t ldg, const C* x, int64_t ldx,
                                                                  C* out, int64_t ldo) {
    constexpr int P = Pack<C>::kSize;
    const int64_t down = (m + R - 1) / R, across = (n + S - 1) / S, packs = padded(Q) / P;
    for (int64_t tile = Team::thread(); tile < down * across; tile += kThreads) {
      const int64_t i = tile / across, j = tile % across;
      C sum[R][S];
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int s = 0; s < S; ++s) sum[r][s] = C(0);
      }
      int64_t pack = Team::thread() % kLanes % packs;
      for (int64_t step = 0; step < packs; ++step) {
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
