// The bodies of the CUDA kernels (csrc/cuda/bodies.h) run by teams of host threads, as a table of kernels.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/kernel_table.h"
#include "cuda/bodies.h"
#include "tests/host_team.h"

namespace {

using namespace kernelmeta;

template <class C>
using HostBlock = TeamBlock<HostTeam, C, C, Sizes>;

// How much of a block's memory is "shared" (elements), in how many blocks the tasks are shared out, and which
// barrier of the calls that follow is missing.
struct TeamOptions {
  int64_t capacity = INT64_MAX;
  int64_t blocks = 1;
  int64_t removed = -1;
  std::vector<Spot> barriers;  // all that were met, the missing one too
};
inline TeamOptions team_options;

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

// body(place, arena, share, b) for every block b that lays out a Layout, in memory full of NaN.
template <class Layout, class C, class Body, class... Args>
void run_blocks(const Sizes& s, Body body, const Args&... args) {
  using BlockFrame = Frame<HostBlock<C>, Layout>;
  Arena<C> count(nullptr, team_options.capacity, nullptr);
  HostBlock<C> block;
  Layout unused(count, block, s, args...);
  for (int64_t b = 0; b < team_options.blocks; ++b) {
    // aligned as shared memory
    std::vector<Pack<C>> fast(size_t(count.used() / Pack<C>::kSize)),
        slow(size_t(count.rest_used() / Pack<C>::kSize));
    for (auto* memory : {&fast, &slow}) {
      for (Pack<C>& p : *memory) {
        for (C& x : p.v) x = C(NAN);
      }
    }
    const Arena<C> arena(reinterpret_cast<C*>(fast.data()), team_options.capacity,
                         reinterpret_cast<C*>(slow.data()));
    alignas(16) unsigned char place[sizeof(BlockFrame)];
    on_team<C>([&] { body(place, arena, Share{b, team_options.blocks}, b); });
  }
}

template <class C>
void team_sib_forward(const SibForward<C>& f, const FoldedMlp<C>&, int64_t, int64_t) {
  const int64_t stride = trace_size<C>(f.problem.s, f.problem.weights);
  run_blocks<SibForwardLayout<HostBlock<C>>, C>(
      f.problem.s,
      [&](void* place, const Arena<C>& arena, Share share, int64_t) {
        sib_forward_body<HostBlock<C>>(place, f, stride, arena, share);
      },
      f, C(0), C(0));
}

// partials [blocks][size] added up into `to`
template <class C>
void add_partials(const std::vector<C>& partials, int64_t size, C* to) {
  std::vector<C> sums(static_cast<size_t>(size));
  on_team<C>([&] {
    sum_partials_body<HostBlock<C>>(partials.data(), team_options.blocks, size, C(1), Pieces<C>(sums.data(), size),
                                    Share{0, 1});
  });
  for (int64_t i = 0; i < size; ++i) to[i] += sums[size_t(i)];
}

template <class C>
void team_sib_backward(const SibBackward<C>& f, const FoldedMlp<C>&, const SibParameterGrad<C>& grad, int64_t,
                       int64_t) {
  const int64_t stride = trace_size<C>(f.problem.s, f.problem.weights);
  const int64_t size = size_of<SibParameterGrad<C>, C>(f.problem.s);
  std::vector<C> partials(size_t(size * team_options.blocks), C(NAN));
  run_blocks<SibBackwardLayout<HostBlock<C>>, C>(
      f.problem.s,
      [&](void* place, const Arena<C>& arena, Share share, int64_t b) {
        sib_backward_body<HostBlock<C>>(place, f, stride, partials.data() + b * size, arena, share);
      },
      f, C(0), C(0));
  add_partials(partials, size, grad.mlp.w1t);  // where the sums begin
}

template <class C>
void team_linear_head_forward(const HeadForward<C>& f, int64_t, int64_t) {
  run_blocks<HeadForwardLayout<HostBlock<C>>, C>(
      f.problem.s,
      [&](void* place, const Arena<C>& arena, Share share, int64_t) {
        head_forward_body<HostBlock<C>>(place, f, head_trace_size<C>(f.problem.s), arena, share);
      },
      f);
}

template <class C>
void team_linear_head_backward(const HeadBackward<C>& f, const HeadParameterGrad<C>& grad, int64_t, int64_t) {
  const int64_t size = size_of<HeadParameterGrad<C>, C>(f.problem.s);
  std::vector<C> partials(size_t(size * team_options.blocks), C(NAN));
  run_blocks<HeadBackwardLayout<HostBlock<C>>, C>(
      f.problem.s,
      [&](void* place, const Arena<C>& arena, Share share, int64_t b) {
        head_backward_body<HostBlock<C>>(place, f, head_trace_size<C>(f.problem.s),
                                         partials.data() + b * size, arena, share);
      },
      f);
  add_partials(partials, size, grad.weight);  // where the sums begin
}

template <class C>
constexpr Kernels<C> kTeamKernels = {
    team_sib_forward<C>, team_sib_backward<C>, nullptr, nullptr, nullptr, nullptr,
    team_linear_head_forward<C>, team_linear_head_backward<C>};

const KernelTable kTeamTable = {"team", kTeamKernels<float>, kTeamKernels<double>, {}, {}, {}, {}};

}  // namespace
