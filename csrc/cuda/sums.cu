// Sums over blocks or tasks, and the gradients of the MLP's parameters from those of the folded MLP.
#include <algorithm>

#include "cuda/kernel.cuh"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    sum_partials_kernel(const C* partials, int64_t count, int64_t size, C factor,
                        const __grid_constant__ SumParts<C> to) {
  sum_partials_body<B>(partials, count, size, factor, to, block_tasks());
}

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads, 1)
    unfold_kernel(const __grid_constant__ Sizes s, const __grid_constant__ MlpArrays<const C> mlp, C* sums,
                  const __grid_constant__ MlpArrays<C> to) {
  unfold_body<B>(s, mlp, sums, to);
}

Plan plain(int64_t blocks, int64_t shared_bytes) {
  Plan plan;
  plan.blocks = blocks;
  plan.shared_bytes = shared_bytes;
  return plan;
}

}  // namespace

template <class C>
void launch_sum_partials(const C* partials, int64_t count, int64_t size, C factor, const SumParts<C>& to,
                         const Stream& stream) {
  using B = CudaBlock<C>;
  const int64_t blocks = std::min<int64_t>((size + B::kLanes - 1) / B::kLanes, 1024);
  launch<B>("sum over blocks", &sum_partials_kernel<B>, plain(blocks, B::kThreads * int64_t(sizeof(C))),
            stream, partials, count, size, factor, to);
}

template <class C>
void launch_unfold(const Sizes& s, const MlpArrays<const C>& mlp, C* sums, const MlpArrays<C>& to,
                   const Stream& stream) {
  launch<CudaBlock<C>>("unfold", &unfold_kernel<CudaBlock<C>>, plain(1, 0), stream, s, mlp, sums, to);
}

#define INSTANTIATE(C)                                                                                 \
  template void launch_sum_partials(const C*, int64_t, int64_t, C, const SumParts<C>&, const Stream&); \
  template void launch_unfold(const Sizes&, const MlpArrays<const C>&, C*, const MlpArrays<C>&,        \
                              const Stream&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace kernelmeta::cuda
