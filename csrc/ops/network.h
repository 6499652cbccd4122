// A perceptron as an op is called with it, and as kernels read it.
#pragma once

#include "engine/ntk.h"
#include "ops/tensors.h"

namespace kernelmeta {

struct NetworkOptions {
  Reader& in;
  std::vector<int64_t> widths = in.take<std::vector<int64_t>>("widths");
  bool biased = in.take<bool>("biased");
  double slope = in.take<double>("slope");
};

inline constexpr int64_t kWidest = int64_t(1) << 31;

// Its sizes, checked.
inline Perceptron perceptron(const NetworkOptions& options) {
  const int64_t layers = int64_t(options.widths.size()) - 1;
  require(layers >= 1 && layers <= kMostLayers, "widths: those of 1 to 8 layers");
  Perceptron net{};
  net.layers = int(layers);
  net.has_bias = options.biased;
  for (int64_t l = 0; l <= layers; ++l) {
    net.widths[l] = options.widths[size_t(l)];
    require(net.widths[l] >= 1 && net.widths[l] <= kWidest, "widths: from 1 to 2^31 each");
  }
  Elements count;
  for (int64_t l = 0; l < layers; ++l) count.add({net.widths[l] + 16, net.widths[l + 1] + 16});
  return net;
}

}  // namespace kernelmeta
