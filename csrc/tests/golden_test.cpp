// The numbers of the published implementation (tests/vectors), forward and backward, through the CPU kernels:
// the test of a machine where no PyTorch runs. They are read from the file that golden_vectors.py writes.
#include "tests/engine_checks.h"

#include "cpu/dispatch.h"

#include <algorithm>
#include <fstream>
#include <map>

using namespace kernelmeta;

namespace {

using Arrays = std::map<std::string, Vec>;  // by name

std::map<std::string, Arrays> read(const char* path) {
  std::map<std::string, Arrays> files;
  std::ifstream from(path, std::ios::binary);
  std::string name;
  size_t count = 0;
  while (from >> name >> count) {
    from.get();  // the end of the line
    Vec values(count);
    from.read(reinterpret_cast<char*>(values.data()), std::streamsize(count * sizeof(double)));
    const size_t slash = name.find('/');
    files[name.substr(0, slash)][name.substr(slash + 1)] = values;
  }
  return files;
}

struct Golden {
  Episode episode;
  Arrays arrays;

  // An array of the file; what is wanted of a parameter that they call so.
  const Vec& operator[](const std::string& name) const { return arrays.at(name); }
};

// In the order of MlpArrays: names in the published state_dict.
constexpr const char* kMlp[] = {"layer1.0.weight", "layer1.0.bias", "layer1.2.weight", "layer1.2.bias",
                                "layer2.0.weight", "layer2.0.bias", "layer2.2.weight", "layer2.2.bias",
                                "layer3.weight",   "layer3.bias"};

Golden golden(const Arrays& of) {
  const auto size = [&](const char* name) { return int64_t(of.at(name).size()); };
  const int64_t N = int64_t(of.at("n_way")[0]), D = size("state.wnLayerFavg.weight");
  const int64_t H = size("state.dni.layer1.0.bias"), rows = size("support") / D;
  // One classifier a task: T of them in all.
  const int64_t T = size("weights") / (N * D), S = rows / T, Q = size("query") / (T * D);
  Golden g{Episode({T, S, Q, N, D, H, int64_t(of.at("steps")[0])}, true, of.at("training")[0] == 0,
                   of.at("inner_lr")[0]),
           of};
  Episode& e = g.episode;
  e.query = g["query"];
  e.start = g["support"];
  e.weight = g["state.wnLayerFavg.weight"];
  e.scale = g["state.scale_cls"];
  e.bias = g["state.bias"];
  Vec* parameters[] = {&e.weight1, &e.bias1, &e.gain1,  &e.shift1,  &e.weight2,
                       &e.bias2,   &e.gain2, &e.shift2, &e.weight3, &e.bias3};
  for (size_t i = 0; i < 10; ++i) *parameters[i] = g[std::string("state.dni.") + kMlp[i]];
  e.statistics.clear();
  for (const char* name :
       {"layer1.2.running_mean", "layer1.2.running_var", "layer2.2.running_mean", "layer2.2.running_var"}) {
    const Vec& values = g[std::string("state.dni.") + name];
    e.statistics.insert(e.statistics.end(), values.begin(), values.end());
  }
  e.members.clear();
  e.offsets.clear();
  for (int64_t t = 0; t < T; ++t) {
    int32_t offset = 0;
    for (int64_t n = 0; n < N; ++n) {
      e.offsets.push_back(offset);
      for (int64_t i = 0; i < S; ++i) {
        if (g["support_labels"][size_t(t * S + i)] == double(n)) e.members.push_back(int32_t(i)), ++offset;
      }
    }
    e.offsets.push_back(offset);
  }
  return g;
}

// The mean cross entropy of all query rows, and its gradient by the logits.
double cross_entropy(const Vec& logits, const Vec& answers, int64_t N, Vec& gradient) {
  const double rows = double(answers.size());
  double loss = 0;
  for (size_t q = 0; q < answers.size(); ++q) {
    const double* z = &logits[q * size_t(N)];
    const double highest = *std::max_element(z, z + N);
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) sum += std::exp(z[n] - highest);
    for (int64_t n = 0; n < N; ++n) {
      const bool right = double(n) == answers[q];
      gradient.push_back((std::exp(z[n] - highest) / sum - (right ? 1 : 0)) / rows);
      if (right) loss += (std::log(sum) + highest - z[n]) / rows;
    }
  }
  return loss;
}

template <class C>
void check(const std::string& name, const Golden& g, double tolerance) {
  const Sizes& s = g.episode.s;
  const Kernels<C>& kernels = kernel_table().of<C>();
  const Vec none(size_t(s.T * s.N * s.D), 0.0);
  // The logits first: the gradient of the loss by them is what the backward pass starts from.
  const auto first = run<C>(kernels, g.episode, false, Vec(size_t(s.T * s.Q * s.N), 0.0), none);
  Vec by_logits;
  const Vec logits(first.logits.begin(), first.logits.end());
  const double loss = cross_entropy(logits, g["query_labels"], s.N, by_logits);
  const auto found = run<C>(kernels, g.episode, false, by_logits, none);

  double worst = 0;
  const auto near = [&](const std::string& what, const auto& got, const Vec& want) {
    double size = 0;
    for (const double x : want) size = std::max(size, std::abs(x));
    const double error = got.size() == want.size() ? largest_error(got, want) / size : INFINITY;
    worst = std::max(worst, error);
    if (error <= tolerance) return;
    std::printf("FAILED %s %s: error %.2e\n", name.c_str(), what.c_str(), error);
    ++failures;
  };
  near("logits", found.logits, g["logits"]);
  near("theta", found.theta, g["weights"]);
  near("loss", Vec{loss}, g["loss"]);
  near("query", found.grad_query, g["grad_query"]);
  near("support", found.grad_start, g["grad_support"]);
  near("weight", found.weight, g["grad.wnLayerFavg.weight"]);
  near("scale", found.scale, g["grad.scale_cls"]);
  near("bias", found.bias, g["grad.bias"]);
  for (size_t i = 0; i < 10; ++i) near(kMlp[i], found.mlp[i], g[std::string("grad.dni.") + kMlp[i]]);
  std::printf("%s %s, %zu bytes a number: largest error %.1e of the largest number\n", kernel_table().isa,
              name.c_str(), sizeof(C), worst);
}

int check_files(const char* path) {
  int checked = 0;
  for (const auto& [name, arrays] : read(path)) {
    const Golden g = golden(arrays);
    if (g.episode.s.T > 1 && !g.episode.running) {
      std::printf("%s: left out, its tasks share statistics, which no kernel does\n", name.c_str());
      continue;
    }
    check<double>(name, g, 1e-12);  // measured: 2.4e-14 at most, and 2.8e-5
    check<float>(name, g, 3e-4);
    ++checked;
  }
  if (checked < 3) {
    std::printf("FAILED: expected vectors of three episodes or more, got %d\n", checked);
    return 1;
  }
  std::printf(failures ? "%d failed\n" : "all passed\n", failures);
  return failures != 0;
}

}  // namespace

int main(int count, char** arguments) { return count == 2 ? check_files(arguments[1]) : 2; }
