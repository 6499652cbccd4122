// Who may touch what, and when: between machine.cpp and memory.cpp.
//
// A block has epochs, one from each of its barriers to the next, and each warp has its own, which barriers of
// the warp part too. Two accesses of one address, a store among them, are a race unless one lane does both,
// or one warp in two of its epochs, or two warps in two epochs of the block. For every address the last store
// is known, and who loaded since: that finds the first race at each address, whatever order the lanes took.
#pragma once

#include "lanes/machine.h"

namespace lanes {

// Epochs of blocks are numbered through all launches, so that old marks say that they are old; those of warps
// begin anew with each block.
struct Now {
  int lane = -1;  // of the block; -1: none runs
  uint32_t block_epoch = 0, warp_epoch = 0, first_of_block = 0, first_of_launch = 0;
  // Of the barrier at whose end an epoch began: null for what is no barrier, or none that could be left out.
  Barrier* const* block_barriers = nullptr;  // from first_of_block on
  Barrier* const* warp_barriers = nullptr;
  uintptr_t stack = 0, stack_end = 0;    // of the lane
  uintptr_t stacks = 0, stacks_end = 0;  // of all lanes,
  uintptr_t stack_bytes = 0,
            parameters = 0;  // of each; where the kernel's parameters begin, in the first one
  uintptr_t host_stack = 0, host_stack_end = 0;  // of who launches
};
inline Now now;
inline Counts uncounted;
inline Counts* counted = &uncounted;

unsigned char* shared_memory();
void begin_block(size_t shared_bytes);
// The lane's own accesses between the instrumented ones.
void load(const void* from, size_t bytes);
void store(void* to, size_t bytes);
void set_pending(const void* at, size_t bytes, bool pending);
// The lanes of this warp have met: what they asked shared memory for until then are instructions of the warp.
void count_banks(int warp);

}  // namespace lanes
