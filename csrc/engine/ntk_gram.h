// One task of `ntk_gram`: the neural tangent kernel of the support rows, and of the query rows with them; and
// the adjoint, which makes derivatives and products anew rather than keep them.
#pragma once

#include "engine/ntk.h"
#include "engine/problem.h"

namespace kernelmeta {

template <class C>
struct NtkProblem {
  int64_t T, S, Q;  // Q may be 0
  Perceptron net;
  Features support, query;
  const C* parameters;
  C slope;
  bool full;

  // Entries of the kernel for each pair of rows.
  KERNELMETA_INLINE int64_t pair() const { return full ? net.outputs() * net.outputs() : 1; }
  KERNELMETA_INLINE Sizes sizes() const { return {T, S, Q, net.outputs(), net.features(), 0, 0}; }
};

template <class C>
struct NtkForward {
  NtkProblem<C> problem;
  C *gram, *cross;                     // [T][rows][S], or with full [T][rows][N][S][N]
  C *support_outputs, *query_outputs;  // [T][rows][N]
  C* trace;                            // [T][ntk_trace_size] or null
};

template <class C>
struct NtkBackward {
  NtkProblem<C> problem;
  const C* trace;
  const C *grad_gram, *grad_cross;                     // the second one or null
  const C *grad_support_outputs, *grad_query_outputs;  // or null
  C *grad_support, *grad_query;                        // or null
};

// Sums over tasks.
template <class C>
struct NtkGrad {
  C* parameters;

  KERNELMETA_INLINE NtkGrad(Arena<C>& arena, const Perceptron& net)
      : parameters(arena.take(net.parameters())) {}
};

// Activations, which the backward pass reads again; kernelmeta/ops/ntk_gram_op.py counts them. It starts as
// zeros.
template <class C>
struct NtkTrace {
  PerHiddenLayer<C> support, query;

  NtkTrace() = default;
  KERNELMETA_INLINE NtkTrace(Arena<C>& arena, const NtkProblem<C>& p)
      : support(arena, p.net, padded(p.S)), query(arena, p.net, padded(p.Q)) {}
};

template <class C>
KERNELMETA_INLINE int64_t ntk_trace_size(const NtkProblem<C>& p) {
  Arena<C> count;
  NtkTrace<C> unused(count, p);
  return count.used();
}

// Its memory, and that of its Backward, starts as zeros: what lies between outputs is summed up with them,
// and no row stores more of it than a vector's width.
template <class B>
struct NtkGram {
  using C = typename B::Scalar;
  using Rows = NetworkRows<C, typename B::Feature>;

  B& block;
  const NtkProblem<C>& p;
  const int64_t S, N, lds;
  Ntk<B> ntk;
  C *support_buffer, *query_buffer;
  C *support_outputs, *query_outputs;                        // [N][ld] of each
  PerHiddenLayer<C> support_derivatives, query_derivatives;  // [units][N ld] of each
  C *m, *product, *sum;  // of the larger of both: [padded(S)][ld], twice [pair_rows()][pair_ld()]
  Rows support, query;

  KERNELMETA_INLINE NtkGram(Arena<C>& arena, B& block, const NtkProblem<C>& p)
      : block(block),
        p(p),
        S(p.S),
        N(p.net.outputs()),
        lds(padded(p.S)),
        ntk{block, p.net, p.parameters, p.slope},
        support_buffer(B::widening_buffer(arena, p.support, p.net.features())),
        query_buffer(B::widening_buffer(arena, p.query, p.net.features())),
        support_outputs(arena.take(N * lds)),
        query_outputs(arena.take(N * padded(p.Q))),
        support_derivatives(arena, p.net, N * lds),
        query_derivatives(arena, p.net, N * padded(p.Q)),
        m(arena.take(lds * most())),
        product(arena.take(pairs())),
        sum(arena.take(pairs())) {}
  NtkGram(const NtkGram&) = delete;

  struct Backward {
    PerHiddenLayer<C> support, query;                          // gradients of activations
    PerHiddenLayer<C> support_derivatives, query_derivatives;  // and of derivatives
    C* gm;                                                     // [padded(S)][ld]
    C* outputs;                                                // [N][ld]

    KERNELMETA_INLINE Backward(Arena<C>& arena, const NtkProblem<C>& p)
        : support(arena, p.net, padded(p.S)),
          query(arena, p.net, padded(p.Q)),
          support_derivatives(arena, p.net, p.net.outputs() * padded(p.S)),
          query_derivatives(arena, p.net, p.net.outputs() * padded(p.Q)),
          gm(arena.take(padded(p.S) * padded(p.S > p.Q ? p.S : p.Q))),
          outputs(arena.take(p.net.outputs() * padded(p.S > p.Q ? p.S : p.Q))) {}
  };

  // The trace of task t lies at `base`; the rows are looked at.
  KERNELMETA_INLINE void bind(int64_t t, C* base) {
    Arena<C> arena(base);
    const NtkTrace<C> trace(arena, p);
    const int64_t D = p.net.features(), ldq = padded(p.Q);
    support = {B::task_rows(p.support, t, D, support_buffer),
               S,
               lds,
               lds,
               trace.support,
               support_outputs,
               support_derivatives};
    query = {B::task_rows(p.query, t, D, query_buffer),
             p.Q,
             ldq,
             ldq,
             trace.query,
             query_outputs,
             query_derivatives};
  }

  KERNELMETA_INLINE void forward(const NtkForward<C>& f, int64_t t) const {
    ntk.layers(support);
    ntk.derivatives(support);
    with_support(support, f.gram + t * S * S * p.pair());
    outputs(support, f.support_outputs + t * S * N);
    if (p.Q == 0) return;
    ntk.layers(query);
    ntk.derivatives(query);
    with_support(query, f.cross + t * p.Q * S * p.pair());
    outputs(query, f.query_outputs + t * p.Q * N);
  }

  // Adds to `grad`.
  KERNELMETA_INLINE void backward(const NtkBackward<C>& f, int64_t t, const Backward& w,
                                  const NtkGrad<C>& grad) const {
    const int64_t D = p.net.features(), Q = p.Q;
    C* gsupport = f.grad_support ? f.grad_support + t * S * D : nullptr;
    C* gquery = f.grad_query ? f.grad_query + t * Q * D : nullptr;
    for (int l = 1; l < p.net.layers; ++l) {
      zero(padded(p.net.widths[l]), lds, w.support[l]);
      zero(padded(p.net.widths[l]), N * lds, w.support_derivatives[l]);
      zero(padded(p.net.widths[l]), query.ld, w.query[l]);
      zero(padded(p.net.widths[l]), N * query.ld, w.query_derivatives[l]);
    }
    if (gsupport) block.unfenced().features_zero(S, D, gsupport);
    if (gquery) block.unfenced().features_zero(Q, D, gquery);
    ntk.derivatives(support);
    with_support_backward(support, f.grad_gram + t * S * S * p.pair(), w, w.support, w.support_derivatives,
                          gsupport, gsupport);
    if (Q > 0) {
      ntk.derivatives(query);
      if (f.grad_cross) {
        with_support_backward(query, f.grad_cross + t * Q * S * p.pair(), w, w.query, w.query_derivatives,
                              gsupport, gquery);
      }
      ntk.derivatives_backward(query, w.query_derivatives, grad.parameters);
      outputs_backward(query, f.grad_query_outputs ? f.grad_query_outputs + t * Q * N : nullptr, w.outputs);
      ntk.layers_backward(query, w.outputs, w.query, grad.parameters, gquery);
    }
    ntk.derivatives_backward(support, w.support_derivatives, grad.parameters);
    outputs_backward(support, f.grad_support_outputs ? f.grad_support_outputs + t * S * N : nullptr,
                     w.outputs);
    ntk.layers_backward(support, w.outputs, w.support, grad.parameters, gsupport);
  }

 private:
  KERNELMETA_INLINE int64_t most() const { return padded(p.S > p.Q ? p.S : p.Q); }
  KERNELMETA_INLINE int64_t pairs() const { return p.full ? (N * S + kAlign) * N * most() : lds * most(); }
  // Products of two rows are [support rows, of every output][rows, of every output].
  KERNELMETA_INLINE int64_t rows() const { return p.full ? N * S : S; }
  KERNELMETA_INLINE int64_t parts() const { return p.full ? N : 1; }

  KERNELMETA_INLINE void zero(int64_t rows, int64_t ld, C* to) const {
    block.rows(rows, ld,
               [&](int64_t i, auto row) { row.each([&](auto at) { at.store(to + i * ld, at.zero()); }); });
  }

  KERNELMETA_INLINE void outputs(const Rows& r, C* to) const {
    block.unfenced().each_item(r.count * N, [&](int64_t i) { to[i] = r.outputs[i % N * r.ld + i / N]; });
  }
  // g [count][N] or null -> to [N][ld]
  KERNELMETA_INLINE void outputs_backward(const Rows& r, const C* g, C* to) const {
    zero(N, r.ld, to);
    if (g) block.each_item(r.count * N, [&](int64_t i) { to[i % N * r.ld + i / N] = g[i]; });
  }

  // product = P of layer l, which is not the last one.
  KERNELMETA_INLINE void derivative_products(int l, const Rows& r) const {
    const int64_t units = p.net.widths[l + 1], ldg = N * lds, ldr = N * r.ld;
    const C *gs = support.g[l + 1], *gr = r.g[l + 1];
    for (int64_t c = 0; c < N; ++c) {
      if (p.full)
        block.mm(S, units, ldr, {gs + c * lds, 1, ldg}, gr, ldr, product + c * S * ldr, ldr, nullptr);
      else if (c == 0)
        block.mm(S, units, r.count, {gs, 1, ldg}, gr, ldr, product, r.ld, nullptr);
      else
        block.mm_add(S, units, r.count, {gs + c * lds, 1, ldg}, gr + c * r.ld, ldr, product, r.ld);
    }
  }

  // Where an entry (row i, output e; support row j, output c) of the kernel lies, here and outside.
  KERNELMETA_INLINE int64_t inside(const Rows& r, int64_t k) const {
    if (!p.full) return k % S * r.ld + k / S;
    const int64_t c = k % N, j = k / N % S, e = k / (N * S) % N, i = k / (N * S * N);
    return (c * S + j) * (N * r.ld) + e * r.ld + i;
  }

  // f(entry of the products, entry of m, whether both outputs are the same, at) for all of them; followed by
  // zeros.
  template <class Fn>
  KERNELMETA_INLINE void each_pair(const Rows& r, Fn f) const {
    block.rows(rows(), r.count, [&](int64_t k, auto row) {
      for (int64_t e = 0; e < parts(); ++e) {
        row.each([&](auto i) { f((k * parts() + e) * r.ld, k % S * r.ld, e == k / S, i); });
      }
    });
  }

  // The kernel of rows with the support rows.
  KERNELMETA_INLINE void with_support(const Rows& r, C* to) const {
    for (int l = p.net.layers - 1; l >= 0; --l) {
      ntk.input_products(l, support, r, m);
      if (l == p.net.layers - 1) {
        const C same = p.full ? C(1) : C(N);
        each_pair(r, [&](int64_t at, int64_t of_inputs, bool diagonal, auto i) {
          i.store(sum + at, i.load(m + of_inputs) * (diagonal ? same : C(0)));
        });
      } else {
        derivative_products(l, r);
        each_pair(r, [&](int64_t at, int64_t of_inputs, bool, auto i) {
          i.store(sum + at, i.load(sum + at) + i.load(product + at) * i.load(m + of_inputs));
        });
      }
    }
    block.unfenced().each_item(r.count * S * p.pair(), [&](int64_t k) { to[k] = sum[inside(r, k)]; });
  }

  // gkernel: of the kernel of rows r with the support rows; gr, gg: gradients of the activations and the
  // derivatives of r.
  KERNELMETA_INLINE void with_support_backward(const Rows& r, const C* gkernel, const Backward& w,
                                               const PerHiddenLayer<C>& gr, const PerHiddenLayer<C>& gg,
                                               C* gsupport, C* grows) const {
    const int64_t D = p.net.features(), ldr = N * r.ld, ldg = N * lds;
    const int64_t row = p.full ? ldr : r.ld;  // of products
    zero(p.full ? N * S : lds, row, sum);
    block.unfenced().each_item(r.count * S * p.pair(), [&](int64_t k) { sum[inside(r, k)] = gkernel[k]; });
    for (int l = 0; l < p.net.layers; ++l) {
      const bool last = l == p.net.layers - 1;
      ntk.input_products(l, support, r, m);
      if (!last) derivative_products(l, r);
      zero(lds, r.ld, w.gm);
      const C share = p.full ? C(1) : C(N);
      block.rows(S, r.count, [&](int64_t j, auto of_row) {
        of_row.each([&](auto i) {
          auto total = i.zero();
          for (int64_t k = j; k < rows(); k += S) {
            for (int64_t e = 0; e < parts(); ++e) {
              const int64_t at = (k * parts() + e) * r.ld;
              if (!last) total += i.load(sum + at) * i.load(product + at);
              if (last && e == k / S) total += i.load(sum + at) * share;
            }
          }
          i.store(w.gm + j * r.ld, total);
        });
      });
      if (!last) {
        each_pair(r, [&](int64_t at, int64_t of_inputs, bool, auto i) {
          i.store(product + at, i.load(sum + at) * i.load(m + of_inputs));
        });
        if (!p.full) zero(lds - S, row, product + S * row);
        const int64_t units = p.net.widths[l + 1];
        for (int64_t c = 0; c < N; ++c) {
          const C *gs = support.g[l + 1] + c * lds, *own = p.full ? product + c * S * row : product;
          const int64_t shift = p.full ? 0 : c * r.ld, columns = p.full ? ldr : r.count;
          block.mm_add(units, S, columns, {gs, ldg, 1}, own, row, gg[l + 1] + shift, ldr);
          block.outer(units, S, columns, r.g[l + 1] + shift, ldr, own, row,
                      w.support_derivatives[l + 1] + c * lds, ldg);
        }
      }
      if (l > 0) {
        block.mm_add(p.net.widths[l], S, r.count, {support.a[l], lds, 1}, w.gm, r.ld, gr[l], r.ld);
        block.unfenced().outer(p.net.widths[l], S, r.count, r.a[l], r.ld, w.gm, r.ld, w.support[l], lds);
      } else {
        if (grows) block.unfenced().features_mm_add(r.count, S, D, {w.gm, 1, r.ld}, support.x, grows);
        if (gsupport) block.unfenced().features_mm_add(S, r.count, D, {w.gm, r.ld, 1}, r.x, gsupport);
      }
    }
  }
};

}  // namespace kernelmeta
