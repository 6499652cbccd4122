// BatchNorm's gain and shift, folded into the linear layer that follows, once a call; and their gradients,
// unfolded from the folded layer's. With n the normalised activations,
//   W (gain * n + shift) + b  =  (W diag(gain)) n + (b + W shift).
#pragma once

#include "engine/mlp.h"

namespace kernelmeta {

// Contiguous arrays; `C` is const for parameters and not for their gradients.
template <class C>
struct MlpArrays {
  C *weight1, *bias1, *gain1, *shift1;  // [H, N], [H], [H], [H]
  C *weight2, *bias2, *gain2, *shift2;  // [H, H], [H], [H], [H]
  C *weight3, *bias3;                   // [N, H], [N]
};

// `running` is [2][2][H] (layer; mean, variance; unit) or null.
template <class C>
FoldedMlp<C> fold(const MlpArrays<const C>& p, const C* running, const Sizes& s, Arena<C>& arena) {
  const int64_t H = s.H;
  const auto linear = [H](const C* weight, const C* gain, const C* bias, const C* shift, int64_t outputs,
                          C* to_weight, C* to_bias) {
    for (int64_t i = 0; i < outputs; ++i) {
      const C* row = weight + i * H;
      C* to = to_weight + i * H;
      double sums[8] = {double(bias[i])};  // eight chains of additions instead of one long one
      int64_t j = 0;
      for (; j + 8 <= H; j += 8) {
        for (int64_t l = 0; l < 8; ++l) sums[l] += double(row[j + l]) * double(shift[j + l]);
      }
      for (; j < H; ++j) sums[0] += double(row[j]) * double(shift[j]);
#pragma GCC ivdep
      for (j = 0; j < H; ++j) to[j] = row[j] * gain[j];
      to_bias[i] =
          C(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
    }
  };
  C* w2 = arena.take(H * H);
  C* b2 = arena.take(H);
  C* w3 = arena.take(s.N * H);
  C* b3 = arena.take(s.N);
  C* istd = running ? arena.take(2 * H) : nullptr;
  linear(p.weight2, p.gain1, p.bias2, p.shift1, H, w2, b2);
  linear(p.weight3, p.gain2, p.bias3, p.shift2, s.N, w3, b3);
  for (int64_t h = 0; running && h < H; ++h) {
    istd[h] = C(1) / C(__builtin_sqrt(running[H + h] + C(kNormEps)));
    istd[H + h] = C(1) / C(__builtin_sqrt(running[3 * H + h] + C(kNormEps)));
  }
  return {p.weight1,
          p.bias1,
          w2,
          b2,
          w3,
          b3,
          running,
          istd,
          running ? running + 2 * H : nullptr,
          istd ? istd + H : nullptr};
}

template <class C>
void unfold(const MlpArrays<const C>& p, const FoldedMlpGrad<C>& folded, const Sizes& s,
            const MlpArrays<C>& grad) {
  const int64_t H = s.H, N = s.N, ld = padded(H);
  for (int64_t h = 0; h < H; ++h) {
    for (int64_t n = 0; n < N; ++n) grad.weight1[h * N + n] = folded.w1t[n * ld + h];
    grad.bias1[h] = folded.b1[h];
  }
  const auto linear = [H, ld](const C* weight, const C* gain, const C* shift, int64_t outputs, const C* gw,
                              const C* gb, C* grad_weight, C* grad_bias, C* grad_gain, C* grad_shift) {
    for (int64_t j = 0; j < H; ++j) grad_gain[j] = grad_shift[j] = 0;
    for (int64_t i = 0; i < outputs; ++i) {
#pragma GCC ivdep
      for (int64_t j = 0; j < H; ++j) {
        grad_weight[i * H + j] = gw[i * ld + j] * gain[j] + gb[i] * shift[j];
        grad_gain[j] += gw[i * ld + j] * weight[i * H + j];
        grad_shift[j] += gb[i] * weight[i * H + j];
      }
      grad_bias[i] = gb[i];
    }
  };
  linear(p.weight2, p.gain1, p.shift1, H, folded.w2, folded.b2, grad.weight2, grad.bias2, grad.gain1,
         grad.shift1);
  linear(p.weight3, p.gain2, p.shift2, N, folded.w3, folded.b3, grad.weight3, grad.bias3, grad.gain2,
         grad.shift2);
}

}  // namespace kernelmeta
