// One task of `linearised_descent`: a perceptron, linearised at its weights, trained on the support rows, and
// what it then says of the query rows; and the adjoint.
//
// The steps run on the kernel of the support rows (kernel_descent.h), which never leaves the task's memory.
// What the weights have moved by, dW_l = sum over support rows j of B_l[j] A_l[j]^T with
// B_l = sum over c of p[c, j] G_l[c, j], is not formed either: the query rows' outputs move by the derivative
// along it, d z_l = W_l d a_l + B_l M_l with M_l = A_l^T A_l + 1_bias between support and query rows.
#pragma once

#include "engine/kernel_descent.h"
#include "engine/ntk.h"
#include "engine/problem.h"

namespace kernelmeta {

template <class C>
struct DescentProblem {
  int64_t T, S, Q;
  Perceptron net;
  Features support, query;
  const C *targets, *row_weights;  // [T][S][N], [T][S]
  const C *parameters, *lr, *decay;
  C slope;
  int64_t steps;
  bool cross_entropy;

  KERNELMETA_INLINE Sizes sizes() const { return {T, S, Q, net.outputs(), net.features(), 0, steps}; }
};

template <class C>
struct DescentForward {
  DescentProblem<C> problem;
  C* outputs;       // [T][Q][N]
  C* coefficients;  // [T][S][N]
  C* trace;         // [T][descent_trace_size] or null
};

template <class C>
struct DescentBackward {
  DescentProblem<C> problem;
  const C* trace;
  const C* grad_outputs;
  const C* grad_coefficients;          // or null
  C *grad_support, *grad_query;        // [T][rows][D] or null
  C *grad_targets, *grad_row_weights;  // [T][S][N], [T][S]
};

// Sums over tasks.
template <class C>
struct DescentGrad {
  C *parameters, *lr, *decay;

  KERNELMETA_INLINE DescentGrad(Arena<C>& arena, const Perceptron& net)
      : parameters(arena.take(net.parameters())), lr(arena.take(1)), decay(arena.take(1)) {}
};

// One array for every layer.
template <class C>
struct PerLayer {
  C* of[kMostLayers];

  PerLayer() = default;
  KERNELMETA_INLINE PerLayer(Arena<C>& arena, const Perceptron& net, int64_t elements) {
    for (int l = 0; l < net.layers; ++l) of[l] = arena.take(elements);
  }
  KERNELMETA_INLINE C* operator[](int l) const { return of[l]; }
};

// What the forward pass leaves for the backward pass, one task; kernelmeta/ops/linearised_descent_op.py
// counts it. It starts as zeros.
template <class C>
struct DescentTrace {
  PerHiddenLayer<C> support, query;  // activations
  PerHiddenLayer<C> moved;           // what those of the query rows move by
  PerHiddenLayer<C> derivatives;     // of the support rows' outputs
  PerLayer<C> products, cross;       // M_l, [S][padded(S)] and [padded(S)][padded(Q)]
  C* kernel;                         // [N S][descent_ld]
  C *start, *pulls;                  // [descent_ld] each: f_0 and p of the support rows

  DescentTrace() = default;
  KERNELMETA_INLINE DescentTrace(Arena<C>& arena, int64_t S, int64_t Q, const Perceptron& net)
      : support(arena, net, padded(S)),
        query(arena, net, padded(Q)),
        moved(arena, net, padded(Q)),
        derivatives(arena, net, padded(net.outputs() * S)),
        products(arena, net, S * padded(S)),
        cross(arena, net, padded(S) * padded(Q)),
        kernel(arena.take(net.outputs() * S * descent_ld(S, net.outputs()))),
        start(arena.take(descent_ld(S, net.outputs()))),
        pulls(arena.take(descent_ld(S, net.outputs()))) {}
};

template <class C>
KERNELMETA_INLINE int64_t descent_trace_size(const DescentProblem<C>& p) {
  Arena<C> count;
  DescentTrace<C> unused(count, p.S, p.Q, p.net);
  return count.used();
}

template <class B>
struct LinearisedDescent {
  using C = typename B::Scalar;
  using Rows = NetworkRows<C, typename B::Feature>;

  B& block;
  const DescentProblem<C>& p;
  const int64_t S, Q, N, lds, ldq;
  Ntk<B> ntk;
  C *support_buffer, *query_buffer;
  C *targets, *row_weights;            // [N][lds], [lds]
  C *support_outputs, *query_outputs;  // [N][lds], [N][ldq]
  C* pulls;                            // [padded(N)][lds]  p, one row an output
  C* layer;                            // [widest][lds]  B_l
  typename KernelDescent<B>::Scratch scratch;
  Rows support, query;
  DescentTrace<C> trace;

  KERNELMETA_INLINE LinearisedDescent(Arena<C>& arena, B& block, const DescentProblem<C>& p)
      : block(block),
        p(p),
        S(p.S),
        Q(p.Q),
        N(p.net.outputs()),
        lds(padded(p.S)),
        ldq(padded(p.Q)),
        ntk{block, p.net, p.parameters, p.slope},
        support_buffer(B::widening_buffer(arena, p.support, p.net.features())),
        query_buffer(B::widening_buffer(arena, p.query, p.net.features())),
        targets(arena.take(N * lds)),
        row_weights(arena.take(lds)),
        support_outputs(arena.take(N * lds)),
        query_outputs(arena.take(N * ldq)),
        pulls(arena.take(padded(N) * lds)),
        layer(arena.take(p.net.widest() * lds)),
        scratch(arena, S, N) {}
  LinearisedDescent(const LinearisedDescent&) = delete;

  struct Forward {
    C* product;  // [N S][descent_ld]
    C* along;    // [N][ldq]
    KERNELMETA_INLINE Forward(Arena<C>& arena, const DescentProblem<C>& p)
        : product(arena.take(p.net.outputs() * p.S * descent_ld(p.S, p.net.outputs()))),
          along(arena.take(p.net.outputs() * padded(p.Q))) {}
  };

  struct Backward {
    C *z, *along;  // [widest][ldq] each: gradients of what a layer gives, and of what it moves by
    C *a, *moved;  // the same for what it reads
    C* glayer;     // [widest][lds]
    C* gcross;     // [padded(S)][ldq]
    C* gproduct;   // [padded(S)][lds]
    PerHiddenLayer<C> support;      // gradients of the support rows' activations
    PerHiddenLayer<C> derivatives;  // and of the derivatives
    C *gkernel, *product;           // [N S][descent_ld] each
    C *gpulls, *gstart;             // [descent_ld] each
    C *gtargets, *goutputs;         // [N][lds] each
    typename KernelDescent<B>::Adjoint descent;

    KERNELMETA_INLINE Backward(Arena<C>& arena, const DescentProblem<C>& p)
        : Backward(arena, p, p.net.widest(), p.net.outputs(), padded(p.S), padded(p.Q)) {}

   private:
    KERNELMETA_INLINE Backward(Arena<C>& arena, const DescentProblem<C>& p, int64_t widest, int64_t N,
                               int64_t lds, int64_t ldq)
        : z(arena.take(widest * ldq)),
          along(arena.take(widest * ldq)),
          a(arena.take(widest * ldq)),
          moved(arena.take(widest * ldq)),
          glayer(arena.take(widest * lds)),
          gcross(arena.take(lds * ldq)),
          gproduct(arena.take(lds * lds)),
          support(arena, p.net, lds),
          derivatives(arena, p.net, padded(N * p.S)),
          gkernel(arena.take(N * p.S * descent_ld(p.S, N))),
          product(arena.take(N * p.S * descent_ld(p.S, N))),
          gpulls(arena.take(descent_ld(p.S, N))),
          gstart(arena.take(descent_ld(p.S, N))),
          gtargets(arena.take(N * lds)),
          goutputs(arena.take(N * lds)),
          descent(arena, p.S, N, p.steps) {}
  };

  // The trace of task t lies at `base`; the rows are looked at.
  KERNELMETA_INLINE void bind(int64_t t, C* base) {
    Arena<C> arena(base);
    trace = DescentTrace<C>(arena, S, Q, p.net);
    support = {B::task_rows(p.support, t, p.net.features(), support_buffer),
               S,
               lds,
               S,
               trace.support,
               support_outputs,
               trace.derivatives};
    query = {
        B::task_rows(p.query, t, p.net.features(), query_buffer), Q, ldq, 0, trace.query, query_outputs, {}};
  }

  // What the steps look at; before forward and backward.
  KERNELMETA_INLINE void prepare(int64_t t) const {
    block.unfenced().each_item(S, [&](int64_t j) {
      row_weights[j] = p.row_weights[t * S + j];
      for (int64_t c = 0; c < N; ++c) targets[c * lds + j] = p.targets[(t * S + j) * N + c];
    });
  }

  KERNELMETA_INLINE void forward(const DescentForward<C>& f, int64_t t, const Forward& w) const {
    ntk.layers(support);
    ntk.layers(query);
    ntk.derivatives(support);
    for (int l = 0; l < p.net.layers; ++l) {
      ntk.input_products(l, support, support, trace.products[l]);
      ntk.input_products(l, support, query, trace.cross[l]);
    }
    kernel(w.product);
    block.each_item(N * S, [&](int64_t i) {
      trace.start[i] = support_outputs[i / S * lds + i % S];
      trace.pulls[i] = C(0);
    });
    descent().forward(scratch, trace.pulls);
    spread_pulls();
    query_moves(w.along);
    block.unfenced().each_item(Q * N, [&](int64_t i) {
      const int64_t at = i % N * ldq + i / N;
      f.outputs[t * Q * N + i] = query_outputs[at] + w.along[at];
    });
    block.unfenced().each_item(
        S * N, [&](int64_t i) { f.coefficients[t * S * N + i] = trace.pulls[i % N * S + i / N]; });
  }

  // Adds to `grad`.
  KERNELMETA_INLINE void backward(const DescentBackward<C>& f, int64_t t, const Backward& w,
                                  const DescentGrad<C>& grad) const {
    const int64_t D = p.net.features();
    C* gsupport = f.grad_support ? f.grad_support + t * S * D : nullptr;
    C* gquery = f.grad_query ? f.grad_query + t * Q * D : nullptr;
    spread_pulls();
    for (int l = 1; l < p.net.layers; ++l) {
      zero(padded(p.net.widths[l]), lds, w.support[l]);
      zero(padded(p.net.widths[l]), padded(N * S), w.derivatives[l]);
    }
    zero(N * S, descent_ld(S, N), w.gkernel);
    zero(N, lds, w.gtargets);
    zero(lds, ldq, w.gcross);
    zero(1, lds, w.descent.glr);
    zero(1, lds, w.descent.gdecay);
    zero(1, lds, w.descent.gweights);
    if (gsupport) block.unfenced().features_zero(S, D, gsupport);
    if (gquery) block.unfenced().features_zero(Q, D, gquery);
    block.unfenced().each_item(N * S, [&](int64_t i) {
      w.gpulls[i] = f.grad_coefficients ? f.grad_coefficients[t * S * N + i % S * N + i / S] : C(0);
      w.gstart[i] = C(0);
    });
    query_moves_backward(f.grad_outputs + t * Q * N, w, grad.parameters, gsupport, gquery);
    descent().backward(w.descent, w.gpulls, w.gkernel, w.gstart, w.gtargets);
    kernel_backward(w, gsupport);
    ntk.derivatives_backward(support, w.derivatives, grad.parameters);
    block.rows(N, S, [&](int64_t c, auto row) {
      row.each([&](auto i) { i.store(w.goutputs + c * lds, i.load(w.gstart + c * S)); });
    });
    ntk.layers_backward(support, w.goutputs, w.support, grad.parameters, gsupport);
    block.unfenced().each_item(S * N, [&](int64_t i) {
      f.grad_targets[t * S * N + i] = w.gtargets[i % N * lds + i / N];
      if (i < S) f.grad_row_weights[t * S + i] = w.descent.gweights[i];
    });
    block.unfenced().each_item(2, [&](int64_t which) {
      C* total = which == 0 ? grad.lr : grad.decay;
      const C* each = which == 0 ? w.descent.glr : w.descent.gdecay;
      for (int64_t j = 0; j < S; ++j) *total += each[j];
    });
  }

 private:
  KERNELMETA_INLINE void zero(int64_t rows, int64_t ld, C* to) const {
    block.rows(rows, ld,
               [&](int64_t i, auto row) { row.each([&](auto at) { at.store(to + i * ld, at.zero()); }); });
  }

  KERNELMETA_INLINE KernelDescent<B> descent() const {
    return {block,       S,     N,        p.steps,     p.cross_entropy, targets,
            row_weights, *p.lr, *p.decay, trace.start, trace.kernel};
  }

  // to = P of layer l, which is not the last one.
  KERNELMETA_INLINE void derivative_products(int l, C* to) const {
    const C* g = trace.derivatives[l + 1];
    const int64_t ldg = padded(N * S);
    block.mm(N * S, p.net.widths[l + 1], N * S, {g, 1, ldg}, g, ldg, to, descent_ld(S, N), nullptr);
  }

  KERNELMETA_INLINE void kernel(C* product) const {
    const int64_t ldk = descent_ld(S, N);
    for (int l = p.net.layers - 1; l >= 0; --l) {
      const bool last = l == p.net.layers - 1;
      if (!last) derivative_products(l, product);
      block.features(N * S, S, [&](int64_t k, auto row) {
        const C* m = trace.products[l] + k % S * lds;
        for (int64_t c = 0; c < N; ++c) {
          C* to = trace.kernel + k * ldk + c * S;
          const C* own = product + k * ldk + c * S;
          if (last) {
            const C same = c == k / S ? C(1) : C(0);
            row.each([&](auto i) { i.store(to, i.load(m) * same); });
          } else {
            row.each([&](auto i) { i.store(to, i.load(to) + i.load(own) * i.load(m)); });
          }
        }
      });
    }
  }

  // gkernel is the sum of the gradient and its transpose.
  KERNELMETA_INLINE void kernel_backward(const Backward& w, C* gsupport) const {
    const int64_t ldk = descent_ld(S, N), ldg = padded(N * S);
    for (int l = 0; l < p.net.layers; ++l) {
      const bool last = l == p.net.layers - 1;
      if (!last) derivative_products(l, w.product);
      block.rows(S, S, [&](int64_t j, auto row) {
        row.each([&](auto i) {
          auto sum = i.zero();
          for (int64_t k = j; k < N * S; k += S) {
            const C* g = w.gkernel + k * ldk;
            for (int64_t c = 0; c < N; ++c) {
              if (!last) sum += i.load(g + c * S) * i.load(w.product + k * ldk + c * S);
              if (last && c == k / S) sum += i.load(g + c * S);
            }
          }
          i.store(w.gproduct + j * lds, sum);
        });
      });
      if (!last) {
        block.features(N * S, S, [&](int64_t k, auto row) {
          const C* m = trace.products[l] + k % S * lds;
          for (int64_t c = 0; c < N; ++c) {
            const int64_t at = k * ldk + c * S;
            row.each([&](auto i) { i.store(w.product + at, i.load(w.gkernel + at) * i.load(m)); });
          }
        });
        block.mm_add(p.net.widths[l + 1], N * S, N * S, {trace.derivatives[l + 1], ldg, 1}, w.product, ldk,
                     w.derivatives[l + 1], ldg);
      }
      if (l > 0)
        block.mm_add(p.net.widths[l], S, S, {support.a[l], lds, 1}, w.gproduct, lds, w.support[l], lds);
      else if (gsupport)
        block.features_mm_add(S, S, p.net.features(), {w.gproduct, lds, 1}, support.x, gsupport);
    }
  }

  KERNELMETA_INLINE void spread_pulls() const {
    block.features(N, S, [&](int64_t c, auto row) {
      row.each([&](auto i) { i.store(pulls + c * lds, i.load(trace.pulls + c * S)); });
    });
  }

  // B of layer l, in `layer` or where it lies.
  KERNELMETA_INLINE const C* layer_moves(int l) const {
    if (l == p.net.layers - 1) return pulls;
    const C* g = trace.derivatives[l + 1];
    block.rows(p.net.widths[l + 1], S, [&](int64_t h, auto row) {
      row.each([&](auto i) {
        auto sum = i.zero();
        for (int64_t c = 0; c < N; ++c) {
          sum += i.load(g + h * padded(N * S) + c * S) * i.load(trace.pulls + c * S);
        }
        i.store(layer + h * lds, sum);
      });
    });
    return layer;
  }

  // to [N][ldq]: what the query rows' outputs move by.
  KERNELMETA_INLINE void query_moves(C* to) const {
    for (int l = 0; l < p.net.layers; ++l) {
      const bool last = l == p.net.layers - 1;
      const int64_t units = p.net.widths[l + 1];
      C* z = last ? to : trace.moved[l + 1];
      block.mm(units, S, Q, {layer_moves(l), lds, 1}, trace.cross[l], ldq, z, ldq, nullptr);
      if (l > 0)
        block.mm_add(units, p.net.widths[l], Q, {ntk.weight(l), p.net.ld(l), 1}, trace.moved[l], ldq, z, ldq);
      if (!last) ntk.through_slopes(query, l + 1, z);
    }
  }

  // Gradients of the query rows' outputs -> of everything that they depend on.
  KERNELMETA_INLINE void query_moves_backward(const C* goutputs, const Backward& w, C* gparameters,
                                              C* gsupport, C* gquery) const {
    const int64_t D = p.net.features();
    zero(p.net.widest(), ldq, w.z);
    block.each_item(N * Q, [&](int64_t i) { w.z[i / Q * ldq + i % Q] = goutputs[i % Q * N + i / Q]; });
    const C* along = w.z;
    for (int l = p.net.layers - 1; l >= 0; --l) {
      const int64_t units = p.net.widths[l + 1];
      ntk.to_parameters(query, l, w.z, gparameters);
      if (l > 0) {
        block.unfenced().outer(units, p.net.widths[l], Q, along, ldq, trace.moved[l], ldq,
                               gparameters + p.net.weight_at(l), p.net.ld(l));
      }
      zero(units, lds, w.glayer);
      const C* moves = layer_moves(l);
      block.unfenced().outer(units, S, Q, along, ldq, trace.cross[l], ldq, w.glayer, lds);
      block.mm(S, units, Q, {moves, 1, lds}, along, ldq, w.gcross, ldq, nullptr);
      pulls_backward(l, w);
      if (l > 0) {
        const int64_t below = p.net.widths[l];
        block.unfenced().outer(below, S, Q, query.a[l], ldq, w.gcross, ldq, w.support[l], lds);
        block.unfenced().mm(below, units, Q, {ntk.weight(l), 1, p.net.ld(l)}, along, ldq, w.moved, ldq,
                            nullptr);
        block.unfenced().mm(below, units, Q, {ntk.weight(l), 1, p.net.ld(l)}, w.z, ldq, w.a, ldq, nullptr);
        block.mm_add(below, S, Q, {support.a[l], lds, 1}, w.gcross, ldq, w.a, ldq);
        block.rows(below, Q, [&](int64_t h, auto row) {
          const C* a = query.a[l] + h * ldq;
          row.each([&](auto i) {
            i.store(w.z + h * ldq, ntk.sloped(i.load(a), i.load(w.a + h * ldq)));
            i.store(w.along + h * ldq, ntk.sloped(i.load(a), i.load(w.moved + h * ldq)));
          });
        });
        along = w.along;
      } else {
        if (gquery) {
          block.unfenced().features_mm_add(Q, units, D, {w.z, 1, ldq},
                                           FeatureRows<C>{ntk.weight(0), D, nullptr}, gquery);
          block.unfenced().features_mm_add(Q, S, D, {w.gcross, 1, ldq}, support.x, gquery);
        }
        if (gsupport) block.unfenced().features_mm_add(S, Q, D, {w.gcross, ldq, 1}, query.x, gsupport);
      }
    }
  }

  // glayer, the gradient of B_l -> of the pulls and of the derivatives.
  KERNELMETA_INLINE void pulls_backward(int l, const Backward& w) const {
    if (l == p.net.layers - 1) {
      block.unfenced().features(N, S, [&](int64_t c, auto row) {
        row.each([&](auto i) {
          i.store(w.gpulls + c * S, i.load(w.gpulls + c * S) + i.load(w.glayer + c * lds));
        });
      });
      return;
    }
    const int64_t ldg = padded(N * S), units = p.net.widths[l + 1];
    const C* g = trace.derivatives[l + 1];
    C* gg = w.derivatives[l + 1];
    block.unfenced().features(N, S, [&](int64_t c, auto row) {
      row.each([&](auto i) {
        auto sum = i.load(w.gpulls + c * S);
        for (int64_t h = 0; h < units; ++h) sum += i.load(w.glayer + h * lds) * i.load(g + h * ldg + c * S);
        i.store(w.gpulls + c * S, sum);
      });
    });
    block.unfenced().features(units, S, [&](int64_t h, auto row) {
      for (int64_t c = 0; c < N; ++c) {
        row.each([&](auto i) {
          const auto own = i.load(w.glayer + h * lds) * i.load(trace.pulls + c * S);
          i.store(gg + h * ldg + c * S, i.load(gg + h * ldg + c * S) + own);
        });
      }
    });
  }
};

}  // namespace kernelmeta
