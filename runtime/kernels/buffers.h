// Buffers of weights, and stacks of blocks, that a graph names by a handle, so that what they hold may change from one
// run to the next.
#pragma once
#include <cstdint>

#include "stack.h"

namespace shoal {

struct Buffer {
  const uint8_t* data;
  int64_t bytes;
};

// {null, 0} for a handle that is not, or no longer, registered.
Buffer buffer_of(int64_t handle);

// What a stack has of one matrix: `count` payloads and their bytes, and the base, null where there is none.
struct Payloads {
  const uint8_t* blocks[kStackLevels];
  int64_t bytes[kStackLevels];
  int count;
  Buffer base;
  int bits;
  int64_t group, span;  // of the base
};

// False for a handle that is not, or no longer, registered, and for a matrix that is not in it.
bool stack_of(int64_t handle, int64_t matrix, Payloads* found);

}  // namespace shoal

// A new handle; -1 where there are too many. Who registers keeps the memory until the handle is set anew or released,
// and does either only between runs.
extern "C" int64_t shoal_buffer_register(const void* data, int64_t bytes);
extern "C" int shoal_buffer_set(int64_t handle, const void* data, int64_t bytes);  // 0 where there is no such handle
extern "C" int shoal_buffer_release(int64_t handle);
