// What the CUDA kernels lay out in shared memory at the published sizes fits the smallest of the cards that
// have much of it (A100: 163 KB a block; H100, H200: 227 KB), features excepted.
#include <cstdio>

#include "cuda/program_bodies.h"
#include "cuda/team.h"

namespace {

using namespace kernelmeta;
using Block = TeamBlock<CudaTeam<256>, float, float, Sizes>;

int report(const char* name, const Sizes& s, int64_t elements, int64_t limit) {
  const int64_t bytes = int64_t(sizeof(float)) * (Staging<float>::kElements + elements);
  std::printf("%s, %ld-way, %ld query rows, %ld features, %ld steps: %ld bytes of shared memory\n", name,
              long(s.N), long(s.Q), long(s.D), long(s.K), long(bytes));
  if (bytes <= limit) return 0;
  std::printf("FAILED: the limit is %ld\n", long(limit));
  return 1;
}

template <class Layout, class... Args>
int check(const char* name, const Sizes& s, int64_t limit, const Args&... args) {
  Arena<float> count(nullptr, INT64_MAX, nullptr);
  Block block;
  Layout unused(count, block, s, args...);
  return report(name, s, count.used(), limit);
}

template <class Layout>
struct Of {
  using type = Layout;
};

}  // namespace

int main() {
  constexpr int64_t kA100 = 163 * 1024, kH100 = 227 * 1024, kStatic = 1024;
  //             T  S  Q   N  D    H   K
  const Sizes s{1, 5, 75, 5, 640, 40, 3};
  SibForward<float> forward{};
  SibBackward<float> backward{};
  forward.problem.s = backward.problem.s = s;
  int status = check<SibForwardLayout<Block>>("sib", s, kA100 - kStatic, forward, 0.0f, 0.0f);
  status |= check<SibBackwardLayout<Block>>("sib_backward", s, kH100 - kStatic, backward, 0.0f, 0.0f);

  HeadForward<float> head_forward{};
  HeadBackward<float> head_backward{};
  //                        T  S   Q   N  D    H  K
  const Sizes of_head = head_forward.problem.s = head_backward.problem.s = {1, 25, 75, 5, 640, 0, 5};
  status |= check<HeadForwardLayout<Block>>("linear_head", of_head, kA100 - kStatic, head_forward);
  status |= check<HeadBackwardLayout<Block>>("linear_head_backward", of_head, kA100 - kStatic, head_backward);

  // The paper's synthetic gradient, after steps on the support rows.
  ProgramDeviceCall<float> call{};
  call.phases[0] = {Oracle::kCrossEntropy, false, true, 3};
  call.phases[1] = {Oracle::kSyntheticGradient, true, false, 3};
  call.sizes = {1, 1, 1, 5, 640, 40, 6};
  ProgramForward<float> forward_program{};
  ProgramBackward<float> backward_program{};
  ProgramProblem<float>& p = forward_program.problem;
  p.T = 1, p.N = 5, p.D = 640, p.H = 40, p.n_phases = 2, p.K = 6, p.cosine = true;
  p.support.features.rows = 25, p.query.features.rows = 75;
  backward_program.problem = p;
  const Sizes of_program{1, 25, 75, 5, 640, 40, 6};
  const auto of_sizes = [&](auto name, auto limit, auto layout, const auto& run) {
    using Layout = typename decltype(layout)::type;
    Arena<float> count(nullptr, INT64_MAX, nullptr);
    Block block;
    Layout unused(count, block, call.sizes, run, call, 0);
    return report(name, of_program, count.used(), limit);
  };
  status |= of_sizes("program", kH100 - kStatic, Of<ProgramForwardLayout<Block>>{}, forward_program);
  status |= of_sizes("program_backward", INT64_MAX, Of<ProgramBackwardLayout<Block>>{}, backward_program);

  const float one = 1;
  RidgeForward<float> forward_ridge{};
  RidgeBackward<float> backward_ridge{};
  forward_ridge.problem = {1, 5, 640, p.support, p.query, {}, &one, &one, &one};
  backward_ridge.problem = forward_ridge.problem;
  const Sizes of_ridge{1, 25, 75, 5, 640, 0, 0};
  status |= check<RidgeForwardLayout<Block>>("ridge", of_ridge, kA100 - kStatic, forward_ridge, 0, 0);
  status |=
      check<RidgeBackwardLayout<Block>>("ridge_backward", of_ridge, kA100 - kStatic, backward_ridge, 0, 0);
  return status;
}
