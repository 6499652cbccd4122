// Kernels that run on neural tangent kernels, for learner_checks.h.
#pragma once

#include "tests/named_results.h"

namespace kernelmeta {
namespace {

struct NetworkCase {
  int64_t T, S, Q;
  std::vector<int64_t> widths;
  bool biased;
  double slope;
  int64_t steps;  // of the descent
  bool option;    // cross entropy; the full kernel
  bool need_support, need_query, bank;
};

// What both kernels are called with.
struct NetworkEpisode {
  NetworkCase c;
  Perceptron net{};
  Vec support, query, parameters, targets, row_weights, lr{0.25}, decay{0.125};
  std::vector<int64_t> support_index, query_index;

  explicit NetworkEpisode(const NetworkCase& of)
      : c(of), support(draw_floats(c.T * c.S * c.widths[0])), query(draw_floats(c.T * c.Q * c.widths[0])) {
    net.layers = int(c.widths.size()) - 1;
    for (size_t l = 0; l < c.widths.size(); ++l) net.widths[l] = c.widths[l];
    net.has_bias = c.biased;
    parameters = draw_floats(net.parameters(), -0.5, 0.5);
    targets = draw_floats(c.T * c.S * net.outputs(), 0, 1);
    row_weights = draw_floats(c.T * c.S, 0, 0.3);
    support_index = draw_numbers(c.T * c.S, c.T * c.S);
    query_index = draw_numbers(c.T * c.Q, c.T * c.Q);
  }

  template <class F>
  void round_features() {
    for (Vec* v : {&support, &query}) *v = rounded<F>(*v);
  }

  template <class F>
  Features features(const std::vector<F>& of, int64_t rows, const std::vector<int64_t>& index) const {
    const int64_t D = c.widths[0];
    if (c.bank) return Features{of.data(), kStorage<F>, rows, 0, D, index.data(), c.T * rows};
    return Features{of.data(), kStorage<F>, rows, rows * D, D, nullptr, 0};
  }

  std::string sizes() const {
    std::string text = "T=" + std::to_string(c.T) + " S=" + std::to_string(c.S) + " Q=" + std::to_string(c.Q);
    for (const int64_t width : c.widths) text += " " + std::to_string(width);
    return text + (c.option ? ", option" : "");
  }
};

struct DescentEpisode : NetworkEpisode {
  Vec grad_outputs, grad_coefficients;

  explicit DescentEpisode(const NetworkCase& of)
      : NetworkEpisode(of),
        grad_outputs(draw_floats(c.T * c.Q * net.outputs())),
        grad_coefficients(draw_floats(c.T * c.S * net.outputs())) {}

  // F: how the features are stored.
  template <class C, class F = C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = table.of<C>();
    const int64_t N = net.outputs(), D = net.features();
    const auto x = exactly<F>(support), q = exactly<F>(query);
    const auto w = exactly<C>(parameters), y = exactly<C>(targets), r = exactly<C>(row_weights),
               rate = exactly<C>(lr), wd = exactly<C>(decay), gz = exactly<C>(grad_outputs),
               gp = exactly<C>(grad_coefficients);
    const DescentProblem<C> problem{c.T,
                                    c.S,
                                    c.Q,
                                    net,
                                    features(x, c.S, support_index),
                                    features(q, c.Q, query_index),
                                    y.data(),
                                    r.data(),
                                    w.data(),
                                    rate.data(),
                                    wd.data(),
                                    C(c.slope),
                                    c.steps,
                                    c.option};
    Output<C> outputs(c.T * c.Q * N), again(c.T * c.Q * N), pulls(c.T * c.S * N),
        trace(c.T * descent_trace_size<C>(problem)), gsupport(c.T * c.S * D), gquery(c.T * c.Q * D),
        gtargets(c.T * c.S * N), gweights(c.T * c.S);
    kernels.linearised_descent_forward({problem, again.get(), pulls.get(), nullptr}, 0, c.T);
    kernels.linearised_descent_forward({problem, outputs.get(), pulls.get(), trace.get()}, 0, c.T);
    std::vector<C> sums(size_t(size_of<DescentGrad<C>, C>(net)));
    Arena<C> arena(sums.data());
    const DescentGrad<C> grad(arena, net);
    kernels.linearised_descent_backward(
        {problem, trace.get(), gz.data(), c.bank ? nullptr : gp.data(),
         c.need_support ? gsupport.get() : nullptr, c.need_query ? gquery.get() : nullptr, gtargets.get(),
         gweights.get()},
        grad, 0, c.T);
    Named all;
    outputs.keep(all, "outputs");
    again.keep(all, "outputs without a trace");
    pulls.keep(all, "coefficients");
    if (c.need_support) gsupport.keep(all, "support");
    if (c.need_query) gquery.keep(all, "query");
    gtargets.keep(all, "targets");
    gweights.keep(all, "row weights");
    keep_parameters(all, grad.parameters, net);
    all.emplace_back("rates", Vec{*grad.lr, *grad.decay});
    trace.keep(all, "trace");  // handed out: its padding too must be the same every time
    return all;
  }

  std::string text() const { return "linearised descent, " + sizes(); }

  // Without the padding, into which anything may be added.
  template <class C>
  static void keep_parameters(Named& all, const C* grad, const Perceptron& net) {
    Vec kept;
    for (int l = 0; l < net.layers; ++l) {
      for (int64_t h = 0; h < net.widths[l + 1]; ++h) {
        for (int64_t i = 0; i < net.widths[l]; ++i)
          kept.push_back(grad[net.weight_at(l) + h * net.ld(l) + i]);
        if (net.has_bias) kept.push_back(grad[net.bias_at(l) + h]);
      }
    }
    all.emplace_back("parameters", kept);
  }
};

struct NtkEpisode : NetworkEpisode {
  Vec grad_gram, grad_cross, grad_support_outputs, grad_query_outputs;

  explicit NtkEpisode(const NetworkCase& of)
      : NetworkEpisode(of),
        grad_gram(draw_floats(c.T * c.S * c.S * pair())),
        grad_cross(draw_floats(c.T * c.Q * c.S * pair())),
        grad_support_outputs(draw_floats(c.T * c.S * net.outputs())),
        grad_query_outputs(draw_floats(c.T * c.Q * net.outputs())) {}

  int64_t pair() const { return c.option ? net.outputs() * net.outputs() : 1; }

  // F: how the features are stored.
  template <class C, class F = C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = table.of<C>();
    const int64_t N = net.outputs(), D = net.features();
    const auto x = exactly<F>(support), q = exactly<F>(query);
    const auto w = exactly<C>(parameters), gg = exactly<C>(grad_gram), gc = exactly<C>(grad_cross),
               gs = exactly<C>(grad_support_outputs), gq = exactly<C>(grad_query_outputs);
    const NtkProblem<C> problem{
        c.T,      c.S,        c.Q,     net, features(x, c.S, support_index), features(q, c.Q, query_index),
        w.data(), C(c.slope), c.option};
    Output<C> gram(c.T * c.S * c.S * pair()), cross(c.T * c.Q * c.S * pair()), of_support(c.T * c.S * N),
        of_query(c.T * c.Q * N), again(c.T * c.S * c.S * pair()), trace(c.T * ntk_trace_size<C>(problem)),
        gsupport(c.T * c.S * D), gquery(c.T * c.Q * D);
    kernels.ntk_gram_forward({problem, again.get(), cross.get(), of_support.get(), of_query.get(), nullptr},
                             0, c.T);
    kernels.ntk_gram_forward(
        {problem, gram.get(), cross.get(), of_support.get(), of_query.get(), trace.get()}, 0, c.T);
    std::vector<C> sums(size_t(size_of<NtkGrad<C>, C>(net)));
    Arena<C> arena(sums.data());
    const NtkGrad<C> grad(arena, net);
    kernels.ntk_gram_backward({problem, trace.get(), gg.data(), c.bank ? nullptr : gc.data(), gs.data(),
                               c.bank ? nullptr : gq.data(), c.need_support ? gsupport.get() : nullptr,
                               c.need_query ? gquery.get() : nullptr},
                              grad, 0, c.T);
    Named all;
    gram.keep(all, "gram");
    again.keep(all, "gram without a trace");
    cross.keep(all, "cross");
    of_support.keep(all, "support outputs");
    of_query.keep(all, "query outputs");
    if (c.need_support) gsupport.keep(all, "support");
    if (c.need_query) gquery.keep(all, "query");
    DescentEpisode::keep_parameters(all, grad.parameters, net);
    trace.keep(all, "trace");
    return all;
  }

  std::string text() const { return "ntk, " + sizes(); }
};

std::vector<NetworkCase> network_cases() {
  return {
      {2, 5, 7, {9, 6, 17, 3}, true, 0.0, 4, false, true, true, false},
      {2, 3, 4, {6, 5, 4}, false, 0.125, 18, true, true, false, true},
      {1, 4, 17, {33, 4, 2}, true, 0.25, 3, true, false, true, false},
      {1, 2, 1, {1, 1}, true, 0.0, 2, false, true, true, false},
      {1, 6, 0, {5, 4, 3, 4, 2}, true, 0.0, 1, true, true, true, false},
  };
}

// The descent wants query rows.
template <class Check>
void for_each_network(Check check) {
  for (const NetworkCase& c : network_cases()) {
    if (c.Q > 0) check(DescentEpisode(c));
    check(NtkEpisode(c));
  }
}

}  // namespace
}  // namespace kernelmeta
