// What a BitStack's product is made of, one table of functions for each instruction set. The payloads and what must be
// computed, to the bit, are in stack.h. All pointers but `x`, `z` and `y` are 64-byte aligned, and every row of codes.
#pragma once
#include "linear.h"
#include "stack.h"

namespace shoal {

// What multiplies a block's signs: for every row of activations and every rank of the block, row * rank + r, the
// quantised z = V[r] * x.
struct StackRows {
  int64_t rows;          // at least 1, few
  const int8_t* codes;   // [rows * rank][padded()], padding 0
  const float* scales;   // [rows * rank]
  const int32_t* totals; // [rows * rank]: of the codes
  const uint8_t* tables = nullptr;  // [rows * rank][padded() * StackPath::table]: of the codes, by StackPath::tabulate
};

struct StackPath {
  const char* name;

  // z[k] = v[k] * x[k] for `count` values; v is fp16, exactly widened.
  void (*weigh)(const uint16_t* v, const float* x, int64_t count, float* z);

  // Adds a block to the sums of the panels panel .. panel + panels: with s = the sum of the codes where the sign of
  // output n is positive,
  //   y[row * ld + p * 16 + n] = fma(float(2 * s - total), scale * u[r][n], y)    rank by rank, p counted from `panel`
  // for all 16 outputs of a panel (those beyond the last have u = 0).
  void (*add)(const StackFormat&, const uint8_t* payload, int64_t panel, int64_t panels, const StackRows&, float* y,
              int64_t ld);

  // The weights of one panel, base and blocks, as a panel of rebuilt(): its zeros are 0, weights of padded inputs count
  // as 0 (whatever the base has there), and a span that is not finite has scale NaN and codes 0. `room` is padded() *
  // 16 bytes, for the base as this instruction set's own LinearPath::expand leaves it.
  void (*rebuild)(const StackFormat&, const StackWeights&, int64_t panel, int8_t* room, uint8_t* to);

  // Where `add` looks sums of codes up: bytes of tables for each code (0: there are none), and what fills them for a
  // row.
  int64_t table = 0;
  void (*tabulate)(const int8_t* codes, int64_t padded, uint8_t* to) = nullptr;
};

// y = W x; `call.weights` is not used. False where memory ran out.
bool stack_linear(const LinearPath&, const StackPath&, const StackFormat&, const StackWeights&, const LinearCall&,
                  const Parallel&);

// Rows `ids` of the matrix, in floats and rotated back: y float [count][inputs], times `factor`. Ids are in range.
void stack_rows(const StackFormat&, const StackWeights&, const int64_t* ids, int64_t count, float factor, float* y);

const StackPath& stack_scalar();
const StackPath* stack_avx2();     // null where it was not compiled in; whether the processor has it: isa.h
const StackPath* stack_avx512();   // amx has it too
const StackPath* stack_neon();     // i8mm has it too

}  // namespace shoal
