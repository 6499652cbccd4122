// Kernels of `program`, for learner_checks.h: tasks of equal and unequal size, every oracle, start and step.
#pragma once

#include <memory>

#include "tests/drawn_tasks.h"

namespace kernelmeta {
namespace {

// The MLP of the program that runs as it comes: what is folded already is of no use to those who fold it.
template <class C>
struct RawMlp {
  inline static MlpArrays<const C> arrays{};
  inline static const C* running = nullptr;
};

struct ProgramCase {
  const char* name;
  int64_t D, N, H;
  std::vector<int64_t> S, Q, ways;
  std::vector<Phase> phases;
  bool cosine;
  Start start;
  bool coefficients = false, first_order = false, running = false, bank = false, weight = false;
  bool need_support = true, need_query = true;
  double rate = 0.02, along = 0;  // the least rate; see Episode
  int64_t bags = 1;               // of a task's query rows
  bool euclidean = false;         // where not cosine; else linear
  bool dot = false;               // and without a bias

  bool given_shares() const {
    for (const Phase& phase : phases) {
      if (phase.shares == Shares::kGiven) return true;
    }
    return false;
  }

  bool pairs() const {
    for (const Phase& phase : phases) {
      if (phase.oracle == Oracle::kEquivariantGradient) return true;
    }
    return false;
  }
  Sizes of_mlp(int64_t K) const {
    if (!H) return {1, 1, 1, 0, D, 0, K};
    return pairs() ? pair_sizes(1, 1, D, H, K) : Sizes{1, 1, 1, N, D, H, K};
  }
};

struct ProgramEpisode {
  ProgramCase c;
  Tasks tasks;
  int64_t K = 0;
  Vec theta0, start_bias, weight, scale, bias, target, rates, mlp, running, grad_logits, grad_support,
      grad_query, grad_start, proportions;
  std::vector<int64_t> bag_offsets;

  explicit ProgramEpisode(const ProgramCase& of)
      : c(of),
        tasks(c.D, c.N, c.S, c.Q, c.ways, c.bank, c.along),
        theta0(draw_floats((c.start == Start::kGiven ? tasks.T() : 1) * c.N * c.D, c.along - 1, c.along + 1)),
        start_bias(draw_floats(c.N)),
        weight(draw_floats(c.D, 0.5, 1.5)),
        scale{3.5},
        bias{0.125},
        target{1.5},
        mlp(draw_floats((2 * c.N + 8) * c.H + c.H * c.H + 6 * c.H + c.N, -0.7, 0.7)),
        running(draw_floats(4 * c.H, 0.5, 1.5)) {
    for (const Phase& phase : c.phases) K += phase.steps;
    rates = draw_floats(K, c.rate, 5 * c.rate);
    grad_logits = draw_floats(tasks.rows(true) * c.N);
    grad_support = draw_floats(tasks.rows(false) * c.N);
    grad_query = draw_floats(tasks.rows(true) * c.N);
    grad_start = draw_floats(tasks.T() * c.N);
    for (int64_t t = 0; t < tasks.T(); ++t) {
      const int64_t Q = c.Q[size_t(t)], N = c.ways[size_t(t)];
      for (int64_t b = 0; b <= c.bags; ++b) bag_offsets.push_back(b == c.bags ? Q : Q * b / c.bags);
      for (int64_t b = 0; b < c.bags; ++b) {
        // The first class has no share of the second bag.
        Vec p = draw_floats(c.N, 0.2, 1);
        double sum = 0;
        for (int64_t n = 0; n < c.N; ++n) {
          if (n >= N || (n == 0 && b == 1 && N > 1)) p[size_t(n)] = 0;
          sum += p[size_t(n)];
        }
        for (double& x : p) x /= sum;
        proportions.insert(proportions.end(), p.begin(), p.end());
      }
    }
  }

  template <class F>
  void round_features() {
    tasks.round_features<F>();
  }

  // F: how the features are stored.
  template <class C, class F = C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = table.of<C>();
    const int64_t N = c.N, D = c.D, H = c.H, T = tasks.T();
    const auto x = exactly<F>(tasks.support), q = exactly<F>(tasks.query);
    const auto th = exactly<C>(theta0), sb = exactly<C>(start_bias), w = exactly<C>(weight),
               sc = exactly<C>(scale), b = exactly<C>(bias), ta = exactly<C>(target), r = exactly<C>(rates),
               m = exactly<C>(mlp), ru = exactly<C>(running), gz = exactly<C>(grad_logits),
               gs = exactly<C>(grad_support), gq = exactly<C>(grad_query), g0 = exactly<C>(grad_start);
    const std::vector<C> shares(proportions.begin(), proportions.end());
    const C* at = m.data();
    const auto next = [&](int64_t n) {
      const C* piece = at;
      at += n;
      return piece;
    };
    const Sizes of_mlp = c.of_mlp(K);
    const int64_t inputs = of_mlp.N, outputs = of_mlp.outputs();
    const C *w1 = next(H * inputs), *b1 = next(H), *gain1 = next(H), *shift1 = next(H), *w2 = next(H * H),
            *b2 = next(H), *gain2 = next(H), *shift2 = next(H), *w3 = next(outputs * H), *b3 = next(outputs);
    RawMlp<C>::arrays = {w1, b1, gain1, shift1, w2, b2, gain2, shift2, w3, b3};
    RawMlp<C>::running = c.running ? ru.data() : nullptr;
    std::vector<C> memory(size_t(size_of<FoldedMlp<C>, C>(of_mlp, c.running)));
    Arena<C> folded_arena(memory.data());
    KernelCall<C> call{c.phases.data(), FoldedMlp<C>(folded_arena, of_mlp, c.running), nullptr};
    SerialBlock<C> serial;
    if (H) fold(serial, RawMlp<C>::arrays, RawMlp<C>::running, of_mlp, call.mlp);

    ProgramProblem<C> p{};
    p.T = T, p.N = N, p.D = D, p.H = H;
    p.n_phases = int64_t(c.phases.size()), p.K = K;
    p.cosine = c.cosine, p.euclidean = c.euclidean, p.dot = c.dot;
    p.coefficients = c.coefficients, p.first_order = c.first_order;
    p.pairs = c.pairs();
    p.support = tasks.of(false, x), p.query = tasks.of(true, q), p.classes = tasks.classes();
    p.start = c.start;
    if (c.start == Start::kLearned || c.start == Start::kGiven) p.theta0 = th.data();
    if (c.weight) p.weight = w.data();
    if (c.cosine)
      p.scale = sc.data(), p.bias = b.data();
    else if (c.euclidean)
      p.scale = sc.data();
    else if (!c.dot)
      p.start_bias = sb.data();
    p.target = ta.data(), p.rates = r.data();
    p.bags = c.bags;
    if (c.given_shares()) p.proportions = shares.data();
    if (c.bags > 1) p.bag_offsets = bag_offsets.data();
    int64_t stride = 0;
    for (int64_t t = 0; t < T; ++t) {
      stride = std::max(stride, program_trace_size(p, p.shape(t, c.phases.data())));
    }
    std::vector<int64_t> trace_offsets;
    for (int64_t t = 0; t <= T; ++t) trace_offsets.push_back(t * stride);
    call.trace_offsets = trace_offsets.data();
    tasks.mislead(p.support);

    const int64_t all_s = tasks.rows(false), all_q = tasks.rows(true);
    Output<C> logits(all_q * N), again(all_q * N), of_support(all_s * N), of_query(all_q * N),
        of_start(T * N), trace(T * stride), gsupport(all_s * D), gquery(all_q * D), gstart(T * N * D),
        gshares(T * c.bags * N);
    ProgramForward<C> f{p, again.get(), nullptr, nullptr, nullptr, nullptr};
    if (c.coefficients) {
      f.support_coefficients = of_support.get();
      f.query_coefficients = of_query.get();
      f.start_coefficients = of_start.get();
    }
    kernels.program_forward(f, call, 0, T);
    f.logits = logits.get();
    f.trace = trace.get();
    kernels.program_forward(f, call, 0, T);
    std::vector<C> sums(size_t(size_of<ProgramGrad<C>, C>(p)));
    Arena<C> arena(sums.data());
    const ProgramGrad<C> grad(arena, p);
    kernels.program_backward(
        {p, trace.get(), gz.data(), c.coefficients ? gs.data() : nullptr,
         c.coefficients ? gq.data() : nullptr, c.coefficients ? g0.data() : nullptr,
         c.need_support ? gsupport.get() : nullptr, c.need_query ? gquery.get() : nullptr, gstart.get(),
         c.given_shares() ? gshares.get() : nullptr},
        call, grad, 0, T);
    Named all;
    logits.keep(all, "logits");
    again.keep(all, "logits without a trace");
    if (c.coefficients) {
      of_support.keep(all, "coefficients of support");
      of_query.keep(all, "coefficients of query");
      of_start.keep(all, "coefficients of start");
    }
    if (c.need_support) gsupport.keep(all, "support");
    if (c.need_query) gquery.keep(all, "query");
    if (c.start == Start::kGiven) gstart.keep(all, "given start");
    if (c.given_shares()) gshares.keep(all, "proportions");
    const auto keep = [&](const char* name, const C* from, int64_t rows, int64_t n, int64_t ld) {
      Vec values;
      for (int64_t i = 0; i < rows; ++i) values.insert(values.end(), from + i * ld, from + i * ld + n);
      all.emplace_back(name, values);
    };
    if (c.start == Start::kLearned) keep("theta0", grad.theta0, 1, N * D, 0);
    if (!c.cosine) keep("start bias", grad.start_bias, 1, N, 0);
    if (c.weight) keep("weight", grad.weight, 1, D, 0);
    keep("scale", grad.scale, 1, 1, 0);
    keep("bias", grad.bias, 1, 1, 0);
    keep("target", grad.target, 1, 1, 0);
    keep("rates", grad.rates, 1, K, 0);
    // A bias' gradient sums up the same terms as its weight's, there times activations of about size one.
    // Where rows are nearly parallel the bias' cancel: it is held against the size of both.
    const auto keep_bias = [&](const char* name, const C* from, int64_t n) {
      if (c.along == 0) return keep(name, from, 1, n, 0);
      all.back().first += std::string(" and ") + name;
      all.back().second.insert(all.back().second.end(), from, from + n);
    };
    if (H) {
      keep("weight1", grad.mlp.w1t, inputs, H, padded(H));
      keep_bias("bias1", grad.mlp.b1, H);
      keep("weight2", grad.mlp.w2, H, H, padded(H));
      keep_bias("bias2", grad.mlp.b2, H);
      keep("weight3", grad.mlp.w3, outputs, H, padded(H));
      keep_bias("bias3", grad.mlp.b3, outputs);
    }
    return all;
  }

  std::string text() const { return std::string(c.name) + ", " + tasks.text(); }
};

// joint: those, too, that want Blocks with kJointSteps.
std::vector<ProgramCase> program_cases(bool joint = false) {
  const Phase asks{Oracle::kSyntheticGradient, true, false, 2};
  const Phase asks_support{Oracle::kSyntheticGradient, false, true, 1};
  const Phase cross_entropy{Oracle::kCrossEntropy, false, true, 2},
      squares{Oracle::kSquaredError, false, false, 1};
  const Phase hinge{Oracle::kHinge, false, true, 2}, entropy{Oracle::kEntropy, true, true, 1};
  const Phase assigns{Oracle::kSoftAssignment, true, false, 2};
  using V = std::vector<int64_t>;
  std::vector<ProgramCase> cases;
  const auto add = [&](const char* name, int64_t D, int64_t N, int64_t H, V S, V Q, V ways,
                       std::vector<Phase> phases, bool cosine, Start start) -> ProgramCase& {
    cases.push_back({name, D, N, H, S, Q, ways, phases, cosine, start});
    return cases.back();
  };
  add("synthetic gradient", 13, 3, 5, {7, 7}, {11, 11}, {3, 3}, {asks}, true, Start::kClassMeans).weight =
      true;
  const Phase pairs{Oracle::kEquivariantGradient, true, false, 2};
  const Phase pairs_of_support{Oracle::kEquivariantGradient, false, true, 1};
  add("equivariant gradient", 13, 3, 5, {7, 7}, {11, 11}, {3, 3}, {pairs}, true, Start::kClassMeans).weight =
      true;
  auto& any_ways = add("equivariant gradient, unequal tasks", 12, 5, 6, {9, 4, 17}, {20, 3, 9}, {2, 4, 5},
                       {hinge, pairs, pairs_of_support}, true, Start::kClassMeans);
  any_ways.coefficients = any_ways.running = any_ways.bank = true;
  auto& along = add("equivariant gradient at rows nearly parallel", 6, 3, 5, {4, 4}, {19, 19}, {3, 3},
                    {pairs, cross_entropy}, true, Start::kLearned);
  along.rate = 0.3, along.along = 0.5;
  add("equivariant gradient, linear", 9, 3, 4, {5}, {18}, {3}, {pairs}, false, Start::kLearned);
  add("linear", 21, 3, 0, {18, 18}, {9, 9}, {3, 3}, {cross_entropy}, false, Start::kLearned);
  auto& constants =
      add("linear, first order", 9, 2, 0, {5}, {6}, {2}, {squares, hinge}, false, Start::kLearned);
  constants.first_order = constants.coefficients = true;
  auto& sums =
      add("squares, then entropy", 17, 3, 0, {6, 6}, {5, 5}, {3, 3}, {squares, entropy}, false, Start::kZero);
  sums.coefficients = sums.bank = true;
  auto& means = add("cross entropy, then soft assignment", 19, 3, 0, {7, 7}, {18, 18}, {3, 3},
                    {cross_entropy, assigns}, true, Start::kClassMeans);
  means.coefficients = means.weight = true;
  auto& ragged = add("unequal tasks", 12, 4, 6, {9, 4, 17}, {20, 3, 1}, {2, 4, 3},
                     {hinge, asks, asks_support}, true, Start::kClassMeans);
  ragged.coefficients = ragged.running = ragged.bank = true;
  auto& rows = add("unequal tasks, cosine from a learned start", 40, 3, 0, {3, 19}, {17, 2}, {3, 2},
                   {entropy, cross_entropy}, true, Start::kLearned);
  rows.need_support = false;
  auto& none = add("parameters alone", 15, 2, 5, {4}, {5}, {2}, {asks_support}, false, Start::kLearned);
  none.need_support = none.need_query = none.weight = false;
  // Steps that cancel.
  auto& parallel = add("squares, then soft assignment, of rows nearly parallel", 11, 3, 0, {7, 4}, {5, 18},
                       {3, 2}, {squares, assigns}, true, Start::kClassMeans);
  parallel.coefficients = parallel.weight = true;
  parallel.rate = 0.3, parallel.along = 3;
  auto& guesses = add("guesses at rows nearly parallel", 6, 2, 5, {4, 4}, {9, 9}, {2, 2},
                      {asks, cross_entropy}, true, Start::kLearned);
  guesses.rate = 0.3, guesses.along = 0.5, guesses.bank = true;
  add("no steps", 8, 2, 0, {3}, {5}, {2}, {}, true, Start::kClassMeans).coefficients = true;
  add("no steps, linear", 8, 2, 0, {3}, {5}, {2}, {}, false, Start::kLearned);
  const Phase divergence{Oracle::kProportions, true, true, 2, Shares::kGiven};
  const Phase transports{Oracle::kAssignment, true, true, 2, Shares::kGiven};
  const Phase relaxed{Oracle::kSoftAssignment, true, false, 1, Shares::kGiven, 0.75};
  const Phase uniform{Oracle::kSoftAssignment, true, false, 1, Shares::kUniform};
  add("known shares", 11, 3, 0, {4, 4}, {11, 11}, {3, 3}, {divergence, transports}, true, Start::kClassMeans)
      .coefficients = true;
  auto& in_bags = add("known shares of bags, unequal tasks", 9, 4, 0, {0, 5, 4}, {21, 18, 3}, {4, 3, 2},
                      {relaxed, divergence, uniform, transports}, true, Start::kGiven);
  in_bags.bags = 3, in_bags.coefficients = in_bags.bank = true;
  add("known shares, linear", 12, 5, 0, {7}, {20}, {5}, {transports, divergence}, false, Start::kLearned);
  auto& cancelling = add("known shares at rows nearly parallel", 6, 3, 0, {4, 4}, {9, 9}, {3, 3},
                         {transports, relaxed}, true, Start::kLearned);
  cancelling.rate = 0.3, cancelling.along = 0.5;
  add("a given start, no labelled row", 10, 3, 0, {0, 0}, {9, 9}, {3, 3}, {entropy, assigns}, true,
      Start::kGiven)
      .coefficients = true;
  add("a given start, unequal tasks", 9, 4, 0, {0, 2, 7}, {5, 18, 1}, {2, 4, 3}, {entropy, assigns}, true,
      Start::kGiven)
      .bank = true;
  add("a given start, linear", 9, 3, 0, {2, 2}, {9, 9}, {3, 3}, {cross_entropy, entropy}, false,
      Start::kGiven);
  auto& rows_alike = add("a given start, rows nearly parallel", 11, 3, 0, {7, 4}, {5, 18}, {3, 2},
                         {squares, assigns}, true, Start::kGiven);
  rows_alike.rate = 0.3, rows_alike.along = 3;
  add("support alone", 17, 3, 0, {6}, {5}, {3}, {squares, entropy}, false, Start::kZero).need_query = false;
  if (!joint) return cases;
  // (Rows have their own lengths here, |x|^2 of about D: steps as long as a cosine's would diverge.)
  constexpr double kShort = 0.002;
  auto& distances = add("distances", 13, 3, 0, {7, 7}, {18, 18}, {3, 3}, {cross_entropy, entropy}, false,
                        Start::kClassMeans);
  distances.euclidean = distances.coefficients = distances.weight = true;
  distances.rate = kShort;
  auto& unequal = add("distances, unequal tasks", 9, 4, 5, {9, 4, 17}, {20, 3, 1}, {2, 4, 3},
                      {squares, asks, hinge}, false, Start::kLearned);
  unequal.euclidean = unequal.bank = true;
  unequal.rate = kShort;
  auto& from_zero = add("distances from zero", 1, 2, 0, {5}, {6}, {2}, {squares}, false, Start::kZero);
  from_zero.euclidean = from_zero.coefficients = true;
  auto& by_shares = add("distances and known shares, no labelled row", 12, 5, 0, {0}, {20}, {5},
                        {divergence, transports}, false, Start::kGiven);
  by_shares.euclidean = true;
  by_shares.rate = kShort;
  const auto joined = [](Phase phase, double weight, bool last = false) {
    if (!last) phase.steps = 0;
    phase.weight = weight, phase.joins = !last;
    return phase;
  };
  const Phase spread{Oracle::kMarginalEntropy, true, true, 2},
      tsallis{Oracle::kEntropy, true, true, 2, Shares::kNone, 2};
  const std::vector<Phase> sum{joined(cross_entropy, 1), joined(entropy, 0.5), joined(spread, -1.5, true)};
  add("joint steps, linear", 13, 3, 0, {7, 7}, {18, 18}, {3, 3}, sum, false, Start::kClassMeans)
      .coefficients = true;
  add("joint steps", 13, 3, 0, {7, 7}, {18, 18}, {3, 3}, sum, true, Start::kClassMeans).coefficients = true;
  auto& by_distance =
      add("joint steps by distances, unequal tasks", 9, 4, 5, {9, 4, 17}, {20, 3, 1}, {2, 4, 3},
          {joined(squares, 0.5), joined(asks_support, 0.1), joined(tsallis, 1, true), asks}, false,
          Start::kLearned);
  by_distance.euclidean = by_distance.coefficients = by_distance.bank = true;
  by_distance.rate = kShort;
  auto& lost_together =
      add("joint steps at rows nearly parallel", 6, 3, 0, {4, 4}, {9, 9}, {3, 3}, sum, true, Start::kLearned);
  lost_together.rate = 0.3, lost_together.along = 0.5;
  auto& products = add("dot products, unequal tasks", 9, 4, 5, {9, 4, 17}, {20, 3, 1}, {2, 4, 3},
                       {squares, asks, hinge}, false, Start::kLearned);
  products.dot = products.coefficients = products.bank = true;
  auto& one_way = add("dot products, one way and no labelled row", 1, 1, 4, {0, 0}, {18, 18}, {1, 1}, {asks},
                      false, Start::kGiven);
  one_way.dot = one_way.coefficients = one_way.running = true;
  return cases;
}

}  // namespace
}  // namespace kernelmeta
