// Kernels of the other learners (csrc/cpu/kernel_table.h), double and float, against those of a table that is
// taken for right: it is compared with PyTorch by tests/ops.
#pragma once

#include <memory>

#include "tests/ntk_checks.h"

namespace kernelmeta {
namespace {

struct HeadCase {
  Sizes s;  // T, S, Q, N, D, K
  Oracle oracle;
  bool first_order, heads, need_support, need_query, bank;
  int64_t offset = 0;  // elements before the first feature
};

struct HeadEpisode {
  HeadCase c;
  Vec support, query, weight, bias, rates, grad_logits, grad_heads;
  std::vector<int64_t> labels, support_index, query_index;

  explicit HeadEpisode(const HeadCase& of)
      : c(of),
        support(draw_floats(c.s.T * c.s.S * c.s.D)),
        query(draw_floats(c.s.T * c.s.Q * c.s.D)),
        weight(draw_floats(c.s.N * c.s.D)),
        bias(draw_floats(c.s.N)),
        rates(draw_floats(c.s.K, 0.05, 0.2)),
        grad_logits(draw_floats(c.s.T * c.s.Q * c.s.N)),
        grad_heads(draw_floats(c.s.T * c.s.N * (c.s.D + 1))),
        labels(draw_numbers(c.s.T * c.s.S, c.s.N)),
        support_index(draw_numbers(c.s.T * c.s.S, c.s.T * c.s.S)),
        query_index(draw_numbers(c.s.T * c.s.Q, c.s.T * c.s.Q)) {}

  // Features that F stores as they are.
  template <class F>
  void round_features() {
    for (Vec* v : {&support, &query}) *v = rounded<F>(*v);
  }

  // F: how the features are stored.
  template <class C, class F = C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = table.of<C>();
    const Sizes& s = c.s;
    const auto moved = [&](const Vec& v) {
      Vec all(size_t(c.offset), NAN);
      all.insert(all.end(), v.begin(), v.end());
      return exactly<F>(all);
    };
    const auto x = moved(support), q = moved(query);
    const auto w = exactly<C>(weight), b = exactly<C>(bias), r = exactly<C>(rates),
               gz = exactly<C>(grad_logits), gh = exactly<C>(grad_heads);
    const auto features = [&](const std::vector<F>& of, int64_t rows, const std::vector<int64_t>& index) {
      const F* first = of.data() + c.offset;
      if (c.bank) return Features{first, kStorage<F>, rows, 0, s.D, index.data(), s.T * rows};
      return Features{first, kStorage<F>, rows, rows * s.D, s.D, nullptr, 0};
    };
    const HeadProblem<C> problem{s,
                                 features(x, s.S, support_index),
                                 features(q, s.Q, query_index),
                                 labels.data(),
                                 w.data(),
                                 b.data(),
                                 r.data(),
                                 c.oracle,
                                 c.first_order};
    Output<C> logits(s.T * s.Q * s.N), again(s.T * s.Q * s.N), heads(s.T * s.N * (s.D + 1)),
        trace(s.T * head_trace_size<C>(s)), gsupport(s.T * s.S * s.D), gquery(s.T * s.Q * s.D);
    C* wanted_heads = c.heads ? heads.get() : nullptr;
    kernels.linear_head_forward({problem, again.get(), wanted_heads, nullptr}, 0, s.T);
    kernels.linear_head_forward({problem, logits.get(), wanted_heads, trace.get()}, 0, s.T);
    std::vector<C> sums(size_t(size_of<HeadParameterGrad<C>, C>(s)));
    Arena<C> arena(sums.data());
    const HeadParameterGrad<C> grad(arena, s);
    kernels.linear_head_backward(
        {problem, trace.get(), gz.data(), c.heads ? gh.data() : nullptr,
         c.need_support ? gsupport.get() : nullptr, c.need_query ? gquery.get() : nullptr},
        grad, 0, s.T);
    Named all;
    logits.keep(all, "logits");
    again.keep(all, "logits without a trace");
    if (c.heads) heads.keep(all, "heads");
    if (c.need_support) gsupport.keep(all, "support");
    if (c.need_query) gquery.keep(all, "query");
    all.emplace_back("weight", Vec(grad.weight, grad.weight + s.N * s.D));
    all.emplace_back("bias", Vec(grad.bias, grad.bias + s.N));
    all.emplace_back("rates", Vec(grad.rates, grad.rates + s.K));
    trace.keep(all, "trace");  // handed out: its padding too must be the same every time
    return all;
  }

  std::string text() const {
    return "linear head, oracle " + std::to_string(int64_t(c.oracle)) + ", T=" + std::to_string(c.s.T) +
           " S=" + std::to_string(c.s.S) + " Q=" + std::to_string(c.s.Q) + " N=" + std::to_string(c.s.N) +
           " D=" + std::to_string(c.s.D) + " K=" + std::to_string(c.s.K);
  }
};

std::vector<HeadCase> head_cases() {
  //        T  S  Q   N  D  H  K
  return {{{2, 7, 11, 3, 13, 0, 2}, Oracle::kCrossEntropy, false, true, true, true, false},
          {{1, 1, 1, 1, 1, 0, 1}, Oracle::kSquaredError, false, true, true, true, false},
          {{3, 20, 17, 5, 37, 0, 3}, Oracle::kHinge, false, false, true, true, true},
          {{2, 18, 5, 4, 40, 0, 2}, Oracle::kSquaredError, true, true, true, false, false},
          {{2, 5, 9, 3, 16, 0, 0}, Oracle::kCrossEntropy, false, true, true, true, false},
          {{2, 6, 9, 3, 16, 0, 0}, Oracle::kCrossEntropy, false, true, false, false, false},
          {{1, 100, 9, 2, 21, 0, 2}, Oracle::kCrossEntropy, false, false, false, false, false}};
}

// The MLP of the program that runs as it comes: what is folded already is of no use to those who fold it.
template <class C>
struct RawMlp {
  inline static MlpArrays<const C> arrays{};
  inline static const C* running = nullptr;
};

// Rows and labels of tasks that may differ in size.
struct Tasks {
  int64_t D, N;                        // N: of the task that has most
  std::vector<int64_t> S, Q, ways;     // of each task
  bool ragged, bank;                   // if not ragged, all tasks are as the first
  int64_t most[2] = {-1, -1};          // support and query rows that a task may have; -1: offsets are right
  std::vector<int64_t> wrong_offsets;  // what the kernels are told of the support rows, if it is wrong
  std::vector<int64_t> support_offsets{0}, query_offsets{0}, labels, support_index, query_index;
  Vec support, query;

  Tasks(int64_t D, int64_t N, const std::vector<int64_t>& S, const std::vector<int64_t>& Q,
        const std::vector<int64_t>& ways, bool bank, double along = 0)
      : D(D), N(N), S(S), Q(Q), ways(ways), ragged(false), bank(bank) {
    for (size_t t = 0; t < S.size(); ++t) {
      ragged = ragged || S[t] != S[0] || Q[t] != Q[0] || ways[t] != N;
      support_offsets.push_back(support_offsets.back() + S[t]);
      query_offsets.push_back(query_offsets.back() + Q[t]);
      const auto rest = draw_numbers(S[t], ways[t]);
      for (int64_t i = 0; i < S[t]; ++i) labels.push_back(i < ways[t] ? ways[t] - 1 - i : rest[size_t(i)]);
    }
    support = draw_floats(rows(false) * D, along - 1, along + 1);
    query = draw_floats(rows(true) * D, along - 1, along + 1);
    support_index = draw_numbers(rows(false), rows(false));
    query_index = draw_numbers(rows(true), rows(true));
  }

  template <class F>
  void round_features() {
    for (Vec* v : {&support, &query}) *v = rounded<F>(*v);
  }
  int64_t T() const { return int64_t(S.size()); }
  int64_t rows(bool of_query) const { return (of_query ? query_offsets : support_offsets).back(); }

  template <class F>
  TaskRows of(bool of_query, const std::vector<F>& data) const {
    const auto& counts = of_query ? Q : S;
    const bool even = !ragged && !bank;
    return {{data.data(), kStorage<F>, ragged ? 0 : counts[0], even ? counts[0] * D : 0, D,
             bank ? (of_query ? query_index : support_index).data() : nullptr, bank ? rows(of_query) : 0},
            ragged ? (of_query ? query_offsets : support_offsets).data() : nullptr,
            even,
            rows(of_query),
            most[of_query]};
  }
  // What the kernels are told, where it is not what it should be.
  void mislead(TaskRows& of_support) const {
    if (!wrong_offsets.empty()) of_support.offsets = wrong_offsets.data();
  }
  TaskClasses classes() const { return {{labels.data(), nullptr, nullptr}, ragged ? ways.data() : nullptr}; }
  std::string text() const {
    std::string text = "D=" + std::to_string(D);
    for (size_t t = 0; t < S.size(); ++t) {
      text += " (S=" + std::to_string(S[t]) + " Q=" + std::to_string(Q[t]) + " N=" + std::to_string(ways[t]) +
              ")";
    }
    return text;
  }
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
    p.cosine = c.cosine, p.euclidean = c.euclidean;
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
    else
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
  return cases;
}

struct RidgeCase {
  int64_t D, N;
  std::vector<int64_t> S, Q, ways;
  bool coefficients, bank, need_support, need_query;
};

struct RidgeEpisode {
  RidgeCase c;
  Tasks tasks;
  Vec lambda{0.75}, scale{2.5}, bias{0.25}, grad_logits, grad_coefficients;

  explicit RidgeEpisode(const RidgeCase& of)
      : c(of),
        tasks(c.D, c.N, c.S, c.Q, c.ways, c.bank),
        grad_logits(draw_floats(tasks.rows(true) * c.N)),
        grad_coefficients(draw_floats(tasks.rows(false) * c.N)) {}

  template <class F>
  void round_features() {
    tasks.round_features<F>();
  }

  // F: how the features are stored.
  template <class C, class F = C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = table.of<C>();
    const auto x = exactly<F>(tasks.support), q = exactly<F>(tasks.query);
    const auto la = exactly<C>(lambda), sc = exactly<C>(scale), b = exactly<C>(bias),
               gz = exactly<C>(grad_logits), ga = exactly<C>(grad_coefficients);
    const int64_t T = tasks.T();
    RidgeProblem<C> p{T,         c.N,       c.D,     tasks.of(false, x), tasks.of(true, q), tasks.classes(),
                      la.data(), sc.data(), b.data()};
    int64_t stride = 0;
    for (int64_t t = 0; t < T; ++t) stride = std::max(stride, ridge_trace_size<C>(p.sizes(t)));
    std::vector<int64_t> trace_offsets;
    for (int64_t t = 0; t <= T; ++t) trace_offsets.push_back(t * stride);
    tasks.mislead(p.support);
    const int64_t all_s = tasks.rows(false), all_q = tasks.rows(true);
    Output<C> logits(all_q * c.N), again(all_q * c.N), alpha(all_s * c.N), trace(T * stride),
        gsupport(all_s * c.D), gquery(all_q * c.D);
    const std::unique_ptr<bool[]> singular(new bool[size_t(T)]());
    kernels.ridge_forward({p, again.get(), alpha.get(), nullptr}, trace_offsets.data(), singular.get(), 0, T);
    kernels.ridge_forward({p, logits.get(), alpha.get(), trace.get()}, trace_offsets.data(), singular.get(),
                          0, T);
    std::vector<C> sums(size_t(size_of<RidgeGrad<C>, C>()));
    Arena<C> arena(sums.data());
    const RidgeGrad<C> grad(arena);
    kernels.ridge_backward({p, trace.get(), gz.data(), c.coefficients ? ga.data() : nullptr,
                            c.need_support ? gsupport.get() : nullptr, c.need_query ? gquery.get() : nullptr},
                           trace_offsets.data(), grad, 0, T);
    Named all;
    logits.keep(all, "logits");
    again.keep(all, "logits without a trace");
    alpha.keep(all, "coefficients");
    if (c.need_support) gsupport.keep(all, "support");
    if (c.need_query) gquery.keep(all, "query");
    all.emplace_back("regularization, scale, bias", Vec{*grad.lambda, *grad.scale, *grad.bias});
    return all;
  }

  std::string text() const { return "ridge, " + tasks.text(); }
};

std::vector<RidgeCase> ridge_cases() {
  return {{13, 3, {7, 7}, {11, 11}, {3, 3}, true, false, true, true},
          {9, 1, {1}, {1}, {1}, false, false, true, true},
          {40, 4, {4, 19, 33}, {3, 20, 1}, {4, 2, 3}, true, true, true, true},
          {21, 2, {18}, {5}, {2}, false, false, false, false},
          {16, 2, {6}, {5}, {2}, true, false, false, true}};
}

struct DistillationCase {
  int64_t R, N;
  LogitDistance distance;
  double tau, power, smoothing, spread;  // spread: of the logits
  bool weighted, labelled, ruled_out;
};

struct DistillationEpisode {
  DistillationCase c;
  Vec now, old, class_weight, grad_distances, grad_label_losses;
  std::vector<int64_t> labels;

  explicit DistillationEpisode(const DistillationCase& of)
      : c(of),
        now(draw_floats(c.R * c.N, -c.spread, c.spread)),
        old(draw_floats(c.R * c.N, -c.spread, c.spread)),
        class_weight(draw_floats(c.N, 0.5, 2)),
        grad_distances(draw_floats(c.R)),
        grad_label_losses(draw_floats(c.R)),
        labels(draw_numbers(c.R, c.N)) {
    if (c.R > 2) labels[1] = -100;
    for (int64_t r = 0; r < c.R && c.ruled_out; ++r) {
      const auto n = size_t(r * c.N + (std::max<int64_t>(labels[size_t(r)], 0) + 1) % c.N);
      old[n] = -INFINITY;
      if (r % 2) now[n] = -INFINITY;
    }
  }

  template <class F>
  void round_features() {
    for (Vec* v : {&now, &old}) *v = rounded<F>(*v);
  }

  // F: how the logits are stored.
  template <class C, class F = C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = table.of<C>();
    const auto z = exactly<F>(now), z_old = exactly<F>(old);
    const auto w = exactly<C>(class_weight), gd = exactly<C>(grad_distances),
               gl = exactly<C>(grad_label_losses);
    const auto rows = [&](const std::vector<F>& of) {
      return Features{of.data(), kStorage<F>, 1, c.N, 0, nullptr, 0};
    };
    const DistillationProblem<C> problem{c.R,
                                         c.N,
                                         rows(z),
                                         rows(z_old),
                                         labels.data(),
                                         c.weighted ? w.data() : nullptr,
                                         c.distance,
                                         C(1),
                                         C(5),
                                         C(c.tau),
                                         C(0.25),
                                         C(c.power),
                                         C(c.smoothing),
                                         c.labelled,
                                         -100};
    Output<C> distances(c.R), again(c.R), label_losses(c.R), trace(c.R * DistillationRow::kSize),
        grad(c.R * c.N);
    std::vector<uint8_t> codes(size_t(c.R), 255);
    C* losses = c.labelled ? label_losses.get() : nullptr;
    kernels.focal_distillation_forward({problem, again.get(), losses, codes.data(), nullptr}, 0, c.R);
    kernels.focal_distillation_forward({problem, distances.get(), losses, codes.data(), trace.get()}, 0, c.R);
    kernels.focal_distillation_backward(
        {problem, trace.get(), gd.data(), c.labelled ? gl.data() : nullptr, grad.get()}, 0, c.R);
    Named all;
    distances.keep(all, "distances");
    again.keep(all, "distances without a trace");
    if (c.labelled) label_losses.keep(all, "label losses");
    all.emplace_back("codes", Vec(codes.begin(), codes.end()));
    grad.keep(all, "new logits");
    return all;
  }

  std::string text() const {
    return "focal distillation, distance " + std::to_string(int64_t(c.distance)) +
           ", R=" + std::to_string(c.R) + " N=" + std::to_string(c.N) + " tau=" + std::to_string(c.tau);
  }
};

std::vector<DistillationCase> distillation_cases() {
  using D = LogitDistance;
  return {{7, 33, D::kKl, 100, 2, 0, 3, false, true, false},
          {13, 5, D::kKl, 1, 2, 0.1, 3, true, true, true},
          {2, 40, D::kKl, 1, 2, 0, 60, false, false, true},
          {3, 1, D::kKl, 2, 2, 0.1, 3, false, true, false},
          {9, 17, D::kSquared, 1, 2, 0, 3, true, true, false},
          {1, 64, D::kSquaredMean, 1, 2, 0.2, 3, false, true, true},
          {14, 20, D::kLdi, 1, 2, 0, 3, false, true, true},
          {5, 7, D::kLdiMean, 1, 1, 0, 3, false, false, false},
          {4, 50, D::kLdi, 1, 3.5, 0, 3, false, true, false}};
}

// Zero where both are minus infinity: logits of ways that a task does not have.
Vec finite(const Vec& values, const Vec& want) {
  Vec some = values;
  for (size_t i = 0; i < some.size(); ++i) {
    if (want[i] == -INFINITY && values[i] == want[i]) some[i] = 0;
  }
  return some;
}

void compare_named(const std::string& name, const Named& got, const Named& want, double tolerance) {
  for (size_t i = 0; i < want.size(); ++i) {
    const std::string what = name + ": " + want[i].first;
    if (got[i].second.size() == want[i].second.size()) {
      expect_near(what, finite(got[i].second, want[i].second), finite(want[i].second, want[i].second),
                  tolerance);
    } else {
      std::printf("FAILED %s: %zu elements for %zu\n", what.c_str(), got[i].second.size(),
                  want[i].second.size());
      ++failures;
    }
  }
}

// `got` in double and in float against `right` in double.
template <class E>
void compare_episode(const std::string& name, const E& episode, const KernelTable& right,
                     const KernelTable& got) {
  const Named want = episode.template run<double>(right);
  compare_named(name + " " + episode.text(), episode.template run<double>(got), want, 1e-10);
  compare_named(name + " " + episode.text(), episode.template run<float>(got), want, 2e-4);
}

// `got` in float, which reads features stored as F, against `right` in double.
template <class F, class E>
void compare_narrow(const std::string& name, E episode, const KernelTable& right, const KernelTable& got) {
  episode.template round_features<F>();
  compare_named(name + " " + episode.text(), episode.template run<float, F>(got),
                episode.template run<double>(right), 2e-4);
}

// So many rows that they do not all meet at once.
HeadCase many_head_rows() {
  return {{1, 130, 9, 2, 71, 0, 2}, Oracle::kCrossEntropy, false, true, true, true, true};
}
// An even number of features, which two of the words on rows share out among threads in two ways: in more
// rows than five, or where two features cannot be read at once.
std::vector<HeadCase> even_head_rows() {
  return {{{1, 9, 7, 3, 80, 0, 2}, Oracle::kCrossEntropy, false, true, true, true, false},
          {{1, 4, 7, 3, 80, 0, 2}, Oracle::kSquaredError, false, true, true, true, false, 1}};
}
RidgeCase many_ridge_rows() { return {70, 2, {40}, {101}, {2}, true, false, true, true}; }

template <class F>
int check_narrow_learners(const std::string& name, const KernelTable& right, const KernelTable& got) {
  const auto of_others = generator;
  generator.seed(2);
  for (const HeadCase& c : head_cases()) compare_narrow<F>(name, HeadEpisode(c), right, got);
  for (const ProgramCase& c : program_cases()) compare_narrow<F>(name, ProgramEpisode(c), right, got);
  for (const RidgeCase& c : ridge_cases()) compare_narrow<F>(name, RidgeEpisode(c), right, got);
  for (const DistillationCase& c : distillation_cases())
    compare_narrow<F>(name, DistillationEpisode(c), right, got);
  for_each_network([&](const auto& episode) { compare_narrow<F>(name, episode, right, got); });
  compare_narrow<F>(name, HeadEpisode(many_head_rows()), right, got);
  compare_narrow<F>(name, RidgeEpisode(many_ridge_rows()), right, got);
  for (const HeadCase& c : even_head_rows()) compare_narrow<F>(name, HeadEpisode(c), right, got);
  generator = of_others;
  std::printf(failures ? "%d failed\n" : "narrow learners: all passed\n", failures);
  return failures != 0;
}

[[maybe_unused]] int check_learners(const std::string& name, const KernelTable& right, const KernelTable& got,
                                    bool joint = false) {
  const auto of_others = generator;
  generator.seed(1);
  for (const HeadCase& c : head_cases()) compare_episode(name, HeadEpisode(c), right, got);
  for (const ProgramCase& c : program_cases(joint)) compare_episode(name, ProgramEpisode(c), right, got);
  for (const RidgeCase& c : ridge_cases()) compare_episode(name, RidgeEpisode(c), right, got);
  for (const DistillationCase& c : distillation_cases())
    compare_episode(name, DistillationEpisode(c), right, got);
  for_each_network([&](const auto& episode) { compare_episode(name, episode, right, got); });
  for (const HeadCase& c : even_head_rows()) compare_episode(name, HeadEpisode(c), right, got);
  generator = of_others;
  std::printf(failures ? "%d failed\n" : "learners: all passed\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace kernelmeta
