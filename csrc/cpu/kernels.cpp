// The kernels for one instruction set. This file is compiled once for each (see CMakeLists.txt), with
// KERNELMETA_ISA naming it; everything but the table is local to the file, so that no function compiled for
// one instruction set is ever linked in the place of another's.
#include "cpu/block.h"
#include "cpu/kernel_table.h"

#define KERNELMETA_STRING_(x) #x
#define KERNELMETA_STRING(x) KERNELMETA_STRING_(x)
#define KERNELMETA_JOIN_(a, b) a##b
#define KERNELMETA_JOIN(a, b) KERNELMETA_JOIN_(a, b)

namespace {

using namespace kernelmeta;

// Storage types narrower than float, as their bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__forceinline__ float bit_cast_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

__forceinline__ float widen(BFloat16 x) { return bit_cast_float(uint32_t(x.bits) << 16); }

// Exponent and mantissa move up by 13 bits; scaling by 2^112 corrects the exponent's bias and makes
// subnormal halves normal floats. Inf and NaN, whose exponent is all ones, get it all ones again.
__forceinline__ float widen(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float scaled = bit_cast_float(magnitude) * 0x1p112f;
  const float value = magnitude >= 0x0f800000 ? bit_cast_float(magnitude | 0x7f800000) : scaled;
  return x.bits & 0x8000 ? -value : value;
}
__forceinline__ float widen(float x) { return x; }
__forceinline__ double widen(double x) { return x; }

int64_t storage_bytes(Storage storage) {
  return storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
}

template <class F, class C>
void widen_rows(const Features& f, int64_t task, int64_t D, C* to) {
  const F* data = static_cast<const F*>(f.data);
  for (int64_t i = 0; i < f.rows; ++i) {
    const F* from = data + (f.index ? f.index[task * f.rows + i] * f.row : task * f.task + i * f.row);
    for (int64_t d = 0; d < D; ++d) to[i * D + d] = C(widen(from[d]));
  }
}

template <class C>
bool needs_widening(const Features& f) {
  return f.storage != (sizeof(C) == 4 ? Storage::kFloat32 : Storage::kFloat64);
}

// The rows of one task in the precision of the computation: where they lie, or copied into `buffer`.
template <class C>
Rows<C> task_rows(const Features& f, int64_t task, int64_t D, C* buffer) {
  if (!needs_widening<C>(f)) {
    const C* data = static_cast<const C*>(f.data);
    if (f.index) return {data, f.row, f.index + task * f.rows};
    return {data + task * f.task, f.row, nullptr};
  }
  switch (f.storage) {
    case Storage::kFloat32:
      widen_rows<float>(f, task, D, buffer);
      break;
    case Storage::kFloat64:
      widen_rows<double>(f, task, D, buffer);
      break;
    case Storage::kBFloat16:
      widen_rows<BFloat16>(f, task, D, buffer);
      break;
    case Storage::kFloat16:
      widen_rows<Float16>(f, task, D, buffer);
      break;
  }
  return {buffer, D, nullptr};
}

template <class C>
C* widening_buffer(Arena<C>& arena, const Features& f, int64_t D) {
  return needs_widening<C>(f) ? arena.take(f.rows * D) : nullptr;
}

// Lays a workspace out twice: to count its size, then in this thread's scratch memory. With
// KERNELMETA_POISON (tests) that memory holds NaN, so that reading what nobody wrote shows.
template <class Workspace, class C, class... Args>
Workspace in_scratch(const Args&... args) {
  Arena<C> count;
  {
    Workspace unused(count, args...);
  }
  C* memory = static_cast<C*>(scratch(count.used() * int64_t(sizeof(C))));
#ifdef KERNELMETA_POISON
  for (int64_t i = 0; i < count.used(); ++i) memory[i] = __builtin_nan("");
#endif
  Arena<C> arena(memory);
  return Workspace(arena, args...);
}

template <class C>
ClassMembers members(const ClassTable& table, const Sizes& s, int64_t task) {
  return {table.members + task * s.S, table.offsets + task * (s.N + 1)};
}

template <class C>
int64_t trace_size(const Sizes& s, bool weights) {
  Arena<C> count;
  Trace<C> unused(count, s, forms_gram(s, true), weights);
  return count.used();
}

// What forward and backward both need to work on one task.
template <class C>
struct SibTask {
  using Block = CpuBlock<C>;
  const SibProblem<C>& p;
  Block block;
  C *query_buffer, *start_buffer;
  C* support_inverse;
  C *span, *scaled;
  InnerLoop<Block> loop;

  SibTask(Arena<C>& arena, const SibProblem<C>& p, bool gram_formed)
      : p(p),
        query_buffer(widening_buffer(arena, p.query, p.s.D)),
        start_buffer(widening_buffer(arena, p.start, p.s.D)),
        support_inverse(arena.take(p.s.S)),
        span(gram_formed ? nullptr : arena.take(p.s.N * p.s.D)),
        scaled(gram_formed ? nullptr : arena.take(p.s.N * p.s.ld())),
        loop(block, p.s, p.mlp, p.scale, p.bias, p.lr, arena) {}

  bool from_support() const { return p.classes.members != nullptr; }
  Rows<C> query(int64_t t) { return task_rows(p.query, t, p.s.D, query_buffer); }
  ClassMeans<Block> class_means(int64_t t) {
    return {block,
            p.s,
            task_rows(p.start, t, p.s.D, start_buffer),
            members<C>(p.classes, p.s, t),
            p.weight,
            support_inverse};
  }
  GramMatrix<Block> gram(const Rows<C>& rows, const Trace<C>& trace) {
    return {block, p.s, rows, trace.inverse, trace.gram, span, scaled};
  }
  void start(int64_t t, C* theta0) {
    if (from_support()) {
      class_means(t).forward(theta0);
    } else {
      const Rows<C> rows = task_rows(p.start, t, p.s.D, start_buffer);
      for (int64_t n = 0; n < p.s.N; ++n) memcpy(theta0 + n * p.s.D, rows(n), sizeof(C) * p.s.D);
    }
  }
};

template <class C>
struct SibForwardWorkspace {
  Arena<C> nowhere;  // the trace is the caller's
  SibTask<C> task;
  Trace<C> trace;
  SibForwardWorkspace(Arena<C>& arena, const SibProblem<C>& p, bool gram_formed, bool keeps_trace)
      : task(arena, p, gram_formed), trace(keeps_trace ? nowhere : arena, p.s, gram_formed, p.weights) {}
};

template <class C>
void sib_forward(const SibForward<C>& f, int64_t begin, int64_t end) {
  const Sizes& s = f.problem.s;
  const bool gram_formed = forms_gram(s, f.trace != nullptr);
  auto w = in_scratch<SibForwardWorkspace<C>, C>(f.problem, gram_formed, f.trace != nullptr);
  const int64_t stride = trace_size<C>(s, f.problem.weights);
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(f.trace ? f.trace + t * stride : nullptr);
    const Trace<C> trace = f.trace ? Trace<C>(arena, s, gram_formed, f.problem.weights) : w.trace;
    if (f.trace) trace.clear_padding(s);
    w.task.start(t, trace.theta0);
    const Rows<C> query = w.task.query(t);
    QueryFeatures<CpuBlock<C>> features{w.task.block, s, query, trace};
    features.forward();
    w.task.loop.forward(trace, w.task.gram(query, trace), f.stats ? f.stats + t * s.K * 4 * s.H : nullptr);
    w.task.loop.logits(trace, f.logits + t * s.Q * s.N);
    if (f.weights) features.weights(f.weights + t * s.N * s.D, w.task.loop.z);
  }
}

template <class C>
struct SibBackwardWorkspace {
  using Block = CpuBlock<C>;
  SibTask<C> task;
  typename InnerLoop<Block>::Adjoint adjoint;
  typename QueryFeatures<Block>::Scratch scratch;
  C* gtheta0;

  SibBackwardWorkspace(Arena<C>& arena, const SibProblem<C>& p, bool gram_formed, bool query_grad,
                       bool weights)
      : task(arena, p, gram_formed),
        adjoint(arena, p.s, weights),
        scratch(arena, p.s, query_grad && gram_formed),
        gtheta0(arena.take(p.s.N * p.s.D)) {}
};

template <class C>
void sib_backward(const SibBackward<C>& f, const SibParameterGrad<C>& grad, int64_t begin, int64_t end) {
  const Sizes& s = f.problem.s;
  const bool weights = f.grad_weights != nullptr, gram_formed = forms_gram(s, true);
  auto w = in_scratch<SibBackwardWorkspace<C>, C>(f.problem, gram_formed, f.grad_query != nullptr, weights);
  const int64_t stride = trace_size<C>(s, f.problem.weights);
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(const_cast<C*>(f.trace) + t * stride);
    const Trace<C> trace(arena, s, gram_formed, f.problem.weights);
    const C* gweights = weights ? f.grad_weights + t * s.N * s.D : nullptr;
    const Rows<C> query = w.task.query(t);
    QueryFeatures<CpuBlock<C>> features{w.task.block, s, query, trace};
    const GramMatrix<CpuBlock<C>> gram = w.task.gram(query, trace);
    if (weights) features.weights_backward(gweights, w.adjoint);
    w.task.loop.backward(trace, gram, f.grad_logits + t * s.Q * s.N, w.adjoint, grad.mlp);
    for (int64_t n = 0; n < s.N; ++n) {
      *grad.scale += w.adjoint.gscale[n];
      *grad.bias += w.adjoint.gbias[n];
    }
    C* gstart = f.grad_start ? f.grad_start + t * f.problem.start.rows * s.D : nullptr;
    C* gtheta0 = gstart && !w.task.from_support() ? gstart : w.gtheta0;
    features.theta0_backward(w.adjoint, gweights, w.scratch, gtheta0);
    if (w.task.from_support()) {
      w.task.class_means(t).backward(gtheta0, gstart, f.problem.weight ? grad.weight : nullptr);
    }
    if (f.grad_query) {
      features.query_backward(gram, w.adjoint, gweights, w.scratch, f.grad_query + t * s.Q * s.D);
    }
  }
}

template <class C>
struct MlpWorkspace {
  CpuBlock<C> block;
  Mlp<CpuBlock<C>> mlp;
  C *z, *g, *gg, *gz, *gh;

  MlpWorkspace(Arena<C>& arena, const MlpProblem<C>& p)
      : mlp(block, p.s, p.mlp, arena),
        z(arena.take(p.s.N * p.s.ld())),
        g(arena.take(p.s.N * p.s.ld())),
        gg(arena.take(p.s.N * p.s.ld())),
        gz(arena.take(p.s.N * p.s.ld())),
        gh(arena.take(Mlp<CpuBlock<C>>::backward_scratch(p.s))) {}
};

// [Q][N] -> [N][ld], zeros in the padding
template <class C>
void rows_in(const Sizes& s, const C* from, C* to) {
  memset(to, 0, sizeof(C) * s.N * s.ld());
  for (int64_t q = 0; q < s.Q; ++q) {
    for (int64_t n = 0; n < s.N; ++n) to[n * s.ld() + q] = from[q * s.N + n];
  }
}

template <class C>
void rows_out(const Sizes& s, const C* from, C* to) {
  for (int64_t q = 0; q < s.Q; ++q) {
    for (int64_t n = 0; n < s.N; ++n) to[q * s.N + n] = from[n * s.ld() + q];
  }
}

template <class C>
void mlp_forward(const MlpProblem<C>& p, C* out, int64_t begin, int64_t end) {
  auto w = in_scratch<MlpWorkspace<C>, C>(p);
  const int64_t task = p.s.Q * p.s.N;
  for (int64_t t = begin; t < end; ++t) {
    rows_in(p.s, p.logits + t * task, w.z);
    w.mlp.forward(w.z, w.g, nullptr);
    rows_out(p.s, w.g, out + t * task);
  }
}

template <class C>
void mlp_backward(const MlpProblem<C>& p, const C* grad_out, C* grad_logits, const FoldedMlpGrad<C>& grad,
                  int64_t begin, int64_t end) {
  auto w = in_scratch<MlpWorkspace<C>, C>(p);
  const int64_t task = p.s.Q * p.s.N;
  for (int64_t t = begin; t < end; ++t) {
    rows_in(p.s, p.logits + t * task, w.z);
    rows_in(p.s, grad_out + t * task, w.gg);
    w.mlp.forward(w.z, w.g, nullptr);
    w.mlp.backward(w.z, w.gg, w.gz, w.gh, grad);
    rows_out(p.s, w.gz, grad_logits + t * task);
  }
}

template <class C>
struct ClassMeansWorkspace {
  C *buffer, *inverse;
  ClassMeansWorkspace(Arena<C>& arena, const ClassMeansProblem<C>& p)
      : buffer(widening_buffer(arena, p.support, p.s.D)), inverse(arena.take(p.s.S)) {}
};

template <class C>
void class_means_forward(const ClassMeansProblem<C>& p, C* theta0, int64_t begin, int64_t end) {
  CpuBlock<C> block;
  auto w = in_scratch<ClassMeansWorkspace<C>, C>(p);
  for (int64_t t = begin; t < end; ++t) {
    ClassMeans<CpuBlock<C>>{
        block,    p.s,      task_rows(p.support, t, p.s.D, w.buffer), members<C>(p.classes, p.s, t),
        p.weight, w.inverse}
        .forward(theta0 + t * p.s.N * p.s.D);
  }
}

template <class C>
void class_means_backward(const ClassMeansProblem<C>& p, const C* grad_theta0, C* grad_support,
                          C* grad_weight, int64_t begin, int64_t end) {
  CpuBlock<C> block;
  auto w = in_scratch<ClassMeansWorkspace<C>, C>(p);
  for (int64_t t = begin; t < end; ++t) {
    ClassMeans<CpuBlock<C>>{
        block,    p.s,      task_rows(p.support, t, p.s.D, w.buffer), members<C>(p.classes, p.s, t),
        p.weight, w.inverse}
        .backward(grad_theta0 + t * p.s.N * p.s.D, grad_support ? grad_support + t * p.s.S * p.s.D : nullptr,
                  grad_weight);
  }
}

template <class C>
constexpr Kernels<C> kKernels = {trace_size<C>,          sib_forward<C>,  sib_backward<C>,
                                 mlp_forward<C>,         mlp_backward<C>, class_means_forward<C>,
                                 class_means_backward<C>};

}  // namespace

#include "cpu/ridge_kernels.h"

namespace kernelmeta {

extern const KernelTable KERNELMETA_JOIN(kernels_, KERNELMETA_ISA);
const KernelTable KERNELMETA_JOIN(kernels_, KERNELMETA_ISA) = {
    KERNELMETA_STRING(KERNELMETA_ISA), kKernels<float>,      kKernels<double>,     kProgramKernels<float>,
    kProgramKernels<double>,           kRidgeKernels<float>, kRidgeKernels<double>};

}  // namespace kernelmeta
