// What one thread block does for programs and for ridge regression; see bodies.h. Tasks may differ in size:
// a block's memory is laid out anew for each. What lasts for all of a block's tasks comes first, and so
// always in the same place.
//
// Where nobody has looked at the offsets before (TaskRows::most), the blocks do: if they do not rise from 0
// to the number of rows, all results are NaN; a task with more rows than it may have, or fewer ways than 1 or
// more than N, is invalid, as one with wrong labels.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/bodies.h"
#include "cuda/program_call.h"
#include "engine/ridge_task.h"

namespace kernelmeta {

// What blocks lay out that run on any of `tasks`, in so much shared memory. Where their sizes are unknown,
// one task is as large as any: a smaller one may fit arrays into shared memory that the large one does not,
// and leave others out.
template <class B, class Layout, class F, class... Args>
Used task_memory(const F& f, const std::vector<int64_t>& tasks, int64_t capacity, const Sizes& sizes,
                 const Args&... args) {
  const auto laid_out = [&](int64_t t, int64_t capacity) {
    Arena<typename B::Scalar> count(nullptr, capacity, nullptr);
    B block;
    Layout unused(count, block, sizes, f, args..., t);
    return Used{count.used(), count.rest_used()};
  };
  Used used;
  for (const int64_t t : tasks) {
    const Used of_task = laid_out(t, capacity);
    used = {std::max(used.shared, of_task.shared), std::max(used.workspace, of_task.workspace)};
  }
  const bool unknown = f.problem.support.most >= 0;
  if (unknown && laid_out(tasks[0], INT64_MAX).shared > capacity) {
    used = {capacity, laid_out(tasks[0], 0).workspace};
  }
  return used;
}

// Whether the offsets rise from 0 to the number of rows, where nobody has looked before.
template <class B>
KERNELMETA_INLINE bool offsets_rise(B& block, const TaskRows& rows, int64_t T) {
  if (rows.most < 0) return true;
  return !block.any(T + 1, [&](int64_t t) {
    const int64_t at = rows.offsets[t];
    return at < (t == 0 ? 0 : rows.offsets[t - 1]) || (t == 0 && at > 0) || (t == T && at != rows.all);
  });
}

template <class B, class Problem>
KERNELMETA_INLINE bool offsets_rise(B& block, const Problem& p) {
  return offsets_rise(block, p.support, p.T) && offsets_rise(block, p.query, p.T);
}

// The block's share of out [n] (or null)
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void fill_share_nan(B& block, C* out, int64_t n, BlockTasks tasks) {
  const int64_t first = n * tasks.first / tasks.step;
  fill_nan(block, out ? out + first : nullptr, n * (tasks.first + 1) / tasks.step - first);
}

// Whether the sizes, labels or indices of task t cannot be used. Its barrier also parts the task from what is
// left to do of the one before.
template <class B, class Problem>
KERNELMETA_INLINE bool task_is_invalid(B& block, const Problem& p, int64_t t) {
  const int64_t ways = p.classes.count(t, p.N);
  if (p.support.most >= 0 && (p.support.count(t) > p.support.most || p.query.count(t) > p.query.most ||
                              p.query.count(t) < 1 || ways < 1 || ways > p.N)) {
    return true;
  }
  const Sizes s{1, p.support.count(t), p.query.count(t), ways, p.D, 0, 0};
  const Features query = p.query.of(t);
  return is_invalid(block, 0, s, p.classes.table.labels + p.support.first(t), p.every_class(),
                    p.support.of(t), &query);
}

// Whether the offsets of a program's bags do not rise from 0 to the task's number of query rows.
template <class B, class C>
KERNELMETA_INLINE bool bags_are_invalid(B& block, const ProgramProblem<C>& p, int64_t t) {
  const int64_t* offsets = p.bag_offsets + t * (p.bags + 1);
  return p.bag_offsets && block.any(p.bags + 1, [&](int64_t b) {
    if (b == 0) return offsets[0] != 0;
    return offsets[b] < offsets[b - 1] || (b == p.bags && offsets[b] != p.query.count(t));
  });
}

// out [first row of t ..][width], of all rows of task t
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void fill_rows_nan(B& block, const TaskRows& rows, int64_t t, int64_t width, C* out) {
  fill_nan(block, out ? out + rows.first(t) * width : nullptr, rows.count(t) * width);
}

template <class B>
struct ProgramForwardLayout {
  using C = typename B::Scalar;

  FoldedMlp<C> mlp;
  ProgramTask<B> task;
  KeptMemory<C> kept;

  KERNELMETA_INLINE ProgramForwardLayout(Arena<C>& arena, B& block, const Sizes& of_mlp,
                                         const ProgramForward<C>& f, const ProgramDeviceCall<C>& call,
                                         int64_t t)
      : mlp(arena, of_mlp, call.running != nullptr),
        task(arena, block, f.problem, call.phases, mlp, t),
        kept(arena, program_trace_size(f.problem, task.shape), f.trace != nullptr) {
    task.bind(kept.at(f.trace ? f.trace + t * call.stride : nullptr));
  }
};

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void program_forward_body(void* place, const ProgramForward<C>& f,
                                            const ProgramDeviceCall<C>& call, Arena<C> arena,
                                            BlockTasks tasks) {
  const ProgramProblem<C>& p = f.problem;
  bool begun = false;
  if (B block; !offsets_rise(block, p)) {
    fill_share_nan(block, f.logits, p.query.all * p.N, tasks);
    fill_share_nan(block, f.support_coefficients, p.support.all * p.N, tasks);
    fill_share_nan(block, f.query_coefficients, p.query.all * p.N, tasks);
    fill_share_nan(block, f.start_coefficients, p.T * p.N, tasks);
    fill_share_nan(block, f.trace, p.T * call.stride, tasks);
    return;
  }
  for (int64_t t = tasks.first; t < p.T; t += tasks.step) {
    B block;
    C* kept = f.trace ? f.trace + t * call.stride : nullptr;
    if (task_is_invalid(block, p, t) || bags_are_invalid(block, p, t)) {
      fill_rows_nan(block, p.query, t, p.N, f.logits);
      fill_rows_nan(block, p.support, t, p.N, f.support_coefficients);
      fill_rows_nan(block, p.query, t, p.N, f.query_coefficients);
      fill_nan(block, f.start_coefficients ? f.start_coefficients + t * p.N : nullptr, p.N);
      fill_nan(block, kept, call.stride);
      continue;
    }
    auto& w = BlockMemory<B, ProgramForwardLayout<B>>::make(place, arena, call.sizes, f, call, t).w;
    if (p.H && !begun) fold(block, call.mlp, call.running, call.sizes, w.mlp);
    begun = true;
    block.unfenced().features_zero(1, w.kept.elements, w.kept.at(kept));
    w.task.forward(f);
    w.kept.copy_out(block, kept);
  }
}

template <class B>
struct ProgramBackwardLayout {
  using C = typename B::Scalar;

  FoldedMlp<C> mlp;
  BlockSums<ProgramGrad<C>, C> sums;
  ProgramTask<B> task;
  typename ProgramLoop<B>::Adjoint adjoint;
  KeptMemory<C> kept;
  typename ProgramFeatures<B>::Scratch scratch;
  C* gtheta0;

  KERNELMETA_INLINE ProgramBackwardLayout(Arena<C>& arena, B& block, const Sizes& of_mlp,
                                          const ProgramBackward<C>& f, const ProgramDeviceCall<C>& call,
                                          int64_t t)
      : mlp(arena, of_mlp, call.running != nullptr),
        sums(arena, f.problem),
        task(arena, block, f.problem, call.phases, mlp, t),
        adjoint(arena, task.shape),
        kept(arena, program_trace_size(f.problem, task.shape), true),
        scratch(arena, task.shape, f.grad_support || f.grad_query),
        gtheta0(arena.take(f.problem.start == Start::kClassMeans ? task.shape.N * f.problem.D : 0)) {
    task.bind(kept.at(f.trace + t * call.stride));
  }
};

// partial: the block's own sums over its tasks, a ProgramGrad of `size` elements.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void program_backward_body(void* place, const ProgramBackward<C>& f,
                                             const ProgramDeviceCall<C>& call, C* partial, int64_t size,
                                             Arena<C> arena, BlockTasks tasks) {
  using Memory = BlockMemory<B, ProgramBackwardLayout<B>>;
  const ProgramProblem<C>& p = f.problem;
  B block;
  bool begun = false, broken = false;
  if (!offsets_rise(block, p)) {
    fill_share_nan(block, f.grad_support, p.support.all * p.D, tasks);
    fill_share_nan(block, f.grad_query, p.query.all * p.D, tasks);
    fill_share_nan(block, f.grad_start, p.T * p.N * p.D, tasks);
    fill_share_nan(block, f.grad_proportions, p.T * p.bags * p.N, tasks);
    fill_nan(block, partial, size);
    return;
  }
  for (int64_t t = tasks.first; t < p.T; t += tasks.step) {
    if (task_is_invalid(block, p, t) || bags_are_invalid(block, p, t)) {
      fill_rows_nan(block, p.support, t, p.D, f.grad_support);
      fill_rows_nan(block, p.query, t, p.D, f.grad_query);
      fill_nan(block, f.grad_start ? f.grad_start + t * p.N * p.D : nullptr, p.N * p.D);
      fill_nan(block, f.grad_proportions ? f.grad_proportions + t * p.bags * p.N : nullptr, p.bags * p.N);
      broken = true;
      continue;
    }
    auto& w = Memory::make(place, arena, call.sizes, f, call, t).w;
    if (!begun) {
      if (p.H) fold(block, call.mlp, call.running, call.sizes, w.mlp);
      w.sums.clear(block);
      begun = true;
    }
    w.kept.copy_in(block, f.trace + t * call.stride);
    w.task.backward(f, w.sums.grad, w.adjoint, w.scratch, w.gtheta0);
  }
  if (broken)
    fill_nan(block, partial, size);
  else if (begun)
    static_cast<Memory*>(place)->w.sums.copy_out(block, partial);
  else
    block.features_zero(1, size, partial);
}

template <class B>
struct RidgeForwardLayout {
  using C = typename B::Scalar;

  RidgeTask<B> task;
  KeptMemory<C> kept;
  bool regular;  // a singular system has given NaN already

  KERNELMETA_INLINE RidgeForwardLayout(Arena<C>& arena, B& block, const Sizes&, const RidgeForward<C>& f,
                                       int64_t stride, int64_t t)
      : task(arena, block, f.problem, t), kept(arena, ridge_trace_size<C>(task.s), f.trace != nullptr) {
    task.bind(kept.at(f.trace ? f.trace + t * stride : nullptr));
  }
};

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void ridge_forward_body(void* place, const RidgeForward<C>& f, int64_t stride,
                                          Arena<C> arena, BlockTasks tasks) {
  const RidgeProblem<C>& p = f.problem;
  if (B block; !offsets_rise(block, p)) {
    fill_share_nan(block, f.logits, p.query.all * p.N, tasks);
    fill_share_nan(block, f.coefficients, p.support.all * p.N, tasks);
    fill_share_nan(block, f.trace, p.T * stride, tasks);
    return;
  }
  for (int64_t t = tasks.first; t < p.T; t += tasks.step) {
    B block;
    C* kept = f.trace ? f.trace + t * stride : nullptr;
    if (task_is_invalid(block, p, t)) {
      fill_rows_nan(block, p.query, t, p.N, f.logits);
      fill_rows_nan(block, p.support, t, p.N, f.coefficients);
      fill_nan(block, kept, stride);
      continue;
    }
    auto& w = BlockMemory<B, RidgeForwardLayout<B>>::make(place, arena, Sizes{}, f, stride, t).w;
    w.task.prepare();
    block.features_zero(1, w.kept.elements, w.kept.at(kept));
    w.task.forward(f, &w.regular);
    w.kept.copy_out(block, kept);
  }
}

template <class B>
struct RidgeBackwardLayout {
  using C = typename B::Scalar;

  BlockSums<RidgeGrad<C>, C> sums;
  RidgeTask<B> task;
  KeptMemory<C> kept;
  typename Ridge<B>::Scratch scratch;

  KERNELMETA_INLINE RidgeBackwardLayout(Arena<C>& arena, B& block, const Sizes&, const RidgeBackward<C>& f,
                                        int64_t stride, int64_t t)
      : sums(arena),
        task(arena, block, f.problem, t),
        kept(arena, ridge_trace_size<C>(task.s), true),
        scratch(arena, task.s, f.grad_support || f.grad_query) {
    task.bind(kept.at(f.trace + t * stride));
  }
};

// partial: the block's own sums over its tasks, a RidgeGrad of `size` elements.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void ridge_backward_body(void* place, const RidgeBackward<C>& f, int64_t stride, C* partial,
                                           int64_t size, Arena<C> arena, BlockTasks tasks) {
  using Memory = BlockMemory<B, RidgeBackwardLayout<B>>;
  const RidgeProblem<C>& p = f.problem;
  B block;
  bool begun = false, broken = false;
  if (!offsets_rise(block, p)) {
    fill_share_nan(block, f.grad_support, p.support.all * p.D, tasks);
    fill_share_nan(block, f.grad_query, p.query.all * p.D, tasks);
    fill_nan(block, partial, size);
    return;
  }
  for (int64_t t = tasks.first; t < p.T; t += tasks.step) {
    if (task_is_invalid(block, p, t)) {
      fill_rows_nan(block, p.support, t, p.D, f.grad_support);
      fill_rows_nan(block, p.query, t, p.D, f.grad_query);
      broken = true;
      continue;
    }
    auto& w = Memory::make(place, arena, Sizes{}, f, stride, t).w;
    if (!begun) w.sums.clear(block);
    begun = true;
    w.kept.copy_in(block, f.trace + t * stride);
    w.task.backward(f, w.sums.grad, w.scratch);
  }
  if (broken)
    fill_nan(block, partial, size);
  else if (begun)
    static_cast<Memory*>(place)->w.sums.copy_out(block, partial);
  else
    block.features_zero(1, size, partial);
}

}  // namespace kernelmeta
