// Sums over tasks, and the tensors that their parts go to.
#pragma once

#include "engine/sum_parts.h"
#include "ops/mlp_tensors.h"

namespace kernelmeta {

// Grad: a struct that takes its arrays from an Arena; `grad` is one, so that its parts can be named.
template <class C, class Grad>
class Sums {
 public:
  template <class... Args>
  explicit Sums(const Args&... args)
      : memory_(allocate<C>(size_of<Grad, C>(args...))), arena_(memory_.get()), grad(arena_, args...) {}

  int64_t size() const { return arena_.used(); }
  const SumParts<C>& parts() const { return parts_; }

  // A part of the sum goes to a tensor.
  void send(const C* part, const Tensor& to) { parts_.add(part - memory_.get(), to.numel(), data<C>(to)); }
  void send_if(bool wanted, const C* part, const Tensor& to) {
    if (wanted) send(part, to);
  }
  // The sums of the folded MLP's gradients become those of the MLP's.
  void unfold(const FoldedMlpGrad<C>& part, const Sizes& s, const MlpParameters<C>& mlp,
              const MlpGradients<C>& to) {
    unfolds_ = true;
    mlp_offset_ = part.w1t - memory_.get();
    s_ = s;
    mlp_ = mlp.arrays();
    mlp_to_ = to.arrays();
  }

  bool unfolds() const { return unfolds_; }
  int64_t mlp_offset() const { return mlp_offset_; }
  const Sizes& sizes() const { return s_; }
  const MlpArrays<const C>& mlp() const { return mlp_; }
  const MlpArrays<C>& mlp_to() const { return mlp_to_; }

 private:
  std::unique_ptr<C[]> memory_;
  Arena<C> arena_;
  SumParts<C> parts_;
  bool unfolds_ = false;
  int64_t mlp_offset_ = 0;
  Sizes s_{};
  MlpArrays<const C> mlp_{};
  MlpArrays<C> mlp_to_{};

 public:
  Grad grad;
};

}  // namespace kernelmeta
