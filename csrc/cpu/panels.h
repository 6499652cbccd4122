// The Gram matrix of feature rows by panels: a few columns of it at a time.
//
// Rows that are multiplied with each other lane by lane leave lanes to be summed for every pair, which costs
// as much as the products where there are few features, and with 16 registers a tile of rows asks for nearly
// as many loads as it does multiplications. Here the rows of one panel are transposed, so that a vector holds
// one feature of neighbouring rows, and meet one feature of a row at a time: no lanes are left over, and the
// panel stays in the first-level cache for all rows.
#pragma once

#include "cpu/tiles.h"
#include "engine/feature_rows.h"

namespace kernelmeta {
namespace {

template <class C>
class Panels {
  using V = typename Simd<C>::V;
  static constexpr int64_t W = kLanes<C>, kColumns = kPanelVectors * W, kLine = 64 / sizeof(C);

 public:
  // out[i][j] = <a(i), a(j)>
  static void self_dots(int64_t m, FeatureRows<C> a, int64_t D, C* out, int64_t ldo) {
    alignas(64) C panel[kPanelDepth * kColumns];
    for (int64_t column = 0; column < m; column += kColumns) {
      for (int64_t d = 0; d == 0 || d < D; d += kPanelDepth) {
        const int64_t depth = D - d < kPanelDepth ? D - d : kPanelDepth;
        pack(a, column, m, d, depth, panel);
        below(a, column, m, d, depth, panel, out, ldo);
      }
    }
    mirror(m, out, ldo);
  }

 private:
  // panel[j][c] = feature d + j of row column + c, for j < depth; of rows beyond m anything.
  static void pack(FeatureRows<C> a, int64_t column, int64_t m, int64_t d, int64_t depth, C* panel) {
    for (int64_t v = 0; v < kColumns; v += W) {
      const C* rows[W];
      for (int64_t c = 0; c < W; ++c) rows[c] = a(column + v + c < m ? column + v + c : m - 1) + d;
      int64_t j = 0;
      for (; j + W <= depth; j += W) {
        transpose<C>([&](int64_t c) { return load(rows[c] + j); }, panel + j * kColumns + v, kColumns);
      }
      for (; j < depth; ++j) {
        for (int64_t c = 0; c < W; ++c) panel[j * kColumns + v + c] = rows[c][j];
      }
    }
  }

  // The panel's columns of the rows from its first one on: all that the lower triangle needs.
  static void below(FeatureRows<C> a, int64_t column, int64_t m, int64_t d, int64_t depth, const C* panel,
                    C* out, int64_t ldo) {
    const int64_t columns = m - column < kColumns ? m - column : kColumns;
    const Tile t{a, m, d, depth, panel, out + column, ldo, d > 0};
    const int64_t corner = column + W < m ? column + W : m;
    tile<W, 1>(t, column, columns < W ? columns : W);
    int64_t i = corner;
    if (columns <= W) {
      for (; i < m; i += W) tile<W, 1>(t, i, columns);
      return;
    }
    if (column == 0) {  // rows are met for the first time
      for (; i + kPanelRows <= m; i += kPanelRows) tile<kPanelRows, kPanelVectors, true>(t, i, columns);
    }
    for (; i + kPanelRows <= m; i += kPanelRows) tile<kPanelRows, kPanelVectors>(t, i, columns);
    if (m - i > 4)
      tile<kPanelRows, kPanelVectors>(t, i, columns);
    else if (i < m)
      tile<4, kPanelVectors>(t, i, columns);
  }

  struct Tile {
    FeatureRows<C> a;
    int64_t m, d, depth;
    const C* panel;
    C* out;
    int64_t ldo;
    bool add;
  };

  // out[i + r][c] (+)= the sum of the rows' features times the panel's, for r < R as far as there are rows, c
  // < columns. ahead: asks for the next tile's rows meanwhile, which no hardware does.
  template <int R, int NV, bool ahead = false>
  static __attribute__((noinline)) void tile(const Tile& t, int64_t i, int64_t columns) {
    const C* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = t.a(i + r < t.m ? i + r : t.m - 1) + t.d;
    V acc[R][NV] = {};
    const auto step = [&](int64_t j) {
      V x[NV];
      for (int v = 0; v < NV; ++v) x[v] = load(t.panel + j * kColumns + v * W);
      for (int r = 0; r < R; ++r) {
        const V each = all_lanes<C>(rows[r][j]);
        for (int v = 0; v < NV; ++v) acc[r][v] += each * x[v];
      }
    };
    int64_t j = 0;
    if constexpr (ahead) {
      const C* next[R];
      for (int r = 0; r < R; ++r) next[r] = t.a(i + R + r < t.m ? i + R + r : t.m - 1) + t.d;
      for (; j + kLine <= t.depth;) {
        for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + j);
        for (const int64_t end = j + kLine; j < end; ++j) step(j);
      }
    }
    for (; j < t.depth; ++j) step(j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (i + r >= t.m) break;
      C* to = t.out + (i + r) * t.ldo;
      for (int v = 0; v < NV; ++v) {
        const int64_t count = columns - v * W;
        if (count >= W)
          store(to + v * W, t.add ? load(to + v * W) + acc[r][v] : acc[r][v]);
        else
          store_first(to + v * W, t.add ? load_first(to + v * W, count) + acc[r][v] : acc[r][v], count);
      }
    }
  }

  // The upper triangle.
  static void mirror(int64_t m, C* out, int64_t ldo) {
    for (int64_t i = 0; i < m; i += W) {
      for (int64_t j = 0; j < i; j += W) {
        if (i + W <= m) {
          transpose<C>([&](int64_t r) { return load(out + (i + r) * ldo + j); }, out + j * ldo + i, ldo);
        } else {
          for (int64_t r = i; r < m; ++r) {
            for (int64_t c = j; c < j + W; ++c) out[c * ldo + r] = out[r * ldo + c];
          }
        }
      }
      for (int64_t r = i; r < i + W && r < m; ++r) {
        for (int64_t c = i; c < r; ++c) out[c * ldo + r] = out[r * ldo + c];
      }
    }
  }
};

}  // namespace
}  // namespace kernelmeta
