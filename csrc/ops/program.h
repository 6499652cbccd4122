// The tensor side of `program` and its backward, once for all devices. How a device runs them: cpu/program.h,
// cuda/program.h.
#pragma once

#include <cmath>
#include <cstring>

#include "engine/program_task.h"
#include "ops/sums.h"
#include "ops/tasks.h"

namespace kernelmeta {

struct ProgramCall {
  Reader& in;
  RaggedRowTensors rows{{in}};
  OptionalTensor theta0 = in.take<OptionalTensor>("theta0"), weight = in.take<OptionalTensor>("weight");
  OptionalTensor scale = in.take<OptionalTensor>("scale"), bias = in.take<OptionalTensor>("bias");
  OptionalTensor target_scale = in.take<OptionalTensor>("target_scale");
  Tensor rates = in.take<Tensor>("rates");
  MlpTensors<OptionalTensor> mlp{in};
  OptionalTensor running_stats = in.take<OptionalTensor>("running_stats");
  OptionalTensor proportions = in.take<OptionalTensor>("proportions");
  OptionalTensor bag_offsets = in.take<OptionalTensor>("bag_offsets");
  int64_t n_way = in.take<int64_t>("n_way");
  std::vector<int64_t> phases = in.take<std::vector<int64_t>>("phases");
  int64_t classifier = in.take<int64_t>("classifier");
  int64_t start = in.take<int64_t>("start");
  bool first_order = in.take<bool>("first_order"), coefficients = in.take<bool>("coefficients");
  int64_t max_support = in.take<int64_t>("max_support"), max_query = in.take<int64_t>("max_query");
};

struct ProgramForwardCall {
  Reader& in;
  ProgramCall of{in};
  bool save_trace = in.take<bool>("save_trace");
};

struct ProgramBackwardCall {
  Reader& in;
  Tensor grad_logits = in.take<Tensor>("grad_logits");
  OptionalTensor grad_support_coefficients = in.take<OptionalTensor>("grad_support_coefficients");
  OptionalTensor grad_query_coefficients = in.take<OptionalTensor>("grad_query_coefficients");
  OptionalTensor grad_start_coefficients = in.take<OptionalTensor>("grad_start_coefficients");
  Tensor trace = in.take<Tensor>("trace");
  ProgramCall of{in};
  bool need_support = in.take<bool>("need_support"), need_query = in.take<bool>("need_query");
};

// Of a phase: oracle, of query rows, mean, steps, shares, the bits of `number`, whether it joins the next
// one, and the bits of its weight.
inline constexpr size_t kPhaseNumbers = 8;

inline double of_bits(int64_t bits) {
  double number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// Whether the MLP is that of equivariant gradients.
inline bool has_pairs(const std::vector<int64_t>& phases) {
  for (size_t i = 0; i < phases.size(); i += kPhaseNumbers) {
    if (phases[i] == int64_t(Oracle::kEquivariantGradient)) return true;
  }
  return false;
}

inline std::vector<Phase> phases_of(const std::vector<int64_t>& numbers, bool cosine, bool has_mlp) {
  require(numbers.size() % kPhaseNumbers == 0, "phases: expected eight numbers a phase");
  std::vector<Phase> phases, together;
  for (size_t i = 0; i < numbers.size(); i += kPhaseNumbers) {
    require(numbers[i] >= 0 && numbers[i] < kOracles, "phases: unknown oracle");
    const auto oracle = Oracle(numbers[i]);
    const bool query = numbers[i + 1] != 0;
    require(numbers[i + 3] >= 0, "phases: steps must not be negative");
    require(!query || !needs_labels(oracle), "phases: query rows have no labels");
    require(oracle != Oracle::kSoftAssignment || (cosine && query),
            "phases: soft assignment needs a cosine classifier and query rows");
    const bool asks = oracle == Oracle::kSyntheticGradient || oracle == Oracle::kEquivariantGradient;
    require(!asks || has_mlp, "phases: a synthetic or equivariant gradient needs its MLP");
    require(!asks || (oracle == Oracle::kEquivariantGradient) == has_pairs(numbers),
            "phases: a program has one MLP, of synthetic or of equivariant gradients");
    require(numbers[i + 4] >= 0 && numbers[i + 4] <= 2, "phases: unknown shares");
    const auto shares = Shares(numbers[i + 4]);
    const bool of_rows = oracle == Oracle::kProportions || oracle == Oracle::kAssignment;
    require(shares != Shares::kNone ? query && (of_rows || oracle == Oracle::kSoftAssignment) : !of_rows,
            "phases: shares are for proportions, assignment and soft assignment, of query rows");
    const double number = of_bits(numbers[i + 5]), weight = of_bits(numbers[i + 7]);
    if (oracle == Oracle::kEntropy || oracle == Oracle::kMarginalEntropy)
      require(number > 0 && number < HUGE_VAL, "phases: alpha must be above 0 and finite");
    else
      require(number > 0 && number <= 1, "phases: relax must be above 0 and at most 1");
    require(std::isfinite(weight), "phases: weights must be finite");
    const bool joins = numbers[i + 6] != 0;
    require(!joins || numbers[i + 3] == 0, "phases: the last of those that are joined has the steps");
    require(oracle != Oracle::kSoftAssignment || (!joins && together.empty() && weight == 1),
            "phases: soft assignment is no gradient, it takes no part in a sum");
    together.push_back({oracle, query, numbers[i + 2] != 0, numbers[i + 3], shares, number, weight, joins});
    if (joins) continue;
    if (numbers[i + 3] > 0) phases.insert(phases.end(), together.begin(), together.end());
    together.clear();
  }
  require(together.empty(), "phases: the last one joins none");
  return phases;
}

// In the order of CLASSIFIERS in kernelmeta/ops/program_op.py.
enum class ClassifierKind : int64_t { kCosine = 0, kLinear = 1, kEuclidean = 2, kDot = 3 };

inline bool given_start(const ProgramCall& call) { return Start(call.start) == Start::kGiven; }

// Checked, and as the kernels read them.
template <class C>
struct ProgramArguments : RaggedArguments {
  bool pairs;
  MlpParameters<C> mlp;
  std::vector<Phase> phases;
  Parameter<C> theta0, weight, start_bias, rates, proportions;
  OptionalTensor bag_offsets;
  ProgramProblem<C> problem;

  ProgramArguments(const RaggedRowTensors& rows, const ProgramCall& call)
      : RaggedArguments(rows, call.n_way, call.max_support, call.max_query, !given_start(call)),
        pairs(has_pairs(call.phases)),
        mlp(on, call.mlp, call.running_stats,
            pairs ? pair_sizes(1, 1, 0, 0, 0) : Sizes{1, 0, 1, call.n_way, 0, 0, 0}),
        phases(
            phases_of(call.phases, ClassifierKind(call.classifier) == ClassifierKind::kCosine, mlp.given())) {
    require(call.classifier >= 0 && call.classifier <= 3, "classifier must be 0, 1, 2 or 3");
    const ClassifierKind kind = ClassifierKind(call.classifier);
    const bool cosine = kind == ClassifierKind::kCosine, euclidean = kind == ClassifierKind::kEuclidean;
    const int64_t D = query.D(), N = call.n_way, T = query.T();
    require(call.start >= 0 && call.start <= 3, "start must be 0, 1, 2 or 3");
    require(!cosine || call.start != 2, "a cosine classifier cannot start at zero");
    require(!call.first_order || !(cosine || euclidean), "first_order is for linear classifiers");
    require_storage<C>({&support, &query});
    int64_t K = 0;
    for (const Phase& phase : phases)
      require(!__builtin_add_overflow(K, phase.steps, &K), "phases: too many steps");
    const int64_t all_rows = support.all_rows() + query.all_rows() + 32 * (T + 1);
    Elements().add({K + 1, 5, N, all_rows}).add({T + 1, N, D + 16}).add({K + 1, T + 1, N, 4});
    if (pairs) Elements().add({mlp.H + kPairInputs, N, all_rows, 8});
    if (!support.known()) Elements().add({T, K + 1, 5, N, support.count(0) + query.count(0) + 32});
    problem = {};
    problem.start = Start(call.start);
    if (problem.start == Start::kLearned) {
      require(call.theta0.has_value(), "a learned start needs theta0");
      theta0 = Parameter<C>(on, call.theta0, {N, D}, "theta0");
    }
    if (problem.start == Start::kGiven) {
      require(call.theta0.has_value(), "a given start needs theta0");
      Elements().add({T, N, D});
      theta0 = Parameter<C>(on, call.theta0, {T, N, D}, "theta0");
      for (const Phase& phase : phases) {
        for (int64_t t = 0; !phase.query && support.known() && t < T; ++t) {
          if (support.count(t) > 0) continue;
          refuse("support: task " + std::to_string(t) + " has no row, and phases of support rows need one");
        }
      }
    }
    if (problem.start == Start::kClassMeans) weight = Parameter<C>(on, call.weight, {D}, "weight");
    require(!euclidean || !call.bias, "a Euclidean classifier has no bias");
    require(kind != ClassifierKind::kDot || !call.bias, "a dot product classifier has no bias");
    if (cosine || euclidean) {
      problem.scale = one_value<C>(on, call.scale, "scale");
      problem.bias = one_value<C>(on, call.bias, "bias");
    } else {
      start_bias = Parameter<C>(on, call.bias, {N}, "bias");
    }
    rates = Parameter<C>(on, call.rates, {K}, "rates");
    take_proportions(call);
    problem.theta0 = theta0;
    problem.weight = weight;
    problem.start_bias = start_bias;
    problem.target = one_value<C>(on, call.target_scale, "target_scale");
    problem.rates = rates;
    problem.T = T;
    problem.N = N;
    problem.D = D;
    problem.H = mlp.H;
    problem.K = K;
    problem.n_phases = int64_t(phases.size());
    problem.cosine = cosine;
    problem.euclidean = euclidean;
    problem.dot = kind == ClassifierKind::kDot;
    problem.coefficients = call.coefficients;
    problem.first_order = call.first_order;
    problem.pairs = pairs;
    problem.support = support.task_rows();
    problem.query = query.task_rows();
    problem.classes = labels.classes();
  }
  ProgramArguments(const ProgramArguments&) = delete;

  // The problem as the host can look at it, sizes of tasks and all.
  ProgramProblem<C> on_host() const {
    ProgramProblem<C> p = problem;
    put_tasks_on_host(p);
    p.scale = p.bias = p.target = nullptr;
    return p;
  }
  Sizes mlp_sizes() const { return problem.mlp_sizes(); }

 private:
  void take_proportions(const ProgramCall& call) {
    const int64_t T = query.T(), N = call.n_way;
    bool wanted = false, given = false;
    for (const Phase& phase : phases) {
      wanted = wanted || phase.shares != Shares::kNone || phase.is_entropy();
      given = given || phase.shares == Shares::kGiven;
    }
    require(!given || call.proportions.has_value(), "phases of given shares need proportions");
    problem.bags = 1;
    if (call.bag_offsets) {
      const Tensor& offsets = *call.bag_offsets;
      require(on.holds(offsets) && offsets.dim() == 2 && offsets.size(0) == T && offsets.size(1) >= 2 &&
                  offsets.scalar_type() == ScalarType::Long,
              "bag_offsets must be a tensor [T, bags + 1] of int64 on the features' device");
      bag_offsets = dense(offsets);
      problem.bags = offsets.size(1) - 1;
      problem.bag_offsets = integers(*bag_offsets);
      if (on.cpu) check_bags();
    }
    Elements().add({T, problem.bags, N});
    if (wanted) Elements().add({4, N, query.all_rows() + support.all_rows() + 32}).add({N, N});
    if (call.proportions) {
      proportions = Parameter<C>(on, call.proportions, {T, problem.bags, N}, "proportions");
      problem.proportions = proportions;
    }
  }

  void check_bags() const {
    for (int64_t t = 0; t < query.T(); ++t) {
      const int64_t* offsets = problem.bag_offsets + t * (problem.bags + 1);
      bool rising = offsets[0] == 0 && offsets[problem.bags] == query.count(t);
      for (int64_t b = 0; b < problem.bags; ++b) rising = rising && offsets[b] <= offsets[b + 1];
      if (rising) continue;
      refuse("bag_offsets: task " + std::to_string(t) + ": expected numbers that rise from 0 to its " +
             std::to_string(query.count(t)) + " query rows");
    }
  }
};

struct ProgramOp {
  static constexpr const char* name = "program";
  static constexpr size_t results = 5;  // logits; coefficients of support, query, start; trace
  using Call = ProgramForwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.rates, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.rows.query);
      const ProgramArguments<C> a(device.template readable<C>(call.of.rows), call.of);
      const typename Device::template Kernel<ProgramArguments<C>> kernel(device, a);
      const int64_t N = a.problem.N;
      const bool wanted = a.problem.coefficients;
      const Tensor logits = empty<C>(a.on, a.query.shape(N));
      const Tensor of_support = empty_if<C>(wanted, a.on, a.support.shape(N));
      const Tensor of_query = empty_if<C>(wanted, a.on, a.query.shape(N));
      const Tensor of_start = empty_if<C>(wanted, a.on, {a.problem.T, N});
      const Tensor trace = empty_if<C>(call.save_trace, a.on, {kernel.trace_elements()});
      kernel.forward({a.problem, data<C>(logits), data_if<C>(wanted, of_support),
                      data_if<C>(wanted, of_query), data_if<C>(wanted, of_start),
                      data_if<C>(call.save_trace, trace)});
      return Tensors<results>{logits, of_support, of_query, of_start, trace};
    });
  }
};

struct ProgramBackwardOp {
  static constexpr const char* name = "program_backward";
  // of support, query, theta0, weight, scale, bias, target_scale, rates, the MLP's ten, and proportions
  static constexpr size_t results = 19;
  using Call = ProgramBackwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.rates, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.rows.query);
      const ProgramArguments<C> a(device.template readable<C>(call.of.rows), call.of);
      const typename Device::template Kernel<ProgramArguments<C>> kernel(device, a);
      const ProgramProblem<C>& p = a.problem;
      const bool all =
          call.grad_support_coefficients && call.grad_query_coefficients && call.grad_start_coefficients;
      const bool none =
          !call.grad_support_coefficients && !call.grad_query_coefficients && !call.grad_start_coefficients;
      require(none || (all && p.coefficients), "gradients of coefficients: all three or none");
      const Parameter<C> grad_logits(a.on, call.grad_logits, a.query.shape(p.N), "grad_logits");
      const Parameter<C> of_support(a.on, call.grad_support_coefficients, a.support.shape(p.N),
                                    "grad_support_coefficients");
      const Parameter<C> of_query(a.on, call.grad_query_coefficients, a.query.shape(p.N),
                                  "grad_query_coefficients");
      const Parameter<C> of_start(a.on, call.grad_start_coefficients, {p.T, p.N}, "grad_start_coefficients");
      const Parameter<C> trace(a.on, call.trace, {kernel.trace_elements()}, "trace");
      const Tensor support = empty_if<C>(call.need_support, a.on, a.support.shape(p.D));
      const Tensor query = empty_if<C>(call.need_query, a.on, a.query.shape(p.D));
      const MlpGradients<C> m(a.on, a.mlp.given(), a.mlp_sizes());

      Sums<C, ProgramGrad<C>> sums(a.on_host());
      if (a.mlp.given()) sums.unfold(sums.grad.mlp, a.mlp_sizes(), a.mlp, m);
      // A parameter that was given has a gradient, zeros where nothing depends on it.
      const bool given = p.start == Start::kGiven;
      const auto gradient = [&](const OptionalTensor& of, const C* part, bool used) {
        if (!of) return empty<C>(a.on, {0});
        Tensor to = empty<C>(a.on, shape_of(*of));
        if (used)
          sums.send(part, to);
        else
          torch::stable::zero_(to);
        return to;
      };
      const ProgramGrad<C>& g = sums.grad;
      const Tensor theta0 = given ? empty<C>(a.on, {p.T, p.N, p.D})
                                  : gradient(call.of.theta0, g.theta0, p.start == Start::kLearned);
      const Tensor weight = gradient(call.of.weight, g.weight, p.weight != nullptr);
      const Tensor scale = gradient(call.of.scale, g.scale, p.cosine || p.euclidean);
      const Tensor bias = gradient(call.of.bias, p.cosine ? g.bias : g.start_bias, true);
      const Tensor target = gradient(call.of.target_scale, g.target, true);
      const Tensor rates = gradient(call.of.rates, g.rates, true);
      const Tensor proportions = empty_if<C>(call.of.proportions.has_value(), a.on, {p.T, p.bags, p.N});
      kernel.backward({p, trace, grad_logits, of_support, of_query, of_start,
                       data_if<C>(call.need_support, support), data_if<C>(call.need_query, query),
                       data_if<C>(given, theta0), data_if<C>(call.of.proportions.has_value(), proportions)},
                      sums);
      return Tensors<results>{support, query,     theta0,    weight,  scale,      bias,      target,
                              rates,   m.weight1, m.bias1,   m.gain1, m.shift1,   m.weight2, m.bias2,
                              m.gain2, m.shift2,  m.weight3, m.bias3, proportions};
    });
  }
};

}  // namespace kernelmeta
