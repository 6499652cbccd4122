// BatchNorm's gain and shift, folded into the linear layer that follows, once a call; and their gradients,
// unfolded from the folded layer's. With n the normalised activations,
//   W (gain * n + shift) + b  =  (W diag(gain)) n + (b + W shift).
// For Blocks whose lanes are scalars.
#pragma once

#include "engine/mlp.h"

namespace kernelmeta {

// Contiguous arrays; `C` is const for parameters and not for their gradients.
template <class C>
struct MlpArrays {
  C *weight1, *bias1, *gain1, *shift1;  // [H, N], [H], [H], [H]
  C *weight2, *bias2, *gain2, *shift2;  // [H, H], [H], [H], [H]
  C *weight3, *bias3;                   // [outputs, H], [outputs]
};

// `running` is [2][2][H] (layer; mean, variance; unit), or null as in the FoldedMlp's construction.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void fold(B& block, const MlpArrays<const C>& p, const C* running,
                            const typename B::Sizes& s, const FoldedMlp<C>& to) {
  const int64_t H = s.H, N = s.N, outputs = s.outputs();
  block.unfenced().feature_entries(1, H * N, [&](int64_t, auto i) { i.store(to.w1, i.load(p.weight1)); });
  // Row i of the second layer, then of the third, then what is only copied.
  block.unfenced().features(H + outputs + 1, H, [&](int64_t i, auto row) {
    if (i == H + outputs) {
      row.each([&](auto j) {
        j.store(to.b1, j.load(p.bias1));
        if (running) {
          j.store(to.mean1, j.load(running));
          j.store(to.istd1, B::inverse_std(j.load(running + H), 1, kNormEps));
          j.store(to.mean2, j.load(running + 2 * H));
          j.store(to.istd2, B::inverse_std(j.load(running + 3 * H), 1, kNormEps));
        }
      });
      return;
    }
    const bool second = i < H;
    const C* weight = second ? p.weight2 + i * H : p.weight3 + (i - H) * H;
    const C *gain = second ? p.gain1 : p.gain2, *shift = second ? p.shift1 : p.shift2;
    C* to_weight = second ? to.w2 + i * H : to.w3 + (i - H) * H;
    const C* bias = second ? p.bias2 + i : p.bias3 + (i - H);
    C* to_bias = second ? to.b2 + i : to.b3 + (i - H);
    const double own = *bias;  // read beside the weights, not after them
    const double sum = row.sum([&](auto j) {
      const C w = j.load(weight);
      j.store(to_weight, w * j.load(gain));
      return double(w) * double(j.load(shift));
    });
    row.one([&] { *to_bias = C(own + sum); });
  });
}

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void unfold(B& block, const MlpArrays<const C>& p, const FoldedMlpGrad<C>& folded,
                              const typename B::Sizes& s, const MlpArrays<C>& grad) {
  const int64_t H = s.H, N = s.N, outputs = s.outputs(), ld = padded(H);
  // Sums over the layer's outputs; one lane a hidden unit.
  const auto gain_and_shift = [H, ld](auto row, int64_t outputs, const C* weight, const C* gw, const C* gb,
                                      C* grad_gain, C* grad_shift) {
    row.column_sums(
        outputs, [&](int64_t i, auto j) { return j.load(gw + i * ld) * j.load(weight + i * H); }, grad_gain);
    row.column_sums(outputs, [&](int64_t i, auto j) { return gb[i] * j.load(weight + i * H); }, grad_shift);
  };
  block.unfenced().features(H + outputs + 3, H, [&](int64_t i, auto row) {
    if (i == H + outputs) {
      gain_and_shift(row, H, p.weight2, folded.w2, folded.b2, grad.gain1, grad.shift1);
    } else if (i == H + outputs + 1) {
      gain_and_shift(row, outputs, p.weight3, folded.w3, folded.b3, grad.gain2, grad.shift2);
    } else if (i == H + outputs + 2) {
      row.each([&](auto j) {
        j.store(grad.bias1, j.load(folded.b1));
        for (int64_t n = 0; n < N; ++n) grad.weight1[j.at * N + n] = folded.w1t[n * ld + j.at];
      });
    } else {
      const bool second = i < H;
      const int64_t o = second ? i : i - H;
      const C *gain = second ? p.gain1 : p.gain2, *shift = second ? p.shift1 : p.shift2;
      const C* gw = (second ? folded.w2 : folded.w3) + o * ld;
      const C gb = (second ? folded.b2 : folded.b3)[o];
      C* to = (second ? grad.weight2 : grad.weight3) + o * H;
      row.each([&](auto j) { j.store(to, j.load(gw) * j.load(gain) + gb * j.load(shift)); });
      row.one([&] { (second ? grad.bias2 : grad.bias3)[o] = gb; });
    }
  });
}

}  // namespace kernelmeta
