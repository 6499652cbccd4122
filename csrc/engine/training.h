// An op and its backward in one pass over the tasks, for a loss known beforehand: the mean cross entropy.
#pragma once

#include "engine/linear_head_task.h"

namespace kernelmeta {

// Sums over tasks.
template <class C, class Grad>
struct TrainingSums {
  Grad grad;
  C* measures;  // [2]; see QueryLoss

  __forceinline__ TrainingSums(Arena<C>& arena, const Sizes& s) : grad(arena, s), measures(arena.take(2)) {}
};

template <class C, class Forward, class Grad>
struct Training {
  using Sums = TrainingSums<C, Grad>;

  Forward forward;        // without a trace
  const int64_t* labels;  // [T][Q], of the query rows
  C share;                // of one row in the mean
};
template <class C>
using SibTraining = Training<C, SibForward<C>, SibParameterGrad<C>>;
template <class C>
using HeadTraining = Training<C, HeadForward<C>, HeadParameterGrad<C>>;

}  // namespace kernelmeta
