// In the place of ThreadSanitizer's library; see memory.h. Compiled without -fsanitize=thread itself.
#include "lanes/memory.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <unordered_map>
#include <vector>

extern "C" char __executable_start, _end;

namespace kernelmeta {
// What `extern __shared__` names, and room to go beyond.
alignas(4096) unsigned char memory[lanes::kMostShared + 4096];
}  // namespace kernelmeta

namespace lanes {
namespace {

constexpr uint16_t kManyLanes = 0xffff;
constexpr uint8_t kManyWarps = 0xff;

// What is known of a word, or of a byte where words are not accessed whole.
struct Cell {
  uint32_t store_epoch, store_warp_epoch, load_epoch, load_warp_epoch;
  uint32_t earlier_epoch;      // the block's epoch of the loads before load_epoch
  uint32_t store_at, load_at;  // in the program
  uint16_t storer, loader;     // lanes
  uint8_t loader_warp, earlier_warp;
  bool pending;      // an asynchronous copy is on its way here
  bool many_blocks;  // of this launch: loaded by others before load_epoch too
};

constexpr size_t kPage = 4096, kWords = kPage / 4;

struct Page {
  Cell words[kWords];
  Cell* bytes;  // [kPage], of words that are split
  uint64_t split[kWords / 64];
  uint64_t valid[kPage / 64];  // bytes that belong to an array
};

// Two levels: 47 bits of an address.
constexpr int kLow = 18, kHigh = 17;
Page** tables[size_t(1) << kHigh];

Page* page_of(uintptr_t at, bool make) {
  const uintptr_t number = at / kPage;
  Page**& table = tables[number >> kLow & ((size_t(1) << kHigh) - 1)];
  if (!table) {
    if (!make) return nullptr;
    table = static_cast<Page**>(std::calloc(size_t(1) << kLow, sizeof(Page*)));
  }
  Page*& page = table[number & ((size_t(1) << kLow) - 1)];
  if (!page && make) page = static_cast<Page*>(std::calloc(1, sizeof(Page)));
  return page;
}

void set_valid(uintptr_t at, size_t bytes, bool valid) {
  while (bytes > 0) {
    Page* page = page_of(at, true);
    const size_t first = at % kPage, count = bytes < kPage - first ? bytes : kPage - first;
    for (size_t i = first; i < first + count;) {
      if (i % 64 == 0 && i + 64 <= first + count) {
        page->valid[i / 64] = valid ? ~uint64_t(0) : 0;
        i += 64;
      } else {
        const uint64_t bit = uint64_t(1) << i % 64;
        page->valid[i / 64] = valid ? page->valid[i / 64] | bit : page->valid[i / 64] & ~bit;
        ++i;
      }
    }
    at += count;
    bytes -= count;
  }
}

const uintptr_t image = reinterpret_cast<uintptr_t>(&__executable_start),
                image_end = reinterpret_cast<uintptr_t>(&_end),
                dynamic = reinterpret_cast<uintptr_t>(kernelmeta::memory),
                dynamic_end = dynamic + sizeof(kernelmeta::memory);
struct Range {
  uintptr_t at;
  size_t bytes;
};
std::vector<Range> static_stores;  // of this block, to __shared__ variables

void race(const char* what, uint32_t at, int other, uint32_t other_at, const void* address) {
  const int lane = now.lane;
  now.lane = -1;  // the C++ library's own code may be instrumented
  if (faults[what]++ == 0)
    std::printf("LANES: %s: lane %d at 0x%x, lane %d at 0x%x, address %p\n", what, lane, at,
                other == kManyLanes ? -1 : other, other_at, address);
  now.lane = lane;
}

bool same_warp(int a, int b) { return a / int(kWarp) == b / int(kWarp); }

void needed(Barrier* barrier) {
  if (barrier) barrier->needed = true;
}
Barrier* last_of_block() { return now.block_barriers[now.block_epoch - now.first_of_block]; }
Barrier* last_of_warp() { return now.warp_barriers[now.warp_epoch]; }

bool of_other_block(uint32_t epoch) { return epoch >= now.first_of_launch && epoch < now.first_of_block; }

// After what one lane did in these epochs; whether that is a race. Each block has its own shared memory.
template <bool kShared>
bool follows_badly(int lane, uint32_t epoch, uint32_t warp_epoch) {
  if (epoch < now.first_of_block) return !kShared && of_other_block(epoch);
  if (lane == now.lane) return false;
  if (same_warp(lane, now.lane)) {
    if (warp_epoch == now.warp_epoch) return true;
    if (warp_epoch + 1 == now.warp_epoch) needed(last_of_warp());
  } else {
    if (epoch == now.block_epoch) return true;
    if (epoch + 1 == now.block_epoch) needed(last_of_block());
  }
  return false;
}

template <bool kShared>
void on_load(Cell& cell, uint32_t at, const void* address) {
  const int warp = now.lane / int(kWarp);
  if (cell.pending) race("a load of what is still being copied", at, cell.storer, cell.store_at, address);
  if (follows_badly<kShared>(cell.storer, cell.store_epoch, cell.store_warp_epoch))
    race("a race: a load after a store", at, cell.storer, cell.store_at, address);
  if (cell.load_epoch == now.block_epoch) {
    if (cell.loader_warp != warp) {
      cell.loader_warp = kManyWarps;
    } else if (cell.load_warp_epoch != now.warp_epoch) {
      cell.load_warp_epoch = now.warp_epoch;
      cell.loader = uint16_t(now.lane);
    } else if (cell.loader != now.lane) {
      cell.loader = kManyLanes;
    }
  } else {
    if (cell.load_epoch < now.first_of_launch)
      cell.many_blocks = false;
    else if (cell.load_epoch < now.first_of_block)
      cell.many_blocks = true;
    cell.earlier_epoch = cell.load_epoch;
    cell.earlier_warp = cell.loader_warp;
    cell.load_epoch = now.block_epoch;
    cell.load_warp_epoch = now.warp_epoch;
    cell.loader = uint16_t(now.lane);
    cell.loader_warp = uint8_t(warp);
  }
  cell.load_at = at;
}

// Whether a store now would be a race with loads.
template <bool kShared>
bool follows_loads_badly(const Cell& cell) {
  const int warp = now.lane / int(kWarp);
  if (cell.load_epoch < now.first_of_block) return !kShared && of_other_block(cell.load_epoch);
  if (!kShared && cell.many_blocks) return true;
  if (cell.load_epoch == now.block_epoch) {
    if (cell.loader_warp != warp) return true;
    if (cell.earlier_epoch + 1 == now.block_epoch && cell.earlier_warp != warp) needed(last_of_block());
  } else if (cell.load_epoch + 1 == now.block_epoch && cell.loader_warp != warp) {
    needed(last_of_block());
  }
  if (cell.loader_warp != warp) return false;
  if (cell.loader == now.lane) return false;
  if (cell.load_warp_epoch == now.warp_epoch) return true;
  if (cell.load_warp_epoch + 1 == now.warp_epoch) needed(last_of_warp());
  return false;
}

template <bool kShared>
void on_store(Cell& cell, uint32_t at, const void* address) {
  if (cell.pending) race("a store into what is still being copied", at, cell.storer, cell.store_at, address);
  if (follows_badly<kShared>(cell.storer, cell.store_epoch, cell.store_warp_epoch))
    race("a race: two stores", at, cell.storer, cell.store_at, address);
  if (follows_loads_badly<kShared>(cell))
    race("a race: a store after a load", at, cell.loader, cell.load_at, address);
  cell.store_epoch = now.block_epoch;
  cell.store_warp_epoch = now.warp_epoch;
  cell.storer = uint16_t(now.lane);
  cell.store_at = at;
}

// f(cell, its address) for the cells of these bytes.
template <class Fn>
void each_cell(uintptr_t at, size_t bytes, Fn f) {
  const uintptr_t end = at + bytes;
  Page* page = page_of(at, true);
  while (at < end) {
    const size_t in_page = at % kPage, word = in_page / 4;
    if (in_page == 0) page = page_of(at, true);
    uint64_t& split = page->split[word / 64];
    const uint64_t bit = uint64_t(1) << word % 64;
    const bool whole = at % 4 == 0 && end - at >= 4;
    if (whole && !(split & bit)) {
      f(page->words[word], at);
      at += 4;
      continue;
    }
    if (!page->bytes) page->bytes = static_cast<Cell*>(std::calloc(kPage, sizeof(Cell)));
    if (!(split & bit)) {
      split |= bit;
      for (size_t b = 0; b < 4; ++b) page->bytes[word * 4 + b] = page->words[word];
    }
    f(page->bytes[in_page], at);
    ++at;
  }
}

bool all_valid(uintptr_t at, size_t bytes) {
  while (bytes > 0) {
    const Page* page = page_of(at, false);
    if (!page) return false;
    const size_t first = at % kPage, in_word = first % 64;
    size_t count = 64 - in_word < bytes ? 64 - in_word : bytes;
    const uint64_t mask = (count == 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1) << in_word;
    if ((page->valid[first / 64] & mask) != mask) return false;
    at += count;
    bytes -= count;
  }
  return true;
}

// What a warp asks shared memory for between two of its meetings, lane by lane.
struct Asked {
  uint32_t at;
  uint32_t address;
  uint8_t bytes;
  bool store;
};
std::vector<Asked> asked[kMostThreads];

template <bool kShared, bool kStore>
void note(uintptr_t place, size_t bytes, uint32_t at) {
  each_cell(place, bytes, [&](Cell& cell, uintptr_t of_cell) {
    const void* p = reinterpret_cast<const void*>(of_cell);
    if constexpr (kStore)
      on_store<kShared>(cell, at, p);
    else
      on_load<kShared>(cell, at, p);
  });
}

template <bool kStore>
void access(const void* address, size_t bytes, uint32_t at) {
  if (now.lane < 0) return;
  const auto place = reinterpret_cast<uintptr_t>(address);
  if (place >= now.stack && place + bytes <= now.stack_end) return;
  if (place >= now.stacks && place < now.stacks_end) {
    // (parameters lie in the same place for all lanes)
    const uintptr_t of_lane = now.parameters + (place - now.stacks) / now.stack_bytes * now.stack_bytes;
    if (kStore || place < of_lane) race("memory of another lane", at, now.lane, at, address);
    return;
  }
  if (place >= now.host_stack && place < now.host_stack_end) return;
  const bool of_image = place >= image && place < image_end,
             of_dynamic = place >= dynamic && place < dynamic_end;
  if (of_image && !of_dynamic && !kStore) {
    const Page* page = page_of(place, false);
    if (!page || (page->words[place % kPage / 4].store_epoch == 0 &&
                  !(page->split[place % kPage / 256] >> (place % kPage / 4 % 64) & 1)))
      return;  // a constant
  }
  if ((!of_image || of_dynamic) && !all_valid(place, bytes)) {
    race(of_dynamic ? "beyond the block's shared memory" : "outside of any array", at, now.lane, at, address);
    return;
  }
  if (of_image && !of_dynamic && kStore) static_stores.push_back({place, bytes});
  if (banks && of_image)
    asked[now.lane].push_back({at, uint32_t(place - image), uint8_t(bytes < 16 ? bytes : 16), kStore});
  if (of_image)
    note<true, kStore>(place, bytes, at);
  else
    note<false, kStore>(place, bytes, at);
}

void expect_aligned(const void* address, size_t bytes, uint32_t at) {
  // (of 16 bytes, the compiler says as much of two words of 8)
  if (now.lane >= 0 && reinterpret_cast<uintptr_t>(address) % (bytes < 8 ? bytes : 8))
    race("an address that is no multiple of what is read or written", at, now.lane, at, address);
}

}  // namespace

unsigned char* shared_memory() { return kernelmeta::memory; }
bool is_shared(const void* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  return at >= image && at < image_end;
}
bool is_global(const void* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  return !is_shared(p) && !(at >= now.stacks && at < now.stacks_end);
}

void begin_block(size_t shared_bytes) {
  set_valid(dynamic, sizeof(kernelmeta::memory), false);
  set_valid(dynamic, shared_bytes - sabotage.fewer_bytes, true);
  std::memset(kernelmeta::memory, 0xff, sizeof(kernelmeta::memory));  // NaN, whatever the type
  for (const Range& range : static_stores) std::memset(reinterpret_cast<void*>(range.at), 0xff, range.bytes);
  static_stores.clear();
}

void load(const void* from, size_t bytes) { access<false>(from, bytes, 0); }
void store(void* to, size_t bytes) { access<true>(to, bytes, 0); }
void set_pending(const void* at, size_t bytes, bool pending) {
  each_cell(reinterpret_cast<uintptr_t>(at), bytes, [&](Cell& cell, uintptr_t) { cell.pending = pending; });
}

void count_banks(int warp) {
  if (!banks) return;
  // The k-th time that a lane comes to a place in the program belongs with the other lanes' k-th.
  struct Instruction {
    int lanes = 0;
    uint8_t of[kWarp];
    uint32_t addresses[kWarp];
    uint8_t bytes;
    bool store;
  };
  std::unordered_map<uint64_t, Instruction> instructions;
  std::unordered_map<uint32_t, uint32_t> times;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    auto& of_lane = asked[unsigned(warp) * kWarp + lane];
    times.clear();
    for (const Asked& a : of_lane) {
      Instruction& one = instructions[uint64_t(a.at) << 32 | times[a.at]++];
      one.of[one.lanes] = uint8_t(lane);
      one.addresses[one.lanes++] = a.address;
      one.bytes = a.bytes;
      one.store = a.store;
    }
    of_lane.clear();
  }
  for (const auto& [place, one] : instructions) {
    ++(one.store ? counted->shared_stores : counted->shared_loads);
    long wavefronts = 0, least = 0;
    const unsigned together = one.bytes <= 4 ? 32 : one.bytes == 8 ? 16 : 8;  // lanes of one request
    for (unsigned first = 0; first < kWarp; first += together) {
      std::vector<uint32_t> words[32];
      size_t most = 0;
      for (int i = 0; i < one.lanes; ++i) {
        if (one.of[i] < first || one.of[i] >= first + together) continue;
        for (uint32_t word = one.addresses[i] / 4; word <= (one.addresses[i] + one.bytes - 1) / 4; ++word) {
          auto& of_bank = words[word % 32];
          bool known = false;
          for (const uint32_t w : of_bank) known = known || w == word;
          if (!known) of_bank.push_back(word);
          if (of_bank.size() > most) most = of_bank.size();
        }
      }
      wavefronts += long(most);
      least += most > 0;
    }
    counted->wavefronts += wavefronts;
    counted->least_wavefronts += least;
    Conflicts& here = conflicts[uint32_t(place >> 32)];
    ++here.times;
    here.wavefronts += wavefronts;
    here.least_wavefronts += least;
  }
}

}  // namespace lanes

// ---- what instrumented code calls

namespace {
uint32_t caller(void* from) { return uint32_t(static_cast<char*>(from) - &__executable_start); }
}  // namespace

#define LANES_CALLER caller(__builtin_return_address(0))
#define LANES_ACCESSES(bytes)                                                                  \
  void __tsan_read##bytes(void* p) {                                                           \
    lanes::expect_aligned(p, bytes, LANES_CALLER);                                             \
    lanes::access<false>(p, bytes, LANES_CALLER);                                              \
  }                                                                                            \
  void __tsan_write##bytes(void* p) {                                                          \
    lanes::expect_aligned(p, bytes, LANES_CALLER);                                             \
    lanes::access<true>(p, bytes, LANES_CALLER);                                               \
  }                                                                                            \
  void __tsan_unaligned_read##bytes(void* p) { lanes::access<false>(p, bytes, LANES_CALLER); } \
  void __tsan_unaligned_write##bytes(void* p) { lanes::access<true>(p, bytes, LANES_CALLER); }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
LANES_ACCESSES(1)
LANES_ACCESSES(2)
LANES_ACCESSES(4)
LANES_ACCESSES(8)
LANES_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { lanes::access<false>(p, bytes, LANES_CALLER); }
void __tsan_write_range(void* p, size_t bytes) { lanes::access<true>(p, bytes, LANES_CALLER); }
}

// Arrays are what somebody asked memory for, to the byte: what was asked stands before it.
namespace {
constexpr size_t kBefore = 16;
// (out of the compiler's sight, which knows `new` and has an opinion on what lies before)
[[gnu::noipa]] void release(unsigned char* p) {
  size_t bytes;
  std::memcpy(&bytes, p - kBefore, sizeof(bytes));
  lanes::set_valid(reinterpret_cast<uintptr_t>(p), bytes, false);
  std::free(p - kBefore);
}
}  // namespace

void* operator new(size_t bytes) {
  auto* const memory = static_cast<unsigned char*>(std::malloc(bytes + kBefore));
  if (!memory) throw std::bad_alloc();
  std::memcpy(memory, &bytes, sizeof(bytes));
  lanes::set_valid(reinterpret_cast<uintptr_t>(memory + kBefore), bytes, true);
  return memory + kBefore;
}
void operator delete(void* p) noexcept {
  if (p) release(static_cast<unsigned char*>(p));
}
void operator delete(void* p, size_t) noexcept { operator delete(p); }
