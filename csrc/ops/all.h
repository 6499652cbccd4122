// Every op, in one list: what a device registers, and what the schemas are written from.
#pragma once

#include "ops/class_means.h"
#include "ops/focal_distillation.h"
#include "ops/linear_head.h"
#include "ops/linearised_descent.h"
#include "ops/ntk_gram.h"
#include "ops/program.h"
#include "ops/ridge.h"
#include "ops/sib.h"
#include "ops/synthetic_gradient_mlp.h"

namespace kernelmeta {

template <class... Ops>
struct OpList {
  template <class Device>
  static void register_on(torch::stable::detail::StableLibrary& library) {
    (library.impl(Ops::name, &boxed<Ops, Device>), ...);
  }
  // One a line.
  static std::string schemas() { return ((schema_of<Ops>() + "\n") + ...); }
};

using AllOps = OpList<SibOp, SibBackwardOp, MlpOp, MlpBackwardOp, ClassMeansOp, ClassMeansBackwardOp, HeadOp,
                      HeadBackwardOp, ProgramOp, ProgramBackwardOp, RidgeOp, RidgeBackwardOp, DistillationOp,
                      DistillationBackwardOp, DescentOp, DescentBackwardOp, NtkOp, NtkBackwardOp>;

// A loss and its gradients in one pass over the tasks: on a CPU alone, so far.
using TrainingOps = OpList<SibGradientsOp, HeadGradientsOp>;

}  // namespace kernelmeta
