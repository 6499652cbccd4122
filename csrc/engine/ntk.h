// A perceptron with (leaky) ReLUs on the rows of one task, the derivatives of its outputs, its neural tangent
// kernel, and the adjoints of all three.
//
// Layer l, from 0 on, takes A_l to W_l A_l + b_l. With G_l the derivatives of the outputs in what layer l
// gives, the kernel of rows i and j, outputs c and e, is
//
//   K[c, i; e, j] = sum over layers of M_l[i, j] P_l[c, i; e, j],   M_l = A_l^T A_l + 1_bias,  P_l = G_l^T
//   G_l
//
// and of the last layer, whose G is the identity, M alone where c = e. Slopes are constant between the kinks
// of a (leaky) ReLU, so that derivatives go through A, G and W, and never through the slopes.
//
// Arrays of a set of rows have rows innermost: [units][ld]; derivatives have one entry for each output and
// row, output c from c * apart on.
#pragma once

#include "engine/feature_rows.h"

namespace kernelmeta {

inline constexpr int kMostLayers = 8;

// The sizes of a perceptron, and where its parameters lie in one array: of every layer the weights
// [units][ld(l)], then the biases; each begins at a multiple of kAlign. kernelmeta/ops/_perceptron.py packs
// them.
struct Perceptron {
  int layers;
  int64_t widths[kMostLayers + 1];  // features, hidden units, outputs
  bool has_bias;

  KERNELMETA_INLINE int64_t features() const { return widths[0]; }
  KERNELMETA_INLINE int64_t outputs() const { return widths[layers]; }
  // Of one row of weights; those of the first layer lie as features do.
  KERNELMETA_INLINE int64_t ld(int l) const { return l == 0 ? widths[0] : padded(widths[l]); }
  KERNELMETA_INLINE int64_t bias_at(int l) const { return weight_at(l) + padded(widths[l + 1] * ld(l)); }
  KERNELMETA_INLINE int64_t weight_at(int l) const {
    int64_t at = 0;
    for (int i = 0; i < l; ++i) {
      at += padded(widths[i + 1] * ld(i)) + (has_bias ? padded(widths[i + 1]) : 0);
    }
    return at;
  }
  KERNELMETA_INLINE int64_t parameters() const { return weight_at(layers); }
  KERNELMETA_INLINE int64_t widest() const {
    int64_t most = 0;
    for (int l = 1; l <= layers; ++l) most = widths[l] > most ? widths[l] : most;
    return padded(most);
  }
};

// One array for every hidden layer: [l] belongs to the units that layer l reads, l > 0.
template <class C>
struct PerHiddenLayer {
  C* of[kMostLayers];

  PerHiddenLayer() = default;
  // [units][ld], and readable up to a multiple of kAlign of units.
  KERNELMETA_INLINE PerHiddenLayer(Arena<C>& arena, const Perceptron& net, int64_t ld) {
    for (int l = 1; l < net.layers; ++l) of[l] = arena.take(padded(net.widths[l]) * ld);
  }
  KERNELMETA_INLINE C* operator[](int l) const { return of[l]; }
};

// A set of rows, and what the layers make of them.
template <class C, class F>
struct NetworkRows {
  FeatureRows<F> x;
  int64_t count, ld;
  int64_t apart;        // between the derivatives of two outputs
  PerHiddenLayer<C> a;  // [units][ld]  inputs of layer l
  C* outputs;           // [N][ld]
  PerHiddenLayer<C> g;  // [units][ldg()]  derivatives of the outputs in what layer l - 1 gives

  KERNELMETA_INLINE int64_t ldg(int64_t outputs) const { return padded(outputs * apart); }
};

template <class B>
struct Ntk {
  using C = typename B::Scalar;
  using F = typename B::Feature;
  using Rows = NetworkRows<C, F>;

  B& block;
  const Perceptron& net;
  const C* parameters;
  C slope;  // of the leaky ReLU below zero

  KERNELMETA_INLINE const C* weight(int l) const { return parameters + net.weight_at(l); }
  KERNELMETA_INLINE const C* bias(int l) const {
    return net.has_bias ? parameters + net.bias_at(l) : nullptr;
  }

  // v where a is positive, slope v elsewhere.
  template <class V>
  KERNELMETA_INLINE V sloped(V a, V v) const {
    const V kept = B::where_positive(a, v);
    return kept + (v - kept) * slope;
  }

  // The activations and the outputs.
  KERNELMETA_INLINE void layers(const Rows& r) const {
    for (int l = 0; l < net.layers; ++l) {
      const bool hidden = l + 1 < net.layers;
      C* z = hidden ? r.a[l + 1] : r.outputs;
      const int64_t units = net.widths[l + 1];
      const C* b = bias(l);
      if (l == 0)
        block.dots(units, FeatureRows<C>{weight(0), net.ld(0), nullptr}, r.count, r.x, net.features(), z,
                   r.ld);
      else
        block.mm(units, net.widths[l], r.count, {weight(l), net.ld(l), 1}, r.a[l], r.ld, z, r.ld, nullptr);
      block.rows(units, r.count, [&](int64_t h, auto row) {
        const C shift = b ? b[h] : C(0);
        C* of_unit = z + h * r.ld;
        row.each([&](auto i) {
          const auto v = i.load(of_unit) + shift;
          i.store(of_unit, hidden ? sloped(v, v) : v);
        });
      });
    }
  }

  // f(h, row) for every unit that layer l reads, row being that of one output: where outputs are a multiple
  // of kAlign apart, what it stores is followed by zeros.
  template <class Fn>
  KERNELMETA_INLINE void of_outputs(const Rows& r, int l, Fn f) const {
    if (r.apart % kAlign == 0)
      block.rows(net.widths[l], r.count, f);
    else
      block.features(net.widths[l], r.count, f);
  }

  // g *= the slopes of the units that layer l reads.
  KERNELMETA_INLINE void times_slopes(const Rows& r, int l, C* g) const {
    const int64_t N = net.outputs(), ldg = r.ldg(N);
    of_outputs(r, l, [&](int64_t h, auto row) {
      const C* a = r.a[l] + h * r.ld;
      for (int64_t c = 0; c < N; ++c) {
        C* to = g + h * ldg + c * r.apart;
        row.each([&](auto i) { i.store(to, sloped(i.load(a), i.load(to))); });
      }
    });
  }

  // r.g, whose padding is not written.
  KERNELMETA_INLINE void derivatives(const Rows& r) const {
    const int64_t N = net.outputs(), ldg = r.ldg(N);
    for (int l = net.layers - 1; l > 0; --l) {
      if (l == net.layers - 1) {
        of_outputs(r, l, [&](int64_t h, auto row) {
          const C* a = r.a[l] + h * r.ld;
          for (int64_t c = 0; c < N; ++c) {
            const C own = weight(l)[c * net.ld(l) + h];
            row.each(
                [&](auto i) { i.store(r.g[l] + h * ldg + c * r.apart, sloped(i.load(a), i.zero() + own)); });
          }
        });
      } else {
        block.mm(net.widths[l], net.widths[l + 1], N * r.apart, {weight(l), 1, net.ld(l)}, r.g[l + 1], ldg,
                 r.g[l], ldg, nullptr);
        times_slopes(r, l, r.g[l]);
      }
    }
  }

  // to [s.count][r.ld] = A_l(s)^T A_l(r) + 1_bias
  KERNELMETA_INLINE void input_products(int l, const Rows& s, const Rows& r, C* to) const {
    if (l == 0 && &s == &r)
      block.self_dots(s.count, s.x, net.features(), to, r.ld);
    else if (l == 0)
      block.dots(s.count, s.x, r.count, r.x, net.features(), to, r.ld);
    else
      block.mm(s.count, net.widths[l], r.count, {s.a[l], 1, s.ld}, r.a[l], r.ld, to, r.ld, nullptr);
    const C one = net.has_bias ? C(1) : C(0);
    block.rows(s.count, r.count, [&](int64_t j, auto row) {
      row.each([&](auto i) { i.store(to + j * r.ld, i.load(to + j * r.ld) + one); });
    });
  }

  // ---- adjoints; gparameters are sums

  // ga [units][ld], the gradient of what layer l reads or gives, through the slopes of units l.
  KERNELMETA_INLINE void through_slopes(const Rows& r, int l, C* ga) const {
    block.rows(net.widths[l], r.count, [&](int64_t h, auto row) {
      C* to = ga + h * r.ld;
      row.each([&](auto i) { i.store(to, sloped(i.load(r.a[l] + h * r.ld), i.load(to))); });
    });
  }

  // z [units][ld]: gradient of what layer l gives.
  KERNELMETA_INLINE void to_parameters(const Rows& r, int l, const C* z, C* gparameters) const {
    const int64_t units = net.widths[l + 1];
    C* gw = gparameters + net.weight_at(l);
    if (l == 0)
      block.features_mm_add(units, r.count, net.features(), {z, r.ld, 1}, r.x, gw);
    else
      block.unfenced().outer(units, net.widths[l], r.count, z, r.ld, r.a[l], r.ld, gw, net.ld(l));
    if (!net.has_bias) return;
    C* gb = gparameters + net.bias_at(l);
    block.rows(units, r.count, [&](int64_t h, auto row) {
      const C sum = row.sum([&](auto i) { return i.load(z + h * r.ld); });
      row.one([&] { gb[h] += sum; });
    });
  }

  // z: gradient of the outputs; ga: of the activations, from elsewhere, used up; gx [count][D] or null: added
  // to.
  KERNELMETA_INLINE void layers_backward(const Rows& r, const C* z, const PerHiddenLayer<C>& ga,
                                         C* gparameters, C* gx) const {
    for (int l = net.layers - 1; l >= 0; --l) {
      to_parameters(r, l, z, gparameters);
      const int64_t units = net.widths[l + 1];
      if (l > 0) {
        block.mm_add(net.widths[l], units, r.count, {weight(l), 1, net.ld(l)}, z, r.ld, ga[l], r.ld);
        through_slopes(r, l, ga[l]);
        z = ga[l];
      } else if (gx) {
        block.features_mm_add(r.count, units, net.features(), {z, 1, r.ld},
                              FeatureRows<C>{weight(0), net.ld(0), nullptr}, gx);
      }
    }
  }

  // gg: gradient of r.g, used up.
  KERNELMETA_INLINE void derivatives_backward(const Rows& r, const PerHiddenLayer<C>& gg,
                                              C* gparameters) const {
    const int64_t N = net.outputs(), ldg = r.ldg(N);
    for (int l = 1; l < net.layers; ++l) {
      C* gw = gparameters + net.weight_at(l);
      times_slopes(r, l, gg[l]);
      if (l == net.layers - 1) {
        block.unfenced().features(net.widths[l], r.count, [&](int64_t h, auto row) {
          for (int64_t c = 0; c < N; ++c) {
            const C sum = row.sum([&](auto i) { return i.load(gg[l] + h * ldg + c * r.apart); });
            row.one([&] { gw[c * net.ld(l) + h] += sum; });
          }
        });
      } else {
        block.unfenced().outer(net.widths[l + 1], net.widths[l], N * r.apart, r.g[l + 1], ldg, gg[l], ldg, gw,
                               net.ld(l));
        block.mm_add(net.widths[l + 1], net.widths[l], N * r.apart, {weight(l), net.ld(l), 1}, gg[l], ldg,
                     gg[l + 1], ldg);
      }
    }
  }
};

}  // namespace kernelmeta
