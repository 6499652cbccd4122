// One task of `synthetic_gradient_mlp`: the MLP alone, on logits as they come, [Q][N].
#pragma once

#include "engine/problem.h"

namespace kernelmeta {

template <class B>
struct MlpTask {
  using C = typename B::Scalar;
  using Sizes = typename B::Sizes;

  B& block;
  const Sizes& s;
  Mlp<B> mlp;
  C *z, *g, *gg, *gz, *g2;  // the last three with a backward pass only

  KERNELMETA_INLINE MlpTask(Arena<C>& arena, B& block, const Sizes& s, const FoldedMlp<C>& weights,
                            bool backward)
      : block(block),
        s(s),
        mlp(block, s, weights, backward, arena),
        z(arena.take(s.N * s.ld())),
        g(arena.take(s.N * s.ld())),
        gg(backward ? arena.take(s.N * s.ld()) : nullptr),
        gz(backward ? arena.take(s.N * s.ld()) : nullptr),
        g2(backward ? arena.take(s.H * s.ld()) : nullptr) {}

  KERNELMETA_INLINE void forward(const C* logits, C* out) {
    rows_in(logits, z);
    mlp.forward(z, g, nullptr);
    rows_out(g, out);
  }

  // Adds to `grad`.
  KERNELMETA_INLINE void backward(const C* logits, const C* grad_out, C* grad_logits,
                                  const FoldedMlpGrad<C>& grad) {
    rows_in(logits, z);
    rows_in(grad_out, gg);
    mlp.forward(z, g, nullptr);
    mlp.backward(z, gg, gz, g2, grad);
    rows_out(gz, grad_logits);
  }

 private:
  // [Q][N] -> [N][ld], zeros in the padding
  KERNELMETA_INLINE void rows_in(const C* from, C* to) {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    block.each_item(ld, [&](int64_t q) {
      for (int64_t n = 0; n < N; ++n) to[n * ld + q] = q < Q ? from[q * N + n] : C(0);
    });
  }
  KERNELMETA_INLINE void rows_out(const C* from, C* to) {
    const int64_t N = s.N, ld = s.ld();
    block.unfenced().each_item(s.Q, [&](int64_t q) {
      for (int64_t n = 0; n < N; ++n) to[q * N + n] = from[n * ld + q];
    });
  }
};

}  // namespace kernelmeta
