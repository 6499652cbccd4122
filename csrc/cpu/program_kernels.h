// Programs over a range of tasks; part of kernels.cpp, which is compiled once for each instruction set.
#pragma once

#include "engine/program_features.h"

namespace {

using namespace kernelmeta;

// The features of one task, as widen takes them.
inline Features of_task(const TaskRows& rows, int64_t t) {
  Features f = rows.features;
  f.rows = rows.count(t);
  if (f.index)
    f.index += rows.offsets[t];
  else
    f.data = static_cast<const char*>(f.data) +
             (rows.even ? t * f.task : rows.offsets[t] * f.row) * storage_bytes(f.storage);
  return f;
}

template <class C>
C* widened_rows(Arena<C>& arena, const TaskRows& rows, int64_t t, int64_t D) {
  return needs_widening<C>(rows.features) ? arena.take(rows.count(t) * D) : nullptr;
}

template <class C>
int64_t program_trace_size(const ProgramProblem<C>& p, int64_t t) {
  Arena<C> count;
  ProgramTrace<C> unused(count, p.shape(t), p.start == Start::kClassMeans);
  return count.used();
}

// What forward and backward both need to work on one task. It stays where it is: its parts point at each
// other.
template <class C>
struct ProgramTask {
  using Block = CpuBlock<C>;
  const ProgramProblem<C>& p;
  const int64_t t;
  const ProgramShape shape;
  Block block;
  C *support_buffer, *query_buffer;
  C *support_inverse, *class_sizes, *y, *w1;
  FoldedMlp<C> mlp;
  ProgramParameters<C> parameters;
  ProgramLoop<Block> loop;

  ProgramTask(Arena<C>& arena, const ProgramProblem<C>& p, int64_t t)
      : p(p),
        t(t),
        shape(p.shape(t)),
        support_buffer(widened_rows(arena, p.support, t, p.D)),
        query_buffer(widened_rows(arena, p.query, t, p.D)),
        support_inverse(arena.take(shape.S)),
        class_sizes(arena.take(shape.N)),
        y(arena.take(shape.N * padded(shape.S))),
        w1(p.H && shape.N < p.N ? arena.take(p.H * shape.N) : nullptr),
        mlp(p.mlp),
        parameters{p.scale, p.bias, p.target, p.rates, &mlp, y, class_sizes, p.first_order},
        loop(block, shape, parameters, arena) {}
  ProgramTask(const ProgramTask&) = delete;

  ClassMembers classes() const { return {p.members + p.support.offsets[t], p.class_offsets + t * (p.N + 1)}; }
  Rows<C> support() { return widen(of_task(p.support, t), 0, p.D, support_buffer); }
  Rows<C> query() { return widen(of_task(p.query, t), 0, p.D, query_buffer); }

  // Labels, and of the MLP's first layer what this task's classes need.
  void prepare() {
    const ClassMembers members = classes();
    const int64_t ld = padded(shape.S);
    memset(y, 0, sizeof(C) * shape.N * ld);
    for (int64_t n = 0; n < shape.N; ++n) {
      class_sizes[n] = C(members.count(n));
      for (int32_t j = members.offsets[n]; j < members.offsets[n + 1]; ++j)
        y[n * ld + members.members[j]] = 1;
    }
    if (!w1) return;
    for (int64_t h = 0; h < p.H; ++h) memcpy(w1 + h * shape.N, p.mlp.w1 + h * p.N, sizeof(C) * shape.N);
    mlp.w1 = w1;
  }
  Sizes sizes() const { return {1, shape.S, shape.Q, shape.N, shape.D, shape.H, shape.K}; }
  const C* theta0(const ProgramTrace<C>& trace) const {
    return p.start == Start::kClassMeans ? trace.theta0 : p.theta0;
  }
  ProgramFeatures<Block> features(const Rows<C>& support, const Rows<C>& query,
                                  const ProgramTrace<C>& trace) {
    return {block, shape, support, query, trace, theta0(trace), p.start_bias, p.first_order};
  }
};

// Scratch for the largest of the tasks, laid out anew for each.
template <class Workspace, class C, class... Args>
C* scratch_for_tasks(int64_t begin, int64_t end, const Args&... args) {
  int64_t most = 0;
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> count;
    {
      Workspace unused(count, args..., t);
    }
    most = most > count.used() ? most : count.used();
  }
  return static_cast<C*>(scratch(most * int64_t(sizeof(C))));
}

// [rows][ways] of one task, from [N][ld] of a part of its live rows; zeros where there is nothing.
template <class C>
void coefficients_out(const C* p, RowPart part, int64_t ld, int64_t N, int64_t rows, int64_t ways, C* out) {
  memset(out, 0, sizeof(C) * rows * ways);
  for (int64_t i = 0; i < part.count; ++i) {
    for (int64_t n = 0; n < N; ++n) out[i * ways + n] = p[n * ld + part.first + i];
  }
}

template <class C>
void coefficients_in(const C* from, RowPart part, int64_t ld, int64_t N, int64_t ways, C* p) {
  for (int64_t i = 0; i < part.count; ++i) {
    for (int64_t n = 0; n < N; ++n) p[n * ld + part.first + i] = from[i * ways + n];
  }
}

template <class C>
struct ProgramForwardWorkspace {
  ProgramTask<C> task;
  C* own_trace;
  ProgramForwardWorkspace(Arena<C>& arena, const ProgramProblem<C>& p, bool keeps_trace, int64_t t)
      : task(arena, p, t), own_trace(keeps_trace ? nullptr : arena.take(program_trace_size<C>(p, t))) {}
};

template <class C>
void program_forward(const ProgramForward<C>& f, int64_t begin, int64_t end) {
  const ProgramProblem<C>& p = f.problem;
  const bool keeps_trace = f.trace != nullptr;
  C* memory = scratch_for_tasks<ProgramForwardWorkspace<C>, C>(begin, end, p, keeps_trace);
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(memory);
    ProgramForwardWorkspace<C> w(arena, p, keeps_trace, t);
    ProgramTask<C>& task = w.task;
    const ProgramShape& s = task.shape;
    C* base = keeps_trace ? f.trace + p.trace_offsets[t] : w.own_trace;
    memset(base, 0, sizeof(C) * program_trace_size<C>(p, t));
    Arena<C> trace_arena(base);
    const ProgramTrace<C> trace(trace_arena, s, p.start == Start::kClassMeans);
    task.prepare();
    const Rows<C> support = task.support(), query = task.query();
    if (p.start == Start::kClassMeans) {
      const Sizes sizes = task.sizes();
      ClassMeans<CpuBlock<C>>{task.block, sizes, support, task.classes(), p.weight, task.support_inverse}
          .forward(trace.theta0);
    }
    task.features(support, query, trace).forward();
    task.loop.forward(trace);
    const int64_t first = p.query.offsets[t];
    task.loop.logits(trace, p.N, f.logits + first * p.N);
    if (!p.coefficients) continue;
    const C* last = trace.p + s.K * s.N * s.ld();
    coefficients_out(last, s.support(), s.ld(), s.N, s.S, p.N,
                     f.support_coefficients + p.support.offsets[t] * p.N);
    coefficients_out(last, s.query(), s.ld(), s.N, s.Q, p.N, f.query_coefficients + first * p.N);
    for (int64_t n = 0; n < p.N; ++n) {
      f.start_coefficients[t * p.N + n] = n >= s.N ? C(0) : trace.a ? trace.a[s.K * s.N + n] : C(1);
    }
  }
}

template <class C>
struct ProgramBackwardWorkspace {
  using Block = CpuBlock<C>;
  ProgramTask<C> task;
  typename ProgramLoop<Block>::Adjoint adjoint;
  typename ProgramFeatures<Block>::Scratch scratch;
  C* gtheta0;

  ProgramBackwardWorkspace(Arena<C>& arena, const ProgramProblem<C>& p, bool row_gradients, int64_t t)
      : task(arena, p, t),
        adjoint(arena, task.shape),
        scratch(arena, task.shape, row_gradients),
        gtheta0(arena.take(p.start == Start::kClassMeans ? task.shape.N * p.D : 0)) {}
};

template <class C>
void program_backward(const ProgramBackward<C>& f, const ProgramGrad<C>& grad, int64_t begin, int64_t end) {
  const ProgramProblem<C>& p = f.problem;
  const bool row_gradients = f.grad_support || f.grad_query;
  const bool class_means = p.start == Start::kClassMeans;
  C* memory = scratch_for_tasks<ProgramBackwardWorkspace<C>, C>(begin, end, p, row_gradients);
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(memory);
    ProgramBackwardWorkspace<C> w(arena, p, row_gradients, t);
    ProgramTask<C>& task = w.task;
    const ProgramShape& s = task.shape;
    Arena<C> trace_arena(const_cast<C*>(f.trace) + p.trace_offsets[t]);
    const ProgramTrace<C> trace(trace_arena, s, class_means);
    const int64_t support_first = p.support.offsets[t], query_first = p.query.offsets[t];
    task.prepare();
    if (p.coefficients) {
      memset(w.adjoint.gp, 0, sizeof(C) * s.N * s.ld());
      memset(w.adjoint.ga, 0, sizeof(C) * s.N);
      if (f.grad_start_coefficients) {
        memcpy(w.adjoint.ga, f.grad_start_coefficients + t * p.N, sizeof(C) * s.N);
        coefficients_in(f.grad_support_coefficients + support_first * p.N, s.support(), s.ld(), s.N, p.N,
                        w.adjoint.gp);
        coefficients_in(f.grad_query_coefficients + query_first * p.N, s.query(), s.ld(), s.N, p.N,
                        w.adjoint.gp);
      }
    }
    const ProgramLoopGrad<C> loop_grad{grad.scale, grad.bias, grad.target, grad.rates, &grad.mlp};
    task.loop.backward(trace, f.grad_logits + query_first * p.N, p.N, w.adjoint, loop_grad);

    const Rows<C> support = task.support(), query = task.query();
    ProgramFeatures<CpuBlock<C>> features = task.features(support, query, trace);
    C* gsupport = f.grad_support ? f.grad_support + support_first * p.D : nullptr;
    C* gquery = f.grad_query ? f.grad_query + query_first * p.D : nullptr;
    C* gtheta0 = class_means ? w.gtheta0 : p.start == Start::kLearned ? grad.theta0 : nullptr;
    if (class_means) memset(gtheta0, 0, sizeof(C) * s.N * p.D);
    features.start_backward(w.adjoint, w.scratch, gtheta0, p.cosine ? nullptr : grad.start_bias);
    if (gsupport && !class_means) memset(gsupport, 0, sizeof(C) * s.S * p.D);
    if (class_means) {
      const Sizes sizes = task.sizes();
      ClassMeans<CpuBlock<C>>{task.block, sizes, support, task.classes(), p.weight, task.support_inverse}
          .backward(gtheta0, gsupport, p.weight ? grad.weight : nullptr);
    }
    if (gquery) memset(gquery, 0, sizeof(C) * s.Q * p.D);
    if (row_gradients) features.rows_backward(w.adjoint, w.scratch, gsupport, gquery);
  }
}

template <class C>
constexpr ProgramKernels<C> kProgramKernels = {program_trace_size<C>, program_forward<C>,
                                               program_backward<C>};

}  // namespace
