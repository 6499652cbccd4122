// A GPU played on the host: the lanes of a block are fibers, which change places at barriers, shuffles and
// products of a warp, in an order that is drawn. Blocks run one after the other, in an order that is drawn.
//
// The sources are compiled with -fsanitize=thread, and linked with memory.cpp in the place of the sanitizer's
// library: it is told of every load and store. Barriers order memory; shuffles, votes of a warp and products
// do not, as the PTX ISA has it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace lanes {

constexpr unsigned kWarp = 32;
constexpr int kMostThreads = 1024;
// What a kernel is taken to have of __shared__ variables, and what a block has at most beside them.
constexpr size_t kStaticShared = 2048, kMostShared = 232448 - kStaticShared;

struct Device {
  int shared_bytes = 232448;  // for a block
  int multiprocessors = 4;
};
inline Device device;

// What is done wrongly on purpose: tests must see it.
struct Sabotage {
  bool no_warp_barriers = false;   // they order nothing
  bool no_block_barriers = false;  // nor do these
  bool no_waits_for_copies = false;
  bool fragments = false;  // two registers of an operand change places
  size_t fewer_bytes = 0;  // of shared memory, than was asked for
};
inline Sabotage sabotage;

// ---- words of a lane

struct Place {
  const char* file;
  int line;
};
// What a lane gives to its warp.
struct alignas(16) Slot {
  unsigned char bytes[32];
};
enum class Operation : int { kNone, kBlockBarrier, kVote, kWarpBarrier, kShuffle, kMma };

unsigned thread_index();
unsigned block_index();
unsigned grid_size();
bool is_shared(const void* p);
bool is_global(const void* p);
void block_barrier(const Place& place);
bool vote(bool value);  // a barrier; whether any lane of the block says so
void warp_barrier(const Place& place);
// What each lane of the warp gave, until the next exchange but one.
const Slot* exchange(Operation operation, const void* own, size_t bytes);
void copy_async_16(const void* from, void* to);
void commit_copies();
void wait_for_all_copies_but(int groups);
extern const float *const of_bfloat16, *const of_float16;  // [65536]: what 16 bits stand for
void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float* of_bits);
// The bits that TF32 has not are cut off.
void mma_m16n8k8_tf32(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void fault(const char* what);

// ---- launching

// Where the caller's parameters are: what it calls with `bytes` of them has its own memory below.
void set_parameters(const void* frame, size_t bytes);
// body(of) on every lane of every block; false where no device could.
bool launch(unsigned blocks, unsigned threads, size_t shared, void (*body)(const void*), const void* of);
void seed(uint64_t of_order);

// ---- what was seen

// What is wrong, by kind, and how often; the first of each kind was printed in words. (Where in the program:
// addr2line -iCfe lane_test 0x...)
inline std::map<std::string, long> faults;

// Of all blocks of the last launch that was counted under a name.
struct Counts {
  long blocks;
  long block_barriers, votes;              // of each block
  long warp_barriers, shuffles, products;  // of each warp
  long copies;                             // asynchronous ones, of 16 bytes, of each lane
  long shared_bytes;                       // dynamic
  // Where `banks` is set: instructions of a warp, how often they ask shared memory for something, and how
  // often they would if no two words that they want lay in one bank.
  long shared_loads, shared_stores, wavefronts, least_wavefronts;
};
inline std::map<std::string, Counts> counts;
inline bool banks = false;
// Of an instruction of a warp on shared memory, by its place in the program: how often, and how often its
// lanes were in each other's way.
struct Conflicts {
  long times, wavefronts, least_wavefronts;
};
inline std::map<uint32_t, Conflicts> conflicts;
// What is launched next.
void count_as(const char* name);

// Barriers by where they stand: how often they were met, and whether two accesses were kept apart by one
// alone.
struct Barrier {
  bool of_block = false;  // or of a warp
  long met = 0;
  bool needed = false;
};
inline std::map<std::string, Barrier> barriers;

}  // namespace lanes
