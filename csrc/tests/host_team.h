// A team of real host threads for csrc/cuda/block.h: what a CUDA thread block is made of, with real barriers,
// so that ThreadSanitizer sees what no barrier orders. One thread a lane: barriers of a warp are real too.
#pragma once

#include <pthread.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/block.h"

namespace kernelmeta {

// Whoever waits sleeps: std::barrier spins and yields, for long where there are fewer cores than threads.
// Two, met in turn: ThreadSanitizer takes a thread that leaves a barrier late for one that has seen all that
// arrived there until then, also what arrived for the next round. With the barrier between the two missing,
// that would hide the race.
class TeamBarrier {
 public:
  explicit TeamBarrier(unsigned threads) {
    for (pthread_barrier_t& barrier : barriers_) pthread_barrier_init(&barrier, nullptr, threads);
  }
  ~TeamBarrier() {
    for (pthread_barrier_t& barrier : barriers_) pthread_barrier_destroy(&barrier);
  }
  TeamBarrier(const TeamBarrier&) = delete;
  // round: how often the calling thread has been here.
  void arrive_and_wait(int64_t& round) { pthread_barrier_wait(&barriers_[round++ % 2]); }

 private:
  pthread_barrier_t barriers_[2];
};

// What the threads of a team share.
struct HostTeamState {
  static constexpr int kThreads = 12, kLanes = 4;

  TeamBarrier all{kThreads};
  std::vector<std::unique_ptr<TeamBarrier>> warps;
  double exchanged[kThreads];
  bool found[kThreads];
  void* stage = nullptr;
  // Barriers of the whole team, counted as thread 0 meets them. The one with the number `removed` is not
  // there.
  int64_t removed = -1;
  std::vector<SourceLine> barriers;

  HostTeamState() {
    for (int w = 0; w < kThreads / kLanes; ++w) warps.push_back(std::make_unique<TeamBarrier>(kLanes));
  }
};

class HostTeam {
 public:
  static constexpr int kThreads = HostTeamState::kThreads, kLanes = HostTeamState::kLanes;

  static int thread() { return thread_; }
  static void sync(SourceLine line) {
    if (thread_ == 0) state_->barriers.push_back(line);
    if (met_++ != state_->removed) wait_for_all();
  }
  // One barrier on a GPU, and never without it.
  static bool any(bool value) {
    state_->found[thread_] = value;
    wait_for_all();
    bool found = false;
    for (const bool f : state_->found) found = found || f;
    wait_for_all();
    return found;
  }
  static void sync_warp() { state_->warps[size_t(thread_ / kLanes)]->arrive_and_wait(warp_round_); }
  template <class C>
  static C add_lanes(C value) {
    return join_lanes(value, [](C a, C b) { return a + b; });
  }
  template <class C, int n>
  static void add_lanes(C (&values)[n]) {
    for (C& value : values) value = add_lanes(value);
  }
  template <class C>
  static C max_lanes(C value) {
    return join_lanes(value, [](C a, C b) { return a < b ? b : a; });
  }
  template <class C>
  static C swap_lanes(C value, int bit) {
    state_->exchanged[thread_] = double(value);
    sync_warp();
    const C other = C(state_->exchanged[thread_ ^ bit]);
    sync_warp();
    return other;
  }
  template <class C>
  static void copy_pack(const C* from, C* to) {
    *reinterpret_cast<Pack<C>*>(to) = *reinterpret_cast<const Pack<C>*>(from);
  }
  static void end_copies() {}
  static void await_copies() {}
  // What team.h has the tensor cores for. The lanes share out the sums; operands stay where they lie.
  template <class F>
  struct Operand {
    const F* data = nullptr;
    int stride = 0;

    Operand() = default;
    Operand(const F* data, int stride) : data(data), stride(stride) {}
  };
  template <class F>
  using Left = Operand<F>;
  template <class F>
  using Right = Operand<F>;
  struct Sums {
    static constexpr int kValues = 16 * 8 / kLanes;
    float values[kValues] = {};

    template <class F>
    void add(const Operand<F>& a, const Operand<F>& b) {
      for (int e = 0; e < kValues; ++e) {
        const F *x = a.data + left(e) * a.stride, *y = b.data + right(e) * b.stride;
        for (int i = 0; i < 16; ++i) values[e] += float(x[i]) * float(y[i]);
      }
    }
    template <class Fn>
    void each(Fn f) const {
      for (int e = 0; e < kValues; ++e) f(left(e), right(e), values[e]);
    }

   private:
    static int left(int e) { return (e * kLanes + thread_ % kLanes) / 8; }
    static int right(int e) { return (e * kLanes + thread_ % kLanes) % 8; }
  };

  template <class C>
  static C* stage() {
    return static_cast<C*>(state_->stage);
  }

  // Lets the calling thread play thread `thread`.
  static void join(HostTeamState& state, int thread) {
    state_ = &state;
    thread_ = thread;
    met_ = team_round_ = warp_round_ = 0;
  }

 private:
  static void wait_for_all() { state_->all.arrive_and_wait(team_round_); }
  template <class C, class Fn>
  static C join_lanes(C value, Fn join) {
    for (int distance = 1; distance < kLanes; distance *= 2) {
      value = join(value, swap_lanes(value, distance));
    }
    return value;
  }

  inline static thread_local HostTeamState* state_ = nullptr;
  inline static thread_local int thread_ = 0;
  inline static thread_local int64_t met_ = 0, team_round_ = 0, warp_round_ = 0;
};

// body() on every thread of a team.
template <class Body>
void run_team(HostTeamState& state, Body body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < HostTeam::kThreads; ++i) {
    threads.emplace_back([&, i] {
      HostTeam::join(state, i);
      body();
    });
  }
  for (std::thread& t : threads) t.join();
}

}  // namespace kernelmeta
