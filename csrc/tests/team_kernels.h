// The bodies of the CUDA kernels (csrc/cuda/bodies.h) run by teams of host threads, as a table of kernels.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/kernel_table.h"
#include "cuda/ntk_bodies.h"
#include "cuda/program_bodies.h"
#include "tests/host_team.h"
#include "tests/learner_checks.h"

namespace kernelmeta {
namespace {

// F: how features are stored.
template <class C, class F>
using HostBlock = TeamBlock<HostTeam, C, F, Sizes>;

// How much of a block's memory is "shared" (elements), in how many blocks the tasks are shared out, and which
// barrier of the calls that follow is missing.
struct TeamOptions {
  int64_t capacity = INT64_MAX;
  int64_t blocks = 1;
  int64_t removed = -1;
  std::vector<SourceLine> barriers{};  // all that were met, the missing one too
};
inline TeamOptions team_options;
constexpr int64_t kMostShared = 1 << 16;  // for blocks that take all that there is

// body() on a new team, with its stage full of NaN.
template <class C, class Body>
void on_team(Body body) {
  std::vector<Pack<C>> stage(size_t(Staging<C>::kElements / Pack<C>::kSize));
  for (Pack<C>& p : stage) {
    for (C& x : p.v) x = C(NAN);
  }
  HostTeamState state;
  state.stage = stage.data();
  state.removed = team_options.removed - int64_t(team_options.barriers.size());
  run_team(state, body);
  team_options.barriers.insert(team_options.barriers.end(), state.barriers.begin(), state.barriers.end());
}

// body(place, arena, tasks, b) for every block b, in memory full of NaN of the size counted.
template <class Layout, class C, class F, class Body>
void run_blocks_in(int64_t used, int64_t rest_used, int64_t capacity, Body body) {
  using Memory = BlockMemory<HostBlock<C, F>, Layout>;
  for (int64_t b = 0; b < team_options.blocks; ++b) {
    // aligned as shared memory
    std::vector<Pack<C>> fast(size_t(used / Pack<C>::kSize)), slow(size_t(rest_used / Pack<C>::kSize));
    for (auto* memory : {&fast, &slow}) {
      for (Pack<C>& p : *memory) {
        for (C& x : p.v) x = C(NAN);
      }
    }
    const Arena<C> arena(reinterpret_cast<C*>(fast.data()), capacity, reinterpret_cast<C*>(slow.data()));
    alignas(16) unsigned char place[sizeof(Memory)];
    on_team<C>([&] { body(place, arena, BlockTasks{b, team_options.blocks}, b); });
  }
}

// Blocks that lay out a Layout.
template <class Layout, class C, class F, class Body, class... Args>
void run_blocks(const Sizes& s, Body body, const Args&... args) {
  Arena<C> count(nullptr, team_options.capacity, nullptr);
  HostBlock<C, F> block;
  Layout unused(count, block, s, args...);
  run_blocks_in<Layout, C, F>(count.used(), count.rest_used(), team_options.capacity, body);
}

// Blocks that lay out a Layout for each of the tasks of `run`; where their sizes are unknown, with memory for
// one that is as large as any.
template <class Layout, class C, class F, class Run, class Body, class... Args>
void run_task_blocks(const Run& run, const Sizes& s, Body body, const Args&... args) {
  Run known = run;
  auto& p = known.problem;
  const int64_t support[] = {0, p.support.most}, query[] = {0, p.query.most}, ways = p.N;
  std::vector<int64_t> tasks{0};
  if (p.support.most >= 0) {
    p.support.offsets = support;
    p.query.offsets = query;
    p.classes.ways = &ways;
  } else {
    for (int64_t t = 1; t < p.T; ++t) tasks.push_back(t);
  }
  const int64_t capacity = std::min(team_options.capacity, kMostShared);
  const Used used = task_memory<HostBlock<C, F>, Layout>(known, tasks, capacity, s, args...);
  run_blocks_in<Layout, C, F>(used.shared, used.workspace, capacity, body);
}

template <class C, class F>
void team_sib_forward(const SibForward<C>& f, const FoldedMlp<C>&, int64_t, int64_t) {
  const int64_t stride = trace_size<C>(f.problem.s, f.problem.weights);
  run_blocks<SibForwardLayout<HostBlock<C, F>>, C, F>(
      f.problem.s,
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t) {
        sib_forward_body<HostBlock<C, F>>(place, f, stride, arena, tasks);
      },
      f, C(0), C(0));
}

// partials [blocks][size] added up into `to`
template <class C>
void add_partials(const std::vector<C>& partials, int64_t size, C* to) {
  std::vector<C> sums(static_cast<size_t>(size));
  on_team<C>([&] {
    sum_partials_body<HostBlock<C, C>>(partials.data(), team_options.blocks, size, C(1),
                                       SumParts<C>(sums.data(), size), BlockTasks{0, 1});
  });
  for (int64_t i = 0; i < size; ++i) to[i] += sums[size_t(i)];
}

template <class C, class F>
void team_sib_backward(const SibBackward<C>& f, const FoldedMlp<C>&, const SibParameterGrad<C>& grad, int64_t,
                       int64_t) {
  const int64_t stride = trace_size<C>(f.problem.s, f.problem.weights);
  const int64_t size = size_of<SibParameterGrad<C>, C>(f.problem.s);
  std::vector<C> partials(size_t(size * team_options.blocks), C(NAN));
  run_blocks<SibBackwardLayout<HostBlock<C, F>>, C, F>(
      f.problem.s,
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t b) {
        sib_backward_body<HostBlock<C, F>>(place, f, stride, partials.data() + b * size, arena, tasks);
      },
      f, C(0), C(0));
  add_partials(partials, size, grad.mlp.w1t);  // where the sums begin
}

template <class C, class F>
void team_linear_head_forward(const HeadForward<C>& f, int64_t, int64_t) {
  run_blocks<HeadForwardLayout<HostBlock<C, F>>, C, F>(
      f.problem.s,
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t) {
        head_forward_body<HostBlock<C, F>>(place, f, head_trace_size<C>(f.problem.s), arena, tasks);
      },
      f);
}

template <class C, class F>
void team_linear_head_backward(const HeadBackward<C>& f, const HeadParameterGrad<C>& grad, int64_t, int64_t) {
  const int64_t size = size_of<HeadParameterGrad<C>, C>(f.problem.s);
  std::vector<C> partials(size_t(size * team_options.blocks), C(NAN));
  run_blocks<HeadBackwardLayout<HostBlock<C, F>>, C, F>(
      f.problem.s,
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t b) {
        head_backward_body<HostBlock<C, F>>(place, f, head_trace_size<C>(f.problem.s),
                                            partials.data() + b * size, arena, tasks);
      },
      f);
  add_partials(partials, size, grad.weight);  // where the sums begin
}

template <class C>
ProgramDeviceCall<C> device_call(const ProgramProblem<C>& p, const KernelCall<C>& call) {
  ProgramDeviceCall<C> own{};
  std::copy(call.phases, call.phases + p.n_phases, own.phases);
  own.sizes = p.mlp_sizes();
  own.mlp = RawMlp<C>::arrays;
  own.running = RawMlp<C>::running;
  own.stride = call.trace_offsets[1];
  return own;
}

template <class C, class F>
void team_program_forward(const ProgramForward<C>& f, const KernelCall<C>& call, int64_t, int64_t) {
  const ProgramDeviceCall<C> own = device_call(f.problem, call);
  run_task_blocks<ProgramForwardLayout<HostBlock<C, F>>, C, F>(
      f, own.sizes,
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t) {
        program_forward_body<HostBlock<C, F>>(place, f, own, arena, tasks);
      },
      own);
}

template <class C, class F>
void team_program_backward(const ProgramBackward<C>& f, const KernelCall<C>& call, const ProgramGrad<C>& grad,
                           int64_t, int64_t) {
  const ProgramDeviceCall<C> own = device_call(f.problem, call);
  const int64_t size = size_of<ProgramGrad<C>, C>(f.problem);
  std::vector<C> partials(size_t(size * team_options.blocks), C(NAN));
  run_task_blocks<ProgramBackwardLayout<HostBlock<C, F>>, C, F>(
      f, own.sizes,
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t b) {
        program_backward_body<HostBlock<C, F>>(place, f, own, partials.data() + b * size, size, arena, tasks);
      },
      own);
  add_partials(partials, size, grad.theta0);  // where the sums begin
}

template <class C, class F>
void team_ridge_forward(const RidgeForward<C>& f, const int64_t* trace_offsets, bool*, int64_t, int64_t) {
  const int64_t stride = trace_offsets[1];
  run_task_blocks<RidgeForwardLayout<HostBlock<C, F>>, C, F>(
      f, Sizes{},
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t) {
        ridge_forward_body<HostBlock<C, F>>(place, f, stride, arena, tasks);
      },
      stride);
}

template <class C, class F>
void team_ridge_backward(const RidgeBackward<C>& f, const int64_t* trace_offsets, const RidgeGrad<C>& grad,
                         int64_t, int64_t) {
  const int64_t stride = trace_offsets[1], size = size_of<RidgeGrad<C>, C>();
  std::vector<C> partials(size_t(size * team_options.blocks), C(NAN));
  run_task_blocks<RidgeBackwardLayout<HostBlock<C, F>>, C, F>(
      f, Sizes{},
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t b) {
        ridge_backward_body<HostBlock<C, F>>(place, f, stride, partials.data() + b * size, size, arena,
                                             tasks);
      },
      stride);
  add_partials(partials, size, grad.lambda);  // where the sums begin
}

// The blocks' own memory, full of NaN, and the bodies on it.
template <class C, class F, class Body>
void run_row_blocks(const DistillationProblem<C>& p, bool backward, Body body) {
  using B = HostBlock<C, F>;
  Arena<C> count(nullptr, team_options.capacity, nullptr);
  B block;
  DistillationRows<B> unused(count, block, p, B::kWarps, backward);
  for (int64_t b = 0; b < team_options.blocks; ++b) {
    std::vector<C> fast(size_t(count.used()), C(NAN)), slow(size_t(count.rest_used()), C(NAN));
    const Arena<C> arena(fast.data(), team_options.capacity, slow.data());
    on_team<C>([&] { body(arena, BlockTasks{b, team_options.blocks}); });
  }
}

template <class C, class F>
void team_focal_distillation_forward(const DistillationForward<C>& f, int64_t, int64_t) {
  run_row_blocks<C, F>(f.problem, false, [&](const Arena<C>& arena, BlockTasks tasks) {
    distillation_forward_body<HostBlock<C, F>>(f, arena, tasks);
  });
}

template <class C, class F>
void team_focal_distillation_backward(const DistillationBackward<C>& f, int64_t, int64_t) {
  run_row_blocks<C, F>(f.problem, true, [&](const Arena<C>& arena, BlockTasks tasks) {
    distillation_backward_body<HostBlock<C, F>>(f, arena, tasks);
  });
}

template <class C, class F>
void team_descent_forward(const DescentForward<C>& f, int64_t, int64_t) {
  run_blocks<DescentForwardLayout<HostBlock<C, F>>, C, F>(
      f.problem.sizes(),
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t) {
        descent_forward_body<HostBlock<C, F>>(place, f, descent_trace_size<C>(f.problem), arena, tasks);
      },
      f);
}

template <class C, class F>
void team_descent_backward(const DescentBackward<C>& f, const DescentGrad<C>& grad, int64_t, int64_t) {
  const int64_t size = size_of<DescentGrad<C>, C>(f.problem.net);
  // (aligned as the memory of a GPU)
  std::vector<Pack<C>> partials(size_t(size / Pack<C>::kSize * team_options.blocks));
  C* const first = reinterpret_cast<C*>(partials.data());
  run_blocks<DescentBackwardLayout<HostBlock<C, F>>, C, F>(
      f.problem.sizes(),
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t b) {
        descent_backward_body<HostBlock<C, F>>(place, f, descent_trace_size<C>(f.problem), first + b * size,
                                               size, arena, tasks);
      },
      f);
  add_partials(std::vector<C>(first, first + size * team_options.blocks), size, grad.parameters);
}

template <class C, class F>
void team_ntk_forward(const NtkForward<C>& f, int64_t, int64_t) {
  run_blocks<NtkForwardLayout<HostBlock<C, F>>, C, F>(
      f.problem.sizes(),
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t) {
        ntk_forward_body<HostBlock<C, F>>(place, f, ntk_trace_size<C>(f.problem), arena, tasks);
      },
      f);
}

template <class C, class F>
void team_ntk_backward(const NtkBackward<C>& f, const NtkGrad<C>& grad, int64_t, int64_t) {
  const int64_t size = size_of<NtkGrad<C>, C>(f.problem.net);
  std::vector<Pack<C>> partials(size_t(size / Pack<C>::kSize * team_options.blocks));
  C* const first = reinterpret_cast<C*>(partials.data());
  run_blocks<NtkBackwardLayout<HostBlock<C, F>>, C, F>(
      f.problem.sizes(),
      [&](void* place, const Arena<C>& arena, BlockTasks tasks, int64_t b) {
        ntk_backward_body<HostBlock<C, F>>(place, f, ntk_trace_size<C>(f.problem), first + b * size, size,
                                           arena, tasks);
      },
      f);
  add_partials(std::vector<C>(first, first + size * team_options.blocks), size, grad.parameters);
}

template <class C, class F = C>
constexpr Kernels<C> kTeamKernels = {.sib_forward = team_sib_forward<C, F>,
                                     .sib_backward = team_sib_backward<C, F>,
                                     .linear_head_forward = team_linear_head_forward<C, F>,
                                     .linear_head_backward = team_linear_head_backward<C, F>,
                                     .program_forward = team_program_forward<C, F>,
                                     .program_backward = team_program_backward<C, F>,
                                     .ridge_forward = team_ridge_forward<C, F>,
                                     .ridge_backward = team_ridge_backward<C, F>,
                                     .focal_distillation_forward = team_focal_distillation_forward<C, F>,
                                     .focal_distillation_backward = team_focal_distillation_backward<C, F>,
                                     .linearised_descent_forward = team_descent_forward<C, F>,
                                     .linearised_descent_backward = team_descent_backward<C, F>,
                                     .ntk_gram_forward = team_ntk_forward<C, F>,
                                     .ntk_gram_backward = team_ntk_backward<C, F>};

// F: how features are stored that float kernels read.
template <class F>
const KernelTable kTeamTable = {"team", kTeamKernels<float, F>, kTeamKernels<double>};

}  // namespace
}  // namespace kernelmeta
