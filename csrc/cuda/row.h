// The words on a row of an array that a warp takes: its lanes take the row's entries in turn. Places within a
// row are 32 bits wide, and loops over them are not unrolled: a kernel's instructions have to fit the
// instruction cache, and what hides the latency of one warp is the others.
#pragma once

#include "cuda/packs.h"
#include "engine/arena.h"
#include "engine/several.h"

namespace kernelmeta {

// One entry of a row. kPadded: `inside` says whether it is an entry or padding, which is stored as zero.
template <class C>
struct At {
  int at;
  KERNELMETA_INLINE C zero() const { return C(0); }
  KERNELMETA_INLINE C is(int64_t y, C a, C b) const { return at == y ? a : b; }
  KERNELMETA_INLINE C before(int64_t y, C a, C b) const { return at < y ? a : b; }
  template <class X>
  KERNELMETA_INLINE C load(const X* p) const {
    return widened<X, C>(p[at]);
  }
  KERNELMETA_INLINE void store(C* p, C v) const { p[at] = v; }
};
template <class C>
struct PaddedAt : At<C> {
  bool inside;
  KERNELMETA_INLINE void store(C* p, C v) const { p[this->at] = inside ? v : C(0); }
};

template <class Team, class C, bool kPadded>
struct Row {
  static constexpr int kLanes = Team::kLanes;

  int length;
  int lane = Team::thread() % kLanes;  // the first entry of this thread

  KERNELMETA_INLINE explicit Row(int64_t length) : length(int(length)) {}
  KERNELMETA_INLINE Row(int64_t length, int lane) : length(int(length)), lane(lane) {}

  // Its entry i is the row's entry first + i, and the same lane's.
  KERNELMETA_INLINE Row part(int64_t first, int64_t count) const {
    return {count, (lane + kLanes - int(first) % kLanes) % kLanes};
  }
  KERNELMETA_INLINE int end() const { return kPadded ? int(padded(int64_t(length))) : length; }
  KERNELMETA_INLINE auto at(int i) const {
    if constexpr (kPadded)
      return PaddedAt<C>{{i}, i < length};
    else
      return At<C>{i};
  }
  template <class Fn>
  KERNELMETA_INLINE void each(Fn f) const {
    const int last = end();
    if constexpr (kPadded) {
      KERNELMETA_ROLLED
      for (int i = lane; i < last; i += kLanes) f(at(i));
    } else {
#pragma unroll 4
      for (int i = lane; i < last; i += kLanes) f(at(i));
    }
  }
  // What this lane adds to the sum. Long rows, of features, are added up in four chains: their loads overlap,
  // and less is rounded.
  template <class Fn>
  KERNELMETA_INLINE auto lane_sum(Fn f) const {
    using V = decltype(f(at(0)));
    V total = 0;
    int i = lane;
    if constexpr (kPadded) {
      const int last = end();
      KERNELMETA_ROLLED
      for (; i < last; i += kLanes) {
        const V value = f(at(i));
        if (i < length) total += value;
      }
    } else {
      constexpr int kChains = 4;
      V chains[kChains] = {};
      KERNELMETA_ROLLED
      for (; i + (2 * kChains - 1) * kLanes < length; i += 2 * kChains * kLanes) {
#pragma unroll
        for (int c = 0; c < 2 * kChains; ++c) chains[c % kChains] += f(at(i + c * kLanes));
      }
      if (i + (kChains - 1) * kLanes < length) {
#pragma unroll
        for (int c = 0; c < kChains; ++c) chains[c] += f(at(i + c * kLanes));
        i += kChains * kLanes;
      }
      KERNELMETA_ROLLED
      for (; i < length; i += kLanes) total += f(at(i));
      total += (chains[0] + chains[1]) + (chains[2] + chains[3]);
    }
    return total;
  }
  template <class Fn>
  KERNELMETA_INLINE auto sum(Fn f) const {
    return Team::add_lanes(lane_sum(f));
  }
  template <class Fn>
  KERNELMETA_INLINE C most(Fn f) const {
    C largest = -C(__builtin_inf());
    KERNELMETA_ROLLED
    for (int i = lane; i < length; i += kLanes) {
      const C value = f(at(i));
      if (largest < value) largest = value;
    }
    return Team::max_lanes(largest);
  }
  template <class... Fn>
  KERNELMETA_INLINE Several<C, sizeof...(Fn)> sums(Fn... f) const {
    constexpr int kChains = kPadded ? 1 : 4;
    C chains[kChains][sizeof...(Fn)] = {};
    const auto add = [&](C* chain, int i) { ((*chain++ += f(at(i))), ...); };
    int i = lane;
    KERNELMETA_ROLLED
    for (; i + (kChains - 1) * kLanes < length; i += kChains * kLanes) {
#pragma unroll
      for (int c = 0; c < kChains; ++c) add(chains[c], i + c * kLanes);
    }
    KERNELMETA_ROLLED
    for (; i < length; i += kLanes) add(chains[0], i);
    Several<C, sizeof...(Fn)> total = {};
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
#pragma unroll
      for (int k = 0; k < int(sizeof...(Fn)); ++k) total.of[k] += chains[c][k];
    }
    Team::add_lanes(total.of);
    return total;
  }
  template <class... Fn>
  KERNELMETA_INLINE Several<C, sizeof...(Fn)> mosts(Fn... f) const {
    return {most(f)...};
  }
  // to[j] = sum over i < n of f(i, j)
  template <class Fn>
  KERNELMETA_INLINE void column_sums(int64_t n, Fn f, C* to) const {
    each([&](auto j) {
      C sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += f(i, j);
      j.store(to, sum);
    });
  }
  template <class X>
  KERNELMETA_INLINE C entry(const X* p, int64_t i) const {
    return widened<X, C>(p[i]);
  }
  // What some lane stored before; it may be stored anew after it.
  KERNELMETA_INLINE C value(const C* p) const {
    Team::sync_warp();
    const C found = *p;
    Team::sync_warp();
    return found;
  }
  // What the other lanes read before and after it stays apart from what it writes.
  template <class Fn>
  KERNELMETA_INLINE void one(Fn f) const {
    Team::sync_warp();
    if (Team::thread() % kLanes == 0) f();
    Team::sync_warp();
  }
};

}  // namespace kernelmeta
