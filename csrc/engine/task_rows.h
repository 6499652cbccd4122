// Rows of tasks that may differ in number.
#pragma once

#include "engine/problem.h"

namespace kernelmeta {

KERNELMETA_INLINE int64_t storage_bytes(Storage storage) {
  return storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
}

// Task t owns rows first(t) .. first(t + 1) of those counted through all tasks. Such a row lies in
// `features`, which is [T][rows][D] where all tasks have as many (and `even` says so), else [all rows][D].
// Where nobody has looked at the offsets yet, `most` says how many rows a task may have.
struct TaskRows {
  Features features;
  const int64_t* offsets;  // [T + 1], or null: all tasks have features.rows
  bool even;
  int64_t all = 0;    // rows, of all tasks
  int64_t most = -1;  // -1: the offsets are right

  KERNELMETA_INLINE int64_t first(int64_t t) const { return offsets ? offsets[t] : t * features.rows; }
  KERNELMETA_INLINE int64_t count(int64_t t) const {
    return offsets ? offsets[t + 1] - offsets[t] : features.rows;
  }
  // The features of task t as those of the only task.
  KERNELMETA_INLINE Features of(int64_t t) const {
    Features f = features;
    f.rows = count(t);
    if (f.index)
      f.index += first(t);
    else
      f.data = static_cast<const char*>(f.data) +
               (even ? t * f.task : first(t) * f.row) * storage_bytes(f.storage);
    return f;
  }
};

// The support rows' classes, as ClassTable has them, of tasks that may differ.
struct TaskClasses {
  ClassTable table;     // labels and members: of all support rows; offsets: [T][N + 1]
  const int64_t* ways;  // [T], or null: N

  KERNELMETA_INLINE int64_t count(int64_t t, int64_t N) const { return ways ? ways[t] : N; }
};

// The support rows of one task, sorted by class, in memory of the task where they come as labels.
template <class B>
struct TaskMembers {
  using C = typename B::Scalar;
  const bool sorted;      // already, by who called
  const int64_t* labels;  // of the task; null, too, where no task has a row
  ClassMembers members;

  KERNELMETA_INLINE TaskMembers(Arena<C>& arena, const TaskClasses& classes, int64_t t, int64_t first,
                                int64_t S, int64_t N, int64_t most_ways)
      : sorted(classes.table.offsets != nullptr),
        labels(classes.table.labels ? classes.table.labels + first : nullptr),
        members{sorted ? classes.table.members + first : reinterpret_cast<const int32_t*>(arena.take(S)),
                sorted ? classes.table.offsets + t * (most_ways + 1)
                       : reinterpret_cast<const int32_t*>(arena.take(N + 1))} {}

  // Without a barrier at the end.
  KERNELMETA_INLINE void sort(B& block, int64_t S, int64_t N) const {
    if (!sorted) {
      sort_by_class(block, labels, S, N, const_cast<int32_t*>(members.members),
                    const_cast<int32_t*>(members.offsets));
    }
  }
};

// y [N][padded(S)], zeros -> the labels, one-hot; sizes [N], or null: rows of each class. Without a barrier
// at the end.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void one_hot(B& block, const ClassMembers& classes, int64_t S, int64_t N, C* y, C* sizes) {
  const int64_t ld = padded(S);
  block.unfenced().each_item(N, [&](int64_t n) {
    if (sizes) sizes[n] = C(classes.count(n));
    for (int32_t j = classes.offsets[n]; j < classes.offsets[n + 1]; ++j) y[n * ld + classes.members[j]] = 1;
  });
}

// to [count][ways] = from [N][ld] transposed; zeros beyond N.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void rows_out(B& block, const C* from, int64_t ld, int64_t N, int64_t count, int64_t ways,
                                C* to) {
  block.unfenced().each_item(count, [&](int64_t i) {
    for (int64_t n = 0; n < ways; ++n) to[i * ways + n] = n < N ? from[n * ld + i] : C(0);
  });
}

}  // namespace kernelmeta
