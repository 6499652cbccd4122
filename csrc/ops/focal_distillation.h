// The tensor side of `focal_distillation` and its backward, once for all devices. How a device runs them:
// cpu/focal_distillation.h, cuda/focal_distillation.h.
#pragma once

#include "engine/focal_distillation.h"
#include "ops/tensors.h"

namespace kernelmeta {

struct DistillationCall {
  Reader& in;
  Tensor new_logits = in.take<Tensor>("new_logits"), old_logits = in.take<Tensor>("old_logits");
  Tensor labels = in.take<Tensor>("labels");
  OptionalTensor class_weight = in.take<OptionalTensor>("class_weight");
  int64_t distance = in.take<int64_t>("distance");
  double alpha = in.take<double>("alpha"), beta = in.take<double>("beta"), tau = in.take<double>("tau");
  double margin = in.take<double>("margin"), power = in.take<double>("power");
  bool label_loss = in.take<bool>("label_loss");
  double label_smoothing = in.take<double>("label_smoothing");
  int64_t ignore_index = in.take<int64_t>("ignore_index");
};

struct DistillationForwardCall {
  Reader& in;
  DistillationCall of{in};
  bool save_trace = in.take<bool>("save_trace");
};

struct DistillationBackwardCall {
  Reader& in;
  Tensor grad_distances = in.take<Tensor>("grad_distances");
  OptionalTensor grad_label_losses = in.take<OptionalTensor>("grad_label_losses");
  Tensor trace = in.take<Tensor>("trace");
  DistillationCall of{in};
  bool need_new_logits = in.take<bool>("need_new_logits");
};

// Logits [R, N]. Rows must be contiguous, nothing else need be.
class LogitRows {
 public:
  LogitRows(const TensorDevice& on, const Tensor& t, const char* name) : tensor_(t) {
    if (!on.holds(t) || t.dim() != 2 || t.size(1) < 1) {
      refuse(std::string(name) + ": expected a " + on.name() + " tensor [R, C] with a class at least, got " +
             shape_text(shape_of(t)));
    }
    if (t.stride(1) != 1 && t.size(1) > 1) tensor_ = torch::stable::contiguous(t);
  }

  Shape shape() const { return shape_of(tensor_); }
  // As the kernels read them: tasks of one row.
  Features features() const {
    return {tensor_.const_data_ptr(), storage(tensor_), 1, tensor_.stride(0), 0, nullptr, 0};
  }

 private:
  Tensor tensor_;
};

// Checked, and as the kernels read them.
template <class C>
struct DistillationArguments {
  TensorDevice on;
  LogitRows now, old;
  Parameter<C> class_weight;
  Tensor labels;
  DistillationProblem<C> problem;

  explicit DistillationArguments(const DistillationCall& call)
      : on(call.new_logits),
        now(on, call.new_logits, "new_logits"),
        old(on, call.old_logits, "old_logits"),
        class_weight(on, call.class_weight, {now.shape()[1]}, "class_weight"),
        labels(dense(call.labels)) {
    require_shape(on, call.old_logits, now.shape(), "old_logits");
    const int64_t R = now.shape()[0], N = now.shape()[1];
    require_shape(on, labels, {R}, "labels");
    require(labels.scalar_type() == ScalarType::Long, "labels must be int64");
    require((storage(call.new_logits) == Storage::kFloat64) == (sizeof(C) == 8) &&
                (storage(call.old_logits) == Storage::kFloat64) == (sizeof(C) == 8),
            "new and old logits: both float64, or neither");
    require(call.distance >= 0 && call.distance <= int64_t(LogitDistance::kLdiMean),
            "distance: no such number");
    require(call.tau > 0, "tau must be above 0");
    require(call.power >= 1, "power must be at least 1");
    Elements().add({R, N}).add({R, DistillationRow::kSize});
    problem = {R,
               N,
               now.features(),
               old.features(),
               integers(labels),
               class_weight,
               LogitDistance(call.distance),
               C(call.alpha),
               C(call.beta),
               C(call.tau),
               C(call.margin),
               C(call.power),
               C(call.label_smoothing),
               call.label_loss,
               call.ignore_index};
    if (on.cpu) check_labels();
  }
  DistillationArguments(const DistillationArguments&) = delete;

 private:
  void check_labels() const {
    for (int64_t r = 0; r < problem.R; ++r) {
      const int64_t label = problem.labels[r];
      if ((label >= 0 && label < problem.N) || label == problem.ignore_index) continue;
      refuse("labels: row " + std::to_string(r) + " has label " + std::to_string(label) +
             "; labels must be in 0.." + std::to_string(problem.N - 1) + ", or ignore_index");
    }
  }
};

struct DistillationOp {
  static constexpr const char* name = "focal_distillation";
  static constexpr size_t results = 4;  // distances, label losses, codes, trace
  using Call = DistillationForwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    const auto run_in = [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.new_logits);
      const DistillationArguments<C> a(device.template readable_logits<C>(call.of));
      const typename Device::template Kernel<DistillationArguments<C>> kernel(device, a);
      const int64_t R = a.problem.R;
      const Tensor distances = empty<C>(a.on, {R});
      const Tensor label_losses = empty_if<C>(call.of.label_loss, a.on, {R});
      const Tensor codes = empty_bytes(a.on, {R});
      const Tensor trace = empty<C>(a.on, {call.save_trace ? R * DistillationRow::kSize : 0});
      kernel.forward({a.problem, data<C>(distances), data_if<C>(call.of.label_loss, label_losses),
                      static_cast<uint8_t*>(codes.mutable_data_ptr()), data_if<C>(call.save_trace, trace)});
      return Tensors<results>{distances, label_losses, codes, trace};
    };
    return call.of.new_logits.scalar_type() == ScalarType::Double ? run_in(double{}) : run_in(float{});
  }
};

struct DistillationBackwardOp {
  static constexpr const char* name = "focal_distillation_backward";
  static constexpr size_t results = 1;  // of the new logits
  using Call = DistillationBackwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.grad_distances, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.new_logits);
      const DistillationArguments<C> a(device.template readable_logits<C>(call.of));
      const typename Device::template Kernel<DistillationArguments<C>> kernel(device, a);
      const int64_t R = a.problem.R;
      const Parameter<C> grad_distances(a.on, call.grad_distances, {R}, "grad_distances");
      const Parameter<C> grad_label_losses(a.on, call.grad_label_losses, {R}, "grad_label_losses");
      const Parameter<C> trace(a.on, call.trace, {R * DistillationRow::kSize}, "trace");
      const Tensor grad_now = empty_if<C>(call.need_new_logits, a.on, {R, a.problem.N});
      if (call.need_new_logits)
        kernel.backward({a.problem, trace, grad_distances, grad_label_losses, data<C>(grad_now)});
      return Tensors<results>{grad_now};
    });
  }
};

}  // namespace kernelmeta
