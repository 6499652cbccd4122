// Block played by a team of threads in warps: a CUDA thread block, or host threads in the tests.
// csrc/cpu/block.h says what the words mean.
//
// A warp takes a row, its lanes the entries of the row. Products run in register tiles: a thread owns the
// sums of R x C pairs whose rows lie apart by the number of tiles, so that neighbouring lanes read
// neighbouring rows of shared memory. All sums are taken in an order that depends on the sizes alone.
//
// Products are functions of their own: inlined, each of their many uses would compete for registers with the
// task around it.
//
// Team gives the threads: kThreads, kLanes (a power of two), thread(), sync(spot), any(bool), sync_warp(),
// add_lanes(x): the sum over the lanes of the warp, the same bits in each.
#pragma once

#include <cmath>

#include "engine/problem.h"

namespace kernelmeta {

// Where in the source a barrier stands: tests take barriers away, one at a time.
struct Spot {
  const char* file;
  int line;
};
// Parameters that say where a function is called. (As one parameter of type Spot they would say where the
// default argument stands.)
#define KERNELMETA_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

// w(i, j) = data[i * row + j * column]
template <class C>
struct Matrix {
  const C* data;
  int64_t row, column;
};

// 16 bytes, read at once.
template <class C>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / int(sizeof(C));
  C v[kSize];
};

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

template <class Storage_, class C>
__host__ __device__ __forceinline__ C widened(Storage_ x) {
  return C(float(x));
}
template <>
__host__ __device__ __forceinline__ float widened<float, float>(float x) {
  return x;
}
template <>
__host__ __device__ __forceinline__ double widened<double, double>(double x) {
  return x;
}

// C: the precision of the computation. F: how the features are stored. Z: Sizes, or FixedSizes. kFenced:
// words end with a barrier.
template <class Team, class C, class F, class Z, bool kFenced = true>
struct TeamBlock {
  using Scalar = C;
  using Feature = F;
  using Sizes = Z;
  using Stage = Staging<C>;
  static constexpr int kThreads = Team::kThreads, kLanes = Team::kLanes, kWarps = kThreads / kLanes;

  static __host__ __device__ __forceinline__ C sqrt(C x) { return ::sqrt(x); }
  static __host__ __device__ __forceinline__ C exp(C x) { return ::exp(x); }
  static __host__ __device__ __forceinline__ C log(C x) { return ::log(x); }
  static __host__ __device__ __forceinline__ C max(C a, C b) { return a < b ? b : a; }
  static __host__ __device__ __forceinline__ C relu(C v) { return v < C(0) ? C(0) : v; }  // keeps NaN
  static __host__ __device__ __forceinline__ C where_positive(C test, C v) { return test <= C(0) ? C(0) : v; }
  static __host__ __device__ __forceinline__ C inverse_std(C squares, int64_t count, double eps) {
    return C(1) / ::sqrt(squares / C(count) + C(eps));
  }

  // One entry of a row. kPadded: `inside` says whether it is an entry or padding, which is stored as zero.
  struct At {
    int64_t at;
    __host__ __device__ __forceinline__ C zero() const { return C(0); }
    template <class X>
    __host__ __device__ __forceinline__ C load(const X* p) const {
      return widened<X, C>(p[at]);
    }
    __host__ __device__ __forceinline__ void store(C* p, C v) const { p[at] = v; }
  };
  struct PaddedAt : At {
    bool inside;
    __host__ __device__ __forceinline__ void store(C* p, C v) const { p[this->at] = inside ? v : C(0); }
  };

  template <bool kPadded>
  struct Row {
    int64_t length;
    int lane = Team::thread() % kLanes;  // the first entry of this thread

    // Its entry i is the row's entry first + i, and the same lane's.
    __host__ __device__ __forceinline__ Row part(int64_t first, int64_t count) const {
      return {count, int((lane + kLanes - first % kLanes) % kLanes)};
    }
    __host__ __device__ __forceinline__ auto at(int64_t i) const {
      if constexpr (kPadded)
        return PaddedAt{{i}, i < length};
      else
        return At{i};
    }
    template <class Fn>
    __host__ __device__ __forceinline__ void each(Fn f) const {
      const int64_t end = kPadded ? padded(length) : length;
      for (int64_t i = lane; i < end; i += kLanes) f(at(i));
    }
    template <class Fn>
    __host__ __device__ __forceinline__ auto sum(Fn f) const {
      decltype(f(at(0))) total = 0;
      const int64_t end = kPadded ? padded(length) : length;
      for (int64_t i = lane; i < end; i += kLanes) {
        const auto value = f(at(i));
        if (i < length) total += value;
      }
      return Team::add_lanes(total);
    }
    // to[j] = sum over i < n of f(i, j)
    template <class Fn>
    __host__ __device__ __forceinline__ void column_sums(int64_t n, Fn f, C* to) const {
      each([&](auto j) {
        C sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += f(i, j);
        j.store(to, sum);
      });
    }
    // What some lane stored before; it may be stored anew after it.
    __host__ __device__ __forceinline__ C value(const C* p) const {
      Team::sync_warp();
      const C found = *p;
      Team::sync_warp();
      return found;
    }
    // What the other lanes read before and after it stays apart from what it writes.
    template <class Fn>
    __host__ __device__ __forceinline__ void one(Fn f) const {
      Team::sync_warp();
      if (Team::thread() % kLanes == 0) f();
      Team::sync_warp();
    }
  };

  // This block's words without the barrier at their end, for where the next word touches nothing that this
  // one does.
  __host__ __device__ __forceinline__ TeamBlock<Team, C, F, Z, false> unfenced() const { return {}; }

  template <class Fn>
  __host__ __device__ __forceinline__ void each_item(int64_t n, Fn f, KERNELMETA_CALLER) const {
    for (int64_t i = Team::thread(); i < n; i += kThreads) f(i);
    fence({file, line});
  }
  template <class Fn>
  __host__ __device__ __forceinline__ bool any(int64_t n, Fn f) const {
    bool found = false;
    for (int64_t i = Team::thread(); i < n; i += kThreads) found = found || f(i);
    return Team::any(found);
  }
  template <class Fn>
  __host__ __device__ __forceinline__ void rows(int64_t n, int64_t length, Fn f, KERNELMETA_CALLER) const {
    for (int64_t i = Team::thread() / kLanes; i < n; i += kWarps) f(i, Row<true>{length});
    fence({file, line});
  }
  template <class Fn>
  __host__ __device__ __forceinline__ void row_steps(int64_t n, int64_t length, int64_t steps, Fn f,
                                                     KERNELMETA_CALLER) const {
    for (int64_t i = Team::thread() / kLanes; i < n; i += kWarps) {
      for (int64_t k = 0; k < steps; ++k) f(i, k, Row<true>{length});
    }
    fence({file, line});
  }
  template <class Fn>
  __host__ __device__ __forceinline__ void columns(int64_t length, Fn f, KERNELMETA_CALLER) const {
    for (int64_t i = Team::thread(); i < padded(length); i += kThreads) f(PaddedAt{{i}, i < length});
    fence({file, line});
  }
  template <class Fn>
  __host__ __device__ __forceinline__ void row_sums(int64_t n, int64_t length, C* out, Fn f,
                                                    KERNELMETA_CALLER) const {
    for (int64_t i = Team::thread() / kLanes; i < n; i += kWarps) {
      const Row<true> row{length};
      const C sum = row.sum([&](auto at) { return f(i, at); });
      row.one([&] { out[i] = sum; });
    }
    fence({file, line});
  }
  template <class Fn>
  __host__ __device__ __forceinline__ void features(int64_t n, int64_t length, Fn f,
                                                    KERNELMETA_CALLER) const {
    for (int64_t i = Team::thread() / kLanes; i < n; i += kWarps) f(i, Row<false>{length});
    fence({file, line});
  }
  __host__ __device__ __forceinline__ void features_zero(int64_t n, int64_t length, C* out,
                                                         KERNELMETA_CALLER) const {
    for (int64_t i = Team::thread(); i < n * length; i += kThreads) out[i] = C(0);
    fence({file, line});
  }

  // ---- small matrix times rows

  __host__ __device__ __forceinline__ void mm(int64_t m, int64_t k, int64_t Q, Matrix<C> w, const C* in,
                                              int64_t ld, C* out, int64_t ldo, const C* bias,
                                              KERNELMETA_CALLER) const {
    product<false>(m, k, Q, w, in, ld, out, ldo, bias);
    fence({file, line});
  }
  __host__ __device__ __forceinline__ void mm_add(int64_t m, int64_t k, int64_t Q, Matrix<C> w, const C* in,
                                                  int64_t ld, C* out, int64_t ldo, KERNELMETA_CALLER) const {
    product<true>(m, k, Q, w, in, ld, out, ldo, nullptr);
    fence({file, line});
  }

  // out[i] += sum_j w(i, j) in(j), over rows of D features; out is [m][D].
  template <class X>
  __host__ __device__ KERNELMETA_NOINLINE void features_mm_add(int64_t m, int64_t k, int64_t D, Matrix<C> w,
                                                               Rows<X> in, C* out, KERNELMETA_CALLER) const {
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
    fence({file, line});
  }

  // out[i][j] += sum_q g[i][q] x[j][q]; reads the padding of g and x, which holds zeros.
  __host__ __device__ __forceinline__ void outer(int64_t m, int64_t n, int64_t Q, const C* g, int64_t ldg,
                                                 const C* x, int64_t ldx, C* out, int64_t ldo,
                                                 KERNELMETA_CALLER) const {
    if (m * n >= 4 * kThreads)
      outer_tiles<4, 2>(m, n, Q, g, ldg, x, ldx, out, ldo);
    else
      outer_tiles<1, 1>(m, n, Q, g, ldg, x, ldx, out, ldo);
    fence({file, line});
  }

  // ---- dot products over D

  // out[i][j] = <a(i), b(j)>
  template <class X, class Y>
  __host__ __device__ KERNELMETA_NOINLINE void dots(int64_t m, Rows<X> a, int64_t n, Rows<Y> b, int64_t D,
                                                    C* out, int64_t ldo) const {
    for (int64_t i = 0; i < m; i += Stage::kFewRows) {
      for (int64_t j = 0; j < n; j += Stage::kManyRows) {
        dot_tiles<2, false>(
            least(m - i, Stage::kFewRows), least(n - j, Stage::kManyRows), D,
            [&](int64_t r, int64_t d, C(&to)[4]) { read(a(i + r) + d, D - d, to); },
            [&](int64_t r, int64_t d, C(&to)[4]) { read(b(j + r) + d, D - d, to); },
            [&](int64_t r, int64_t c, C value) { out[(i + r) * ldo + j + c] = value; });
      }
    }
  }

  // dots of x with itself, computed for half of the pairs.
  __host__ __device__ __forceinline__ void self_dots(int64_t m, Rows<F> x, int64_t D, C* out,
                                                     int64_t ldo) const {
    stacked_dots(m, x, 0, nullptr, D, out, nullptr, ldo, nullptr);
  }

  // gram[i][j] = <x(i), x(j)>, cross[n][i] = <theta0[n], x(i)>, squares[n] = |theta0[n]|^2, from one stack of
  // rows that is read once where it fits the stage.
  __host__ __device__ __forceinline__ void stacked_dots(int64_t Q, Rows<F> x, int64_t N, const C* theta0,
                                                        int64_t D, C* gram, C* cross, int64_t ld,
                                                        C* squares) const {
    const auto read_row = [=](int64_t i, int64_t d, C(&to)[4]) {
      if (i < Q)
        read(x(i) + d, D - d, to);
      else
        read(theta0 + (i - Q) * D + d, D - d, to);
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

  static __host__ __device__ __forceinline__ C* stage() { return Team::template stage<C>(); }

  // Features are widened where they are read.
  static __host__ __device__ __forceinline__ C* widening_buffer(Arena<C>&, const Features&, int64_t) {
    return nullptr;
  }
  static __host__ __device__ __forceinline__ Rows<F> task_rows(const Features& f, int64_t t, int64_t, C*) {
    return rows_of<F>(f, t);
  }
  static __host__ __device__ __forceinline__ Rows<C> theta0_rows(const Features& f, int64_t t, int64_t, C*) {
    return rows_of<C>(f, t);
  }

 private:
  static __host__ __device__ __forceinline__ void fence(Spot spot) {
    if constexpr (kFenced) Team::sync(spot);
  }
  static __host__ __device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  static __host__ __device__ __forceinline__ int64_t clamp(int64_t i, int64_t m) { return i < m ? i : m - 1; }

  template <class X>
  static __host__ __device__ __forceinline__ Rows<X> rows_of(const Features& f, int64_t t) {
    const X* data = static_cast<const X*>(f.data);
    if (f.index) return {data, f.row, f.index + t * f.rows};
    return {data + t * f.task, f.row, nullptr};
  }

  template <bool kAdd>
  __host__ __device__ KERNELMETA_NOINLINE void product(int64_t m, int64_t k, int64_t Q, Matrix<C> w,
                                                       const C* in, int64_t ld, C* out, int64_t ldo,
                                                       const C* bias) const {
    const int64_t across = (Q + kLanes - 1) / kLanes;
    if (m * across >= 4 * kWarps)
      product_tiles<4, kAdd>(m, k, Q, across, w, in, ld, out, ldo, bias);
    else
      product_tiles<1, kAdd>(m, k, Q, across, w, in, ld, out, ldo, bias);
  }

  // A warp takes R rows and kLanes entries of each: the weights are the same for all lanes.
  template <int R, bool kAdd>
  __host__ __device__ __forceinline__ void product_tiles(int64_t m, int64_t k, int64_t Q, int64_t across,
                                                         Matrix<C> w, const C* in, int64_t ld, C* out,
                                                         int64_t ldo, const C* bias) const {
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
  __host__ __device__ __forceinline__ void weighted_sum(int64_t i, int64_t m, int64_t k, Matrix<C> w,
                                                        const C* in, int64_t ld, C (&sum)[R]) const {
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
  __host__ __device__ KERNELMETA_NOINLINE void outer_tiles(int64_t m, int64_t n, int64_t Q, const C* g,
                                                           int64_t ldg, const C* x, int64_t ldx, C* out,
                                                           int64_t ldo) const {
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

  template <class Read, class Store>
  static __host__ __device__ KERNELMETA_NOINLINE void few_stacked_dots(int64_t rows, int64_t D, Read read_row,
                                                                       Store store) {
    TeamBlock().template dot_tiles<Stage::kTileRows, true>(rows, rows, D, read_row, read_row, store);
  }

  template <class Read, class Store>
  static __host__ __device__ KERNELMETA_NOINLINE void many_stacked_dots(int64_t rows, int64_t D,
                                                                        Read read_row, Store store) {
    for (int64_t i = 0; i < rows; i += Stage::kManyRows) {
      const int64_t end = least(i + Stage::kManyRows, rows);
      for (int64_t j = 0; j < end; j += Stage::kFewRows) {
        TeamBlock().template dot_tiles<2, false>(
            least(end - j, Stage::kFewRows), end - i, D,
            [&](int64_t r, int64_t d, C(&to)[4]) { read_row(j + r, d, to); },
            [&](int64_t r, int64_t d, C(&to)[4]) { read_row(i + r, d, to); },
            [&](int64_t r, int64_t c, C value) {
              if (j + r <= i + c) store(j + r, i + c, value);
            });
      }
    }
  }

  // Four features, of which `left` are there, widened; the others are zero.
  template <class X>
  static __host__ __device__ __forceinline__ void read(const X* from, int64_t left, C (&to)[4]) {
    struct alignas(4 * sizeof(X)) Four {
      X v[4];
    };
    if (left >= 4 && reinterpret_cast<uintptr_t>(from) % sizeof(Four) == 0) {
      const Four four = *reinterpret_cast<const Four*>(from);
#pragma unroll
      for (int l = 0; l < 4; ++l) to[l] = widened<X, C>(four.v[l]);
    } else {
#pragma unroll
      for (int l = 0; l < 4; ++l) to[l] = l < left ? widened<X, C>(from[l]) : C(0);
    }
  }

  // a(i, d, to) reads four features of row i, from d on. store(i, j, <a(i), b(j)>) for i < m, j < n; with
  // kSelf a and b are the same and only half of the tiles are computed. A thread owns R x kTileRows pairs (i0
  // + r * down, j0 + s * across). Where there are more threads than tiles, groups of threads take turns along
  // D and their sums meet in the stage.
  template <int R, bool kSelf, class A, class B, class Store>
  __host__ __device__ __forceinline__ void dot_tiles(int64_t m, int64_t n, int64_t D, A a, B b,
                                                     Store store) const {
    constexpr int S = Stage::kTileRows, P = Pack<C>::kSize, kChunk = Stage::kChunk, kStride = Stage::kStride;
    constexpr int kRows = kSelf ? Stage::kManyRows : Stage::kManyRows + Stage::kFewRows;
    constexpr int kQuads = kChunk / 4, kLoads = (kRows * kQuads + kThreads - 1) / kThreads;
    const int down = int((m + R - 1) / R), across = int((n + S - 1) / S);
    const int tiles = kSelf ? down * (down + 1) / 2 : down * across;
    int groups = kThreads / tiles;
    while (groups > 1 && (groups - 1) * tiles * R * S > Stage::kElements) --groups;
    if (groups < 1) groups = 1;
    C* const stage = TeamBlock::stage();
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
        Team::sync(Spot{__builtin_FILE(), __builtin_LINE()});
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
        Team::sync(Spot{__builtin_FILE(), __builtin_LINE()});
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
        Team::sync(Spot{__builtin_FILE(), __builtin_LINE()});
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
      Team::sync(Spot{__builtin_FILE(), __builtin_LINE()});
    }
  }

  // First row and column of a tile; with kSelf of the tiles with j <= i, row after row.
  template <bool kSelf>
  static __host__ __device__ __forceinline__ void place(int tile, int across, int& i, int& j) {
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
};

}  // namespace kernelmeta
