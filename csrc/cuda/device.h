// A GPU as the ops see it: the current stream of the tensors' device, memory of a call, launches. Nothing
// waits for the device and nothing is copied to the host, so that all of it can be captured in a CUDA graph
// (but for sizes of tasks that nobody bounds; see ops/tasks.h). A task whose labels or indices cannot be used
// gives NaN.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#include "ops/sib.h"

namespace kernelmeta::cuda {

// How a device runs each op: constructed from the device and the op's arguments, with `forward` and
// `backward`.
template <class Arguments>
class Kernel;

// Makes the tensors' device the current one while an op runs.
class Device {
 public:
  template <class Arguments>
  using Kernel = cuda::Kernel<Arguments>;

  explicit Device(const Tensor& t) : on_(t), guard_(on_.index), stream_{on_.index, nullptr} {
    if (aoti_torch_get_current_cuda_stream(on_.index, &stream_.handle) != AOTI_TORCH_SUCCESS)
      throw std::runtime_error("kernelmeta: PyTorch names no current CUDA stream");
  }

  const TensorDevice& on() const { return on_; }
  const Stream& stream() const { return stream_; }

  // The features as one kernel reads them: the query's type for the support too, the precision of the
  // computation for theta0 and where the types differ.
  template <class C>
  SibFeatures readable(SibFeatures f) const {
    if (!f.support_labels)
      f.start = wide<C>(f.start);
    else
      alike<C>(f.start, f.query);
    return f;
  }
  template <class C, class Features>
  Features readable(Features f) const {
    alike<C>(f.support, f.query);
    return f;
  }

  // New and old logits of one type.
  template <class C, class Logits>
  Logits readable_logits(Logits logits) const {
    alike<C>(logits.new_logits, logits.old_logits);
    return logits;
  }

 private:
  TensorDevice on_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;

  template <class C>
  static Tensor wide(const Tensor& t) {
    return t.scalar_type() == kType<C> ? t : torch::stable::to(t, kType<C>);
  }
  template <class C>
  static void alike(Tensor& support, Tensor& query) {
    if (support.scalar_type() == query.scalar_type()) return;
    support = wide<C>(support);
    query = wide<C>(query);
  }
};

// Memory of a call, freed in the order of the stream.
template <class C>
class Scratch {
 public:
  Scratch(const Device& device, int64_t elements) : tensor_(empty<C>(device.on(), {elements})) {}
  // What a plan asks for.
  Scratch(const Device& device, const Plan& plan) : Scratch(device, plan.blocks * plan.workspace) {}
  operator C*() const { return data<C>(tensor_); }

 private:
  Tensor tensor_;
};

// Sums over tasks, one partial sum a block; a backward kernel adds to them, `finish` sends their total to
// where `sums` says.
template <class C>
class BlockSums {
 public:
  // size: of one partial sum.
  BlockSums(const Device& device, const Plan& plan, int64_t size)
      : device_(device),
        size_(size),
        partials_(empty<C>(device.on(), {std::max<int64_t>(plan.blocks, 1), size})) {
    if (plan.blocks == 0) torch::stable::zero_(partials_);  // one zero
  }
  operator C*() const { return data<C>(partials_); }

  template <class Grad>
  void finish(const Sums<C, Grad>& sums) const {
    SumParts<C> parts = sums.parts();
    const Scratch<C> total(device_, sums.unfolds() ? size_ : 0);
    if (sums.unfolds()) parts.add(0, size_, total);
    if (parts.count > 0) {
      launch_sum_partials<C>(*this, partials_.size(0), size_, C(1), parts, device_.stream());
    }
    if (sums.unfolds()) {
      launch_unfold<C>(sums.sizes(), sums.mlp(), total + sums.mlp_offset(), sums.mlp_to(), device_.stream());
    }
  }

 private:
  const Device& device_;
  int64_t size_;
  Tensor partials_;
};

}  // namespace kernelmeta::cuda
