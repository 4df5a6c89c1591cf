// StackedLinear: y = W x for W = base + sum over blocks of  sign * (U V), the blocks of a BitStack (Wang et al. 2024),
// decoded straight from packed signs and factors. How many blocks there are may change from one run to the next.
//
// The payload of a block, 64-byte aligned (runtime/bitstack/layout.py has the same in numpy):
//   V      fp16 [rank][padded()], padded to 64 bytes
//   U      fp16 [rank][panels() * 16], padded to 64 bytes
//   signs  [panels()][blocks()] of two vectors of 64 bytes: bit b of byte 4r + i of vector h is 1 where the weight of
//          output r and input 32h + 4b + i is positive (the third bit of linear.h's 3 bits lies so too)
// Padding has factors of 0. The base, where there is one, is a matrix as linear.h has it. Where the format is rotated,
// all of it is in the rotated domain, and activations are rotated first, as in linear.h.
//
// Few rows (StackFormat::few) are multiplied from the signs as they are. The base comes first, as linear.h says; then,
// block by block and rank by rank, z = V * x is quantised over its whole row (scale * a, a in -127..127, as linear.h
// says), and
//   y = fma(float(2 * (sum of a where the sign is positive) - (sum of a)), scale * u, y).
// Many rows first rebuild a panel as 8-bit weights:
//   size = u_0 * v_0, then fma(u_r, v_r, size);
//   w = the base as a float, then, block by block, w = w + (sign ? size : -size);
// quantised to nearest even with a scale for each span of kStackSpan inputs, amax / 127 (0 below 1e-30, NaN where a
// weight is not finite), code = w * (127 / amax); then the product is that of linear.h over 8 bits. Every path gives
// the same bits.
#pragma once
#include <cstdint>

#include "linear.h"

namespace shoal {

constexpr int64_t kStackSpan = 256;  // inputs of a scale of a rebuilt panel; where a row is shorter, all of it
constexpr int kStackFew = 16;        // rows from which panels are rebuilt in any case
constexpr int kStackRanks = 16;
constexpr int kStackLevels = 32;

struct StackFormat {
  int64_t inputs, outputs;
  int rank;
  bool rotated;

  int64_t blocks() const { return (inputs + kBlock - 1) / kBlock; }
  int64_t padded() const { return blocks() * kBlock; }
  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t u_at() const { return (2 * rank * padded() + 63) / 64 * 64; }
  int64_t signs_at() const { return u_at() + (2 * rank * panels() * kPanel + 63) / 64 * 64; }
  int64_t panel_bytes() const { return blocks() * (kBlock * kPanel / 8); }
  int64_t bytes() const { return signs_at() + panels() * panel_bytes(); }  // of a payload
  LinearFormat rebuilt() const {  // 8 bits
    const int64_t span = padded() < kStackSpan ? padded() : kStackSpan;
    return {inputs, outputs, 8, span, span, rotated};
  }
  bool valid() const;
  // Whether so few rows take the signs as they are: each rank of each row costs a tenth of what rebuilding does, whose
  // costs grow with the rank too.
  bool few(int64_t rows) const { return (rows - 2) * rank < kStackFew - 2; }
};

// Blocks of one matrix, as many as are there now; `base` is null where there is none.
struct StackWeights {
  const LinearFormat* base_format;
  const uint8_t* base;
  const uint8_t* const* blocks;  // payloads
  int count;
};

}  // namespace shoal

// The stack of a model, which its graph names by a handle: for each matrix the payloads that are there. Who registers
// keeps the memory, and calls `set` and `release` only between runs.
extern "C" int64_t shoal_stack_register(int64_t matrices);  // a new handle, no blocks in it; -1: too many
// What there is of a matrix from now on: its blocks, and its base in a format of linear.h (null: none), in the matrix's
// own shape. 0: no such matrix, or more than kStackLevels.
extern "C" int shoal_stack_set(int64_t handle, int64_t matrix, const void* const* payloads, const int64_t* bytes,
                               int count, const void* base, int64_t base_bytes, int bits, int64_t group, int64_t span);
extern "C" int shoal_stack_release(int64_t handle);
