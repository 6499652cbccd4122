// Gradient descent in function space: a model that is linear in its weights moves by the pulls of its rows,
// and its outputs by their kernel,
//
//   f_t = f_0 + K p_t,   p_{t+1} = (1 - lr decay) p_t - lr w o dloss/df (f_t),   p_0 = 0
//
// with w the weight of every row. The adjoint goes through the states backwards; they are made anew from
// checkpoints, of which there is a level of kBranch for each factor of kBranch in the number of steps.
//
// K is symmetric, [R][ldk] with R = N S rows, output c of row j at c S + j, as in the vectors f and p.
#pragma once

#include "engine/sizes.h"

namespace kernelmeta {

inline constexpr int64_t kBranch = 16;
inline constexpr int64_t kMostSteps = 1 << 20;  // beyond it, where they lead is known in closed form

// Levels of checkpoints.
KERNELMETA_INLINE int64_t checkpoint_levels(int64_t steps) {
  int64_t levels = 1;
  for (int64_t span = kBranch; span < steps; span *= kBranch) ++levels;
  return levels;
}

// Vectors are read up to kAlign entries beyond their end.
KERNELMETA_INLINE int64_t descent_ld(int64_t S, int64_t N) { return padded(N * S) + kAlign; }

template <class B>
struct KernelDescent {
  using C = typename B::Scalar;

  B& block;
  int64_t S, N, steps;
  bool cross_entropy;
  const C *targets, *row_weights;  // [N][padded(S)], [padded(S)]
  C lr, decay;
  const C* start;   // [R]  f_0
  const C* kernel;  // [R][ldk()]

  KERNELMETA_INLINE int64_t ldk() const { return descent_ld(S, N); }
  KERNELMETA_INLINE int64_t ld() const { return padded(S); }

  struct Scratch {
    C *f, *g, *share;  // [ldk]; [N][padded(S)] each; share: probabilities, of the cross-entropy alone
    KERNELMETA_INLINE Scratch(Arena<C>& arena, int64_t S, int64_t N)
        : f(arena.take(descent_ld(S, N))), g(arena.take(N * padded(S))), share(arena.take(N * padded(S))) {}
  };

  struct Adjoint {
    Scratch scratch;
    C* checkpoints;              // [levels][kBranch][ldk]
    C* gf;                       // [kBranch][ldk]  gradients of f of the steps of a segment
    C* v;                        // [N][padded(S)]
    C *glr, *gdecay, *gweights;  // [padded(S)] each
    KERNELMETA_INLINE Adjoint(Arena<C>& arena, int64_t S, int64_t N, int64_t steps)
        : scratch(arena, S, N),
          checkpoints(arena.take(checkpoint_levels(steps) * kBranch * descent_ld(S, N))),
          gf(arena.take(kBranch * descent_ld(S, N))),
          v(arena.take(N * padded(S))),
          glr(arena.take(padded(S))),
          gdecay(arena.take(padded(S))),
          gweights(arena.take(padded(S))) {}
  };

  // p starts as zeros.
  KERNELMETA_INLINE void forward(const Scratch& t, C* p) const {
    for (int64_t k = 0; k < steps; ++k) step(t, p, p);
  }

  // gp [R]: gradient of the last p, used up. Adds to gkernel_sum [R][ldk], which gets the gradient of K and
  // its transpose, gstart [R], gtargets [N][padded(S)], t.gweights, t.glr and t.gdecay.
  KERNELMETA_INLINE void backward(const Adjoint& t, C* gp, C* gkernel_sum, C* gstart, C* gtargets) const {
    const int64_t R = N * S, ld_ = ldk(), levels = checkpoint_levels(steps);
    int64_t span = 1;
    for (int64_t i = 1; i < levels; ++i) span *= kBranch;
    for (int64_t end = steps; end > 0;) {
      const int64_t first = (end - 1) / kBranch * kBranch;
      // The levels whose checkpoints do not reach this segment.
      int64_t level = 0, reach = kBranch;
      for (; level + 1 < levels && end != steps && end % (reach * kBranch) == 0; ++level) reach *= kBranch;
      if (end == steps) {
        level = levels - 1;
        reach = span * kBranch;
      }
      for (; level >= 0; --level, reach /= kBranch)
        refill(t, level, levels, reach, first / reach * reach, end);
      for (int64_t k = end - 1; k >= first; --k) {
        const C* p = t.checkpoints + (k - first) * ld_;
        step_backward(t, p, gp, t.gf + (k - first) * ld_, gstart, gtargets);
      }
      block.unfenced().mm_add(R, end - first, R, {t.gf, 1, ld_}, t.checkpoints, ld_, gkernel_sum, ld_);
      block.mm_add(R, end - first, R, {t.checkpoints, 1, ld_}, t.gf, ld_, gkernel_sum, ld_);
      end = first;
    }
  }

 private:
  KERNELMETA_INLINE void outputs(const Scratch& t, const C* p) const {
    const int64_t R = N * S;
    block.each_item(R, [&](int64_t i) { t.f[i] = start[i]; });
    block.mm_add(1, R, R, {p, 0, 1}, kernel, ldk(), t.f, ldk());
  }

  // t.g = dloss/df of every row, by itself.
  KERNELMETA_INLINE void loss_gradient(const Scratch& t) const {
    block.columns(S, [&](auto i) {
      auto total = i.zero(), norm = i.zero(), most = i.load(t.f);
      if (cross_entropy) {
        for (int64_t c = 0; c < N; ++c) {
          most = B::max(most, i.load(t.f + c * S));
          total += i.load(targets + c * ld());
        }
        for (int64_t c = 0; c < N; ++c) {
          const auto e = B::exp(i.load(t.f + c * S) - most);
          norm += e;
          i.store(t.share + c * ld(), e);
        }
      }
      for (int64_t c = 0; c < N; ++c) {
        auto value = i.load(t.f + c * S);
        if (cross_entropy) {
          const auto share = i.load(t.share + c * ld()) / norm;
          i.store(t.share + c * ld(), share);
          value = share * total;
        }
        i.store(t.g + c * ld(), value - i.load(targets + c * ld()));
      }
    });
  }

  // to may be p
  KERNELMETA_INLINE void step(const Scratch& t, const C* p, C* to) const {
    outputs(t, p);
    loss_gradient(t);
    const C kept = C(1) - lr * decay;
    block.features(N, S, [&](int64_t c, auto row) {
      row.each([&](auto i) {
        i.store(to + c * S, i.load(p + c * S) * kept - i.load(row_weights) * i.load(t.g + c * ld()) * lr);
      });
    });
  }

  // The checkpoints of a level from step `base` on, each reach / kBranch steps apart, as far as `end` needs
  // them.
  KERNELMETA_INLINE void refill(const Adjoint& t, int64_t level, int64_t levels, int64_t reach, int64_t base,
                                int64_t end) const {
    const int64_t R = N * S, ld_ = ldk(), apart = reach / kBranch;
    C* own = t.checkpoints + level * kBranch * ld_;
    const C* from = level + 1 < levels ? own + (kBranch + base / reach % kBranch) * ld_ : nullptr;
    block.unfenced().each_item(R, [&](int64_t i) { own[i] = from ? from[i] : C(0); });
    for (int64_t n = 1; n < kBranch && base + n * apart < end; ++n) {
      const C* p = own + (n - 1) * ld_;
      C* to = own + n * ld_;
      for (int64_t k = 0; k < apart; ++k) step(t.scratch, k == 0 ? p : to, to);
    }
  }

  // gp: gradient of the state after the step -> before it. gf [R] is the gradient of f.
  KERNELMETA_INLINE void step_backward(const Adjoint& t, const C* p, C* gp, C* gf, C* gstart,
                                       C* gtargets) const {
    const int64_t R = N * S;
    outputs(t.scratch, p);
    loss_gradient(t.scratch);
    block.columns(S, [&](auto i) {
      auto by_rate = i.zero(), by_decay = i.zero(), by_weight = i.zero(), along = i.zero(), total = i.zero();
      const auto weight = i.load(row_weights);
      for (int64_t c = 0; c < N; ++c) {
        const auto gp_c = i.load(gp + c * S), p_c = i.load(p + c * S), y = i.load(targets + c * ld());
        const auto g = i.load(t.scratch.g + c * ld());
        by_rate -= gp_c * (p_c * decay + g * weight);
        by_decay -= gp_c * p_c * lr;
        by_weight -= gp_c * g * lr;
        const auto v = gp_c * weight * (C(0) - lr);
        i.store(t.v + c * ld(), v);
        if (cross_entropy) along += i.load(t.scratch.share + c * ld()) * v;
        total += y;
      }
      i.store(t.glr, i.load(t.glr) + by_rate);
      i.store(t.gdecay, i.load(t.gdecay) + by_decay);
      i.store(t.gweights, i.load(t.gweights) + by_weight);
      for (int64_t c = 0; c < N; ++c) {
        const auto v = i.load(t.v + c * ld());
        auto through_f = v, through_y = i.zero() - v;
        if (cross_entropy) {
          through_f = i.load(t.scratch.share + c * ld()) * total * (v - along);
          through_y = along - v;
        }
        i.store(gtargets + c * ld(), i.load(gtargets + c * ld()) + through_y);
        i.store(t.v + c * ld(), through_f);
      }
    });
    const C kept = C(1) - lr * decay;
    block.features(N, S, [&](int64_t c, auto row) {
      row.each([&](auto i) {
        const auto v = i.load(t.v + c * ld());
        i.store(gf + c * S, v);
        i.store(gstart + c * S, i.load(gstart + c * S) + v);
        i.store(gp + c * S, i.load(gp + c * S) * kept);
      });
    });
    block.unfenced().mm_add(1, R, R, {gf, 0, 1}, kernel, ldk(), gp, ldk());
  }
};

}  // namespace kernelmeta
