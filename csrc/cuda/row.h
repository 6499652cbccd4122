// The words on a row of an array that a warp takes: its lanes take the row's entries in turn.
#pragma once

#include "cuda/packs.h"
#include "engine/arena.h"
#include "engine/several.h"

namespace kernelmeta {

// One entry of a row. kPadded: `inside` says whether it is an entry or padding, which is stored as zero.
template <class C>
struct At {
  int64_t at;
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

  int64_t length;
  int lane = Team::thread() % kLanes;  // the first entry of this thread

  // Its entry i is the row's entry first + i, and the same lane's.
  KERNELMETA_INLINE Row part(int64_t first, int64_t count) const {
    return {count, int((lane + kLanes - first % kLanes) % kLanes)};
  }
  KERNELMETA_INLINE auto at(int64_t i) const {
    if constexpr (kPadded)
      return PaddedAt<C>{{i}, i < length};
    else
      return At<C>{i};
  }
  template <class Fn>
  KERNELMETA_INLINE void each(Fn f) const {
    const int64_t end = kPadded ? padded(length) : length;
    for (int64_t i = lane; i < end; i += kLanes) f(at(i));
  }
  template <class Fn>
  KERNELMETA_INLINE auto sum(Fn f) const {
    decltype(f(at(0))) total = 0;
    const int64_t end = kPadded ? padded(length) : length;
    for (int64_t i = lane; i < end; i += kLanes) {
      const auto value = f(at(i));
      if (i < length) total += value;
    }
    return Team::add_lanes(total);
  }
  template <class Fn>
  KERNELMETA_INLINE C most(Fn f) const {
    C largest = -C(__builtin_inf());
    for (int64_t i = lane; i < length; i += kLanes) {
      const C value = f(at(i));
      if (largest < value) largest = value;
    }
    return Team::max_lanes(largest);
  }
  template <class... Fn>
  KERNELMETA_INLINE Several<C, sizeof...(Fn)> sums(Fn... f) const {
    Several<C, sizeof...(Fn)> total = {};
    for (int64_t i = lane; i < length; i += kLanes) {
      C* sum = total.of;
      ((*sum++ += f(at(i))), ...);
    }
    for (C& sum : total.of) sum = Team::add_lanes(sum);
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
