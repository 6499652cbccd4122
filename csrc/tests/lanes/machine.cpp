// Lanes as fibers; see machine.h. Compiled without -fsanitize=thread.
#include "lanes/machine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "lanes/memory.h"
#include "tests/narrow_float.h"

namespace lanes {
namespace {

constexpr size_t kStack = 64 << 10;

struct Copy {
  const void* from;
  void* to;
};

struct Fiber {
  jmp_buf at;
  bool made = false, done = true;
  Operation waits = Operation::kNone;
  size_t bytes = 0;                       // that it exchanges
  std::vector<std::vector<Copy>> copies;  // on their way: groups, the last one not committed
};

struct Warp {
  unsigned arrived = 0;
  int exchanges = 0;
  uint32_t epoch = 0;
  Slot slots[2][kWarp];
  std::vector<Barrier*> barriers;  // that began each of its epochs
};

Fiber fibers[kMostThreads];
Warp warps[kMostThreads / kWarp];
unsigned char* stacks = nullptr;
jmp_buf host;
ucontext_t of_host, started;
int current = -1, threads_now = 0;
int ready[kMostThreads], ready_count = 0;
int arrived = 0;
bool voted = false, vote_result = false;
unsigned block_now = 0, blocks_now = 0;
void (*body_now)(const void*) = nullptr;
const void* body_of = nullptr;
std::minstd_rand order(1);
std::vector<Barrier*> block_barriers_met;

[[noreturn]] void die(const char* what) {
  static const char* const names[] = {"nothing",   "a barrier", "a vote", "a barrier of the warp",
                                      "a shuffle", "a product"};
  std::printf("LANES: %s, in block %u\n", what, block_now);
  for (int i = 0; i < threads_now; ++i) {
    if (i == 0 || fibers[i].waits != fibers[i - 1].waits || fibers[i].done != fibers[i - 1].done)
      std::printf("  from lane %d on: %s %s\n", i, fibers[i].done ? "ended, after" : "waits for",
                  names[int(fibers[i].waits)]);
  }
  std::fflush(stdout);
  std::abort();
}

void become(int fiber) {
  current = fiber;
  now.lane = fiber;
  const auto stack = reinterpret_cast<uintptr_t>(stacks) + uintptr_t(fiber) * kStack;
  now.stack = stack;
  now.stack_end = stack + kStack;
  const Warp& warp = warps[fiber / int(kWarp)];
  now.warp_epoch = warp.epoch;
  now.warp_barriers = warp.barriers.data();
}

int next_ready() {
  const int pick = int(order() % unsigned(ready_count)), next = ready[pick];
  ready[pick] = ready[--ready_count];
  return next;
}

// The current lane waits until somebody wakes it.
void wait() {
  const int me = current;
  if (ready_count == 0) {
    now.lane = -1;
    if (!_setjmp(fibers[me].at)) _longjmp(host, 1);
    return;
  }
  const int next = next_ready();
  if (next != me && !_setjmp(fibers[me].at)) {
    become(next);
    _longjmp(fibers[next].at, 1);
  }
  // (woken: whoever did it said who goes on)
  if (next == me) become(me);
}

void complete(Fiber& fiber, size_t keep) {
  while (fiber.copies.size() > keep) {
    for (const Copy& copy : fiber.copies.front()) {
      set_pending(copy.to, 16, false);
      store(copy.to, 16);
      std::memcpy(copy.to, copy.from, 16);
    }
    fiber.copies.erase(fiber.copies.begin());
  }
}

// Below the kernel's parameters, which other lanes may go on to read.
[[gnu::noinline]] void wait_at_end() {
  unsigned char gap[kStack / 4];
  asm volatile("" : : "r"(gap) : "memory");
  wait();
  asm volatile("" : : "r"(gap) : "memory");
}

void live() {
  const int me = current;
  if (!_setjmp(fibers[me].at)) swapcontext(&started, &of_host);
  for (;;) {
    body_now(body_of);
    complete(fibers[me], 0);
    fibers[me].waits = Operation::kNone;
    fibers[me].done = true;
    wait_at_end();
  }
}

void make(int i) {
  if (fibers[i].made) return;
  fibers[i].made = true;
  current = i;
  auto* const context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stacks + size_t(i) * kStack;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, live, 0);
  swapcontext(&of_host, context);
}

void wake(int lane) { ready[ready_count++] = lane; }

// By the last lane of a warp, or of all warps, that meets: an epoch begins.
void begin_warp_epoch(int warp, Barrier* barrier) {
  ++warps[warp].epoch;
  warps[warp].barriers.push_back(barrier);
}

Barrier* barrier_at(const Place& place, bool of_block) {
  static std::map<std::pair<const char*, int>, Barrier*> known;
  Barrier*& barrier = known[{place.file, place.line}];
  if (!barrier) {
    const char* const file = std::strstr(place.file, "csrc/");
    barrier = &barriers[std::string(file ? file : place.file) + ":" + std::to_string(place.line)];
  }
  barrier->of_block = of_block;
  ++barrier->met;
  return barrier;
}

void meet_block(Operation operation, const Place* place) {
  now.lane = -1;  // until this lane goes on: the C++ library's own code may be instrumented
  Fiber& me = fibers[current];
  me.waits = operation;
  if (++arrived == threads_now) {
    arrived = 0;
    for (int i = 0; i < threads_now; ++i) {
      if (fibers[i].done || fibers[i].waits != operation) die("not all lanes meet at a barrier");
      wake(i);
    }
    vote_result = voted;
    voted = false;
    ++(place ? counted->block_barriers : counted->votes);
    Barrier* const barrier = place ? barrier_at(*place, true) : nullptr;
    for (int w = 0; w < threads_now / int(kWarp); ++w) count_banks(w);
    if (!place || !sabotage.no_block_barriers) {
      ++now.block_epoch;
      block_barriers_met.push_back(barrier);
      now.block_barriers = block_barriers_met.data();
      for (int w = 0; w < threads_now / int(kWarp); ++w) begin_warp_epoch(w, barrier);
    }
  }
  wait();
}

void meet_warp(Operation operation, size_t bytes, const Place* place) {
  now.lane = -1;  // until this lane goes on: the C++ library's own code may be instrumented
  Fiber& me = fibers[current];
  const int index = current / int(kWarp), first = index * int(kWarp);
  me.waits = operation;
  me.bytes = bytes;
  if (++warps[index].arrived == kWarp) {
    warps[index].arrived = 0;
    for (int i = first; i < first + int(kWarp); ++i) {
      if (fibers[i].waits != operation || fibers[i].bytes != bytes) die("the lanes of a warp do not meet");
      wake(i);
    }
    count_banks(index);
    if (operation == Operation::kWarpBarrier) {
      ++counted->warp_barriers;
      Barrier* const barrier = barrier_at(*place, false);
      if (!sabotage.no_warp_barriers) begin_warp_epoch(index, barrier);
    } else {
      ++(operation == Operation::kMma ? counted->products : counted->shuffles);
      ++warps[index].exchanges;
    }
  }
  wait();
}

void run_block(unsigned block) {
  block_now = block;
  ready_count = arrived = 0;
  voted = false;
  now.first_of_block = ++now.block_epoch;
  block_barriers_met.assign(1, nullptr);
  now.block_barriers = block_barriers_met.data();
  for (int w = 0; w < threads_now / int(kWarp); ++w) {
    warps[w].arrived = 0;
    warps[w].epoch = 0;
    warps[w].barriers.assign(1, nullptr);
  }
  for (int i = 0; i < threads_now; ++i) {
    make(i);
    fibers[i].done = false;
    fibers[i].waits = Operation::kNone;
    fibers[i].copies.assign(1, {});
    wake(i);
  }
  const int first = next_ready();
  if (!_setjmp(host)) {
    become(first);
    _longjmp(fibers[first].at, 1);
  }
  now.lane = current = -1;
  for (int i = 0; i < threads_now; ++i) {
    if (!fibers[i].done) die("lanes wait for ever");
  }
  for (int w = 0; w < threads_now / int(kWarp); ++w) count_banks(w);
}

std::vector<float> values_of(float (*decode)(uint16_t)) {
  std::vector<float> values;
  for (int bits = 0; bits < 0x10000; ++bits) values.push_back(decode(uint16_t(bits)));
  return values;
}
template <class F>
float decoded(uint16_t bits) {
  F x;
  x.bits = bits;
  return float(x);
}
const std::vector<float> bfloat16_values = values_of(decoded<kernelmeta::BrainFloat>),
                         float16_values = values_of(decoded<kernelmeta::Half>);

// The sum of these as tensor cores may take it: to the precision of the largest, cutting off, and what is too
// large to the largest number.
float cut_off_sum(const double* terms, int count) {
  double largest = 0, sum = 0;
  for (int i = 0; i < count; ++i) largest = std::fmax(largest, std::fabs(terms[i]));
  bool finite = true;
  for (int i = 0; i < count; ++i) finite = finite && std::isfinite(terms[i]);
  if (!finite) {
    for (int i = 0; i < count; ++i) sum += terms[i];
    return float(sum);
  }
  if (largest == 0) return 0;
  const int shift = 24 - std::ilogb(largest);
  for (int i = 0; i < count; ++i) sum += std::trunc(std::ldexp(terms[i], shift));
  const double exact = std::ldexp(sum, -shift);
  const float nearest = float(exact);
  return std::fabs(double(nearest)) > std::fabs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

}  // namespace

const float *const of_bfloat16 = bfloat16_values.data(), *const of_float16 = float16_values.data();

unsigned thread_index() { return current < 0 ? 0 : unsigned(current); }
unsigned block_index() { return block_now; }
unsigned grid_size() { return blocks_now; }

void fault(const char* what) {
  now.lane = -1;
  if (faults[what]++ == 0) std::printf("LANES: %s, by lane %d\n", what, current);
  now.lane = current;
}

void block_barrier(const Place& place) { meet_block(Operation::kBlockBarrier, &place); }
bool vote(bool value) {
  voted = voted || value;
  meet_block(Operation::kVote, nullptr);
  return vote_result;
}
void warp_barrier(const Place& place) { meet_warp(Operation::kWarpBarrier, 0, &place); }

const Slot* exchange(Operation operation, const void* own, size_t bytes) {
  Warp& warp = warps[current / int(kWarp)];
  Slot* const slots = warp.slots[warp.exchanges % 2];
  std::memcpy(slots[unsigned(current) % kWarp].bytes, own, bytes);
  meet_warp(operation, bytes, nullptr);
  return slots;
}

void copy_async_16(const void* from, void* to) {
  ++counted->copies;
  load(from, 16);
  store(to, 16);
  set_pending(to, 16, true);
  now.lane = -1;
  fibers[current].copies.back().push_back({from, to});
  now.lane = current;
}
void commit_copies() {
  now.lane = -1;
  fibers[current].copies.emplace_back();
  now.lane = current;
}
void wait_for_all_copies_but(int groups) {
  if (!sabotage.no_waits_for_copies) complete(fibers[current], size_t(groups) + 1);
}

namespace {

// "Matrix fragments for mma.m16n8k16 with floating point type" of the PTX ISA, and those for mma.m16n8k8 with
// .tf32, whose words lie in the same places. value(word, i): element i of the kPerWord of a word.
template <int kPerWord, class Value>
void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
  struct {
    uint32_t a[4], b[2];
  } own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  if (sabotage.fragments) std::swap(own.a[1], own.a[2]);
  const Slot* slots = exchange(Operation::kMma, &own, sizeof(own));
  const auto element = [&](int lane, int reg, int i) {
    uint32_t word;
    std::memcpy(&word, slots[lane].bytes + 4 * reg, 4);
    return double(value(word, i));
  };
  const int lane = current % int(kWarp);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    constexpr int kTerms = 8 * kPerWord;
    double terms[kTerms + 1];
    for (int k = 0; k < kTerms; ++k) {
      const int word = k / kPerWord, holder = word % 4;
      terms[k] = element(row % 8 * 4 + holder, row / 8 + word / 4 * 2, k % kPerWord) *
                 element(column * 4 + holder, 4 + word / 4, k % kPerWord);
    }
    terms[kTerms] = double(sums[i]);
    sums[i] = cut_off_sum(terms, kTerms + 1);
  }
}

}  // namespace

void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float* of_bits) {
  mma<2>(sums, a, b, [&](uint32_t pair, int half) { return of_bits[pair >> (16 * half) & 0xffff]; });
}
void mma_m16n8k8_tf32(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<1>(sums, a, b, [](uint32_t word, int) { return std::bit_cast<float>(word & ~0x1fffu); });
}

void set_parameters(const void* frame, size_t bytes) {
  constexpr uintptr_t kRegisters = 128;
  now.parameters = reinterpret_cast<uintptr_t>(frame) - uintptr_t(current) * kStack - bytes - kRegisters;
}

void count_as(const char* name) { counted = &counts[name]; }

void seed(uint64_t of_order) { order.seed(unsigned(of_order)); }

bool launch(unsigned blocks, unsigned threads, size_t shared, void (*body)(const void*), const void* of) {
  if (threads > unsigned(kMostThreads) || threads % kWarp || blocks == 0) return false;
  if (shared > kMostShared || shared + kStaticShared > size_t(device.shared_bytes)) return false;
  if (!stacks) {
    stacks = static_cast<unsigned char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    now.stacks = reinterpret_cast<uintptr_t>(stacks);
    now.stacks_end = now.stacks + kMostThreads * kStack;
    now.stack_bytes = kStack;
  }
  now.host_stack = reinterpret_cast<uintptr_t>(__builtin_frame_address(0)) - (16 << 10);
  now.host_stack_end = now.host_stack + (8 << 20);
  *counted = Counts{};
  counted->shared_bytes = long(shared);
  threads_now = int(threads);
  blocks_now = blocks;
  body_now = body;
  body_of = of;
  now.first_of_launch = now.block_epoch + 1;
  std::vector<unsigned> turns(blocks);
  std::iota(turns.begin(), turns.end(), 0u);
  for (unsigned i = blocks; i > 1; --i) std::swap(turns[i - 1], turns[order() % i]);
  for (const unsigned block : turns) {
    ++counted->blocks;
    begin_block(shared);
    run_block(block);
  }
  blocks_now = 0;
  return true;
}

}  // namespace lanes
