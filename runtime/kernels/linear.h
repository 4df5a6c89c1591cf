// QuantizedLinear: y = W x for weights of 2, 3, 4 or 8 bits, in one layout for one row of activations and for many.
//
// The format. Weight n, k is  scale[n, k / span] * multiplier * (step * code - zero)  with the multiplier and zero of
// its group of `group` inputs. Everything but the scale is an integer that fits int8, so a matrix unit takes a whole
// span at once (progressive quantisation; Lin et al. 2024, QServe). The step is 2 for 2 and 3 bits, whose zero may then
// lie between two codes, and 1 otherwise. With 8 bits there are no multipliers: the code is signed, group == span, and
// the weight is scale * (code - zero) with a signed zero.
//
// The layout. Outputs are in panels of 16, inputs in blocks of 64, both padded; a panel is contiguous:
//   scales   float [spans][16]
//   groups   uint8 [groups][16], multiplier | zero << 4 (8 bits: int8 zero); padded to 64 bytes
//   codes    [blocks] of 64 inputs x 16 outputs, each `block_bytes()`:
//     8 bits  16 vectors of 64 bytes: byte 4r + i of vector j is input 4j + i of output r
//     4 bits   8 vectors: low nibble of byte 4r + i of vector j is input 8j + i, high nibble input 8j + 4 + i
//     2 bits   4 vectors: bits 2t, 2t+1 of byte 4r + i of vector j are input 16j + 4t + i
//     3 bits   the 4 vectors of 2 bits, then 2 vectors of the third: bit b of byte 4r + i of vector h is input 32h + 4b + i
// Padding has scale 0 (outputs) or meets activations of 0 (inputs).
//
// A format may be rotated: then its weights are those of the matrix times a rotation of the inputs, and activations are
// rotated alike before they are quantised, which changes nothing but how evenly their range is used (Ashkboos et al.
// 2024, QuaRot). The rotation takes each block of 64 inputs by itself, with the 64-point Walsh-Hadamard matrix / 8; it
// needs inputs in whole blocks.
//
// Activations are quantised per row and span: x = scale * a with a in -127..127, rounded to nearest even.
//
// Every path gives the same bits: sums of a span are exact int32, and then
//   y = fma(float(sum), activation_scale * weight_scale, y)   span by span, in order.
#pragma once
#include <cstddef>
#include <cstdint>

#include "parallel.h"

namespace shoal {

constexpr int kPanel = 16;   // outputs of a panel
constexpr int kBlock = 64;   // inputs of a block
constexpr int kTile = 16;    // rows of activations that lie together
constexpr int kFew = 4;      // most rows of `dot`
constexpr int kRows = 32;    // most rows of `tile`
constexpr int kPair = 2;     // panels of `tile`

struct LinearFormat {
  int64_t inputs, outputs;
  int bits;          // 2, 3, 4, 8
  int64_t group;     // inputs of a group: a multiple of 32 that divides span, or span itself
  int64_t span;      // inputs of a scale: a multiple of 64, at most blocks() * 64
  bool rotated;

  int64_t blocks() const { return (inputs + kBlock - 1) / kBlock; }
  int64_t padded() const { return blocks() * kBlock; }
  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t spans() const { return (padded() + span - 1) / span; }
  int64_t groups() const { return (padded() + group - 1) / group; }
  int step() const { return bits < 4 ? 2 : 1; }
  int64_t block_bytes() const { return kBlock * kPanel * bits / 8; }
  int64_t groups_at() const { return spans() * kPanel * 4; }
  int64_t codes_at() const { return groups_at() + (groups() * kPanel + 63) / 64 * 64; }
  int64_t panel_bytes() const { return codes_at() + blocks() * block_bytes(); }
  int64_t bytes() const { return panels() * panel_bytes(); }
  bool valid() const;  // sizes in range: span <= 65536, so that its int32 cannot overflow; the rest as above
};

// Rows of quantised activations. Rows lie together in tiles of `tile` (1..16): codes is
// int8 [ceil(rows / tile)][blocks][tile][64]; rows beyond the last are whatever memory holds, and never used.
struct Activations {
  int64_t rows;
  int64_t tile;          // rows < 16: rows, otherwise 16
  int8_t* codes;
  float* scales;         // [rows][spans]
  int32_t* sums;         // [rows][groups]: of the codes of a group
  int32_t* totals;       // [rows][spans]: of the codes of a span
  const int8_t* block(int64_t row, int64_t index, int64_t blocks) const {
    return codes + ((row / tile * blocks + index) * tile + row % tile) * kBlock;
  }
};

enum class Activation : int { none = 0, silu = 1, gelu = 2, gelu_tanh = 3, relu = 4 };

// One product. With an activation the panels alternate between gate and up (of the same 16 outputs) and
// y = activation(gate) * up has outputs / 2 columns; then there is neither bias nor residual.
struct LinearCall {
  int64_t rows;
  const float* x;            // [rows][inputs]
  const uint8_t* weights;    // format.bytes(), 64-byte aligned
  const float* norm;         // [inputs] or null
  float epsilon;
  const float* bias;         // [outputs] or null
  const float* residual;     // [rows][outputs] or null; may be y
  Activation activation;
  float* y;                  // [rows][outputs], or [rows][outputs / 2] with an activation
};

// One path: the functions of one instruction set. All pointers but `out` and `x` are 64-byte aligned.
struct LinearPath {
  const char* name;

  // to[k] = x, float [inputs], as it is quantised: RMS-normalised if there is a `norm`, float [inputs]
  // (x / sqrt(mean(x^2) + epsilon) * norm), and then rotated if the format is.
  void (*prepare)(const LinearFormat&, const float* x, const float* norm, float epsilon, float* to);

  // What is not finite gives scale NaN and codes 0; what is below 1e-30 throughout counts as 0.
  // Quantises row `row` of `to` from x, float [inputs], prepared; sets its codes (padding to 0), scales, sums and totals.
  void (*quantize)(const LinearFormat&, const float* x, const Activations& to, int64_t row);

  // Rows first .. first + count (count <= kFew) times one panel: out[r * ld + n], n < 16.
  void (*dot)(const LinearFormat&, const uint8_t* panel, const Activations&, int64_t first, int64_t count, float* out,
              int64_t ld);

  // One panel's weights as this path's own `tile` wants them, blocks() x 1024 bytes.
  void (*expand)(const LinearFormat&, const uint8_t* panel, int8_t* to);

  // Rows first .. first + count (first % 32 == 0, count <= kRows, a.tile == 16) times `panels` (1 or 2) expanded
  // panels: out[r * ld + p * 16 + n]. `weights` are consecutive expansions, `headers` their panels (scales, zeros).
  void (*tile)(const LinearFormat&, const int8_t* weights, const uint8_t* const* headers, int panels,
               const Activations&, int64_t first, int64_t count, float* out, int64_t ld);

  // What becomes of sums, float [rows][ld] of the `panels` from `panel` on, rows of the call from `first` on: gated
  // (activations within 1e-6 * |gate * up|), or with bias and residual, to y.
  void (*finish)(const LinearFormat&, const LinearCall&, const float* sums, int64_t ld, int64_t first, int64_t rows,
                 int64_t panel, int64_t panels);

  // Gathered layouts (gathered.h), and row 0 of the activations. out[r], the sum of output r of an up's panel, for each
  // r whose bit of `which` is set; `dealt` are the row's codes, dealt.
  void (*rows)(const LinearFormat&, const uint8_t* panel, const Activations&, const uint32_t* dealt, unsigned which,
               float* out);

  // The sums of `count` lines of a down from `line` on, [count * line_outputs()], of the `active` channels, ascending,
  // among which are all that are not zero. `sums` is room for as many.
  void (*columns)(const LinearFormat&, const uint8_t* matrix, const Activations&, const int32_t* channels,
                  int64_t active, int64_t line, int64_t count, int32_t* sums, float* out);
};

// Whether it could be done: false where memory ran out.
bool linear(const LinearPath&, const LinearFormat&, const LinearCall&, const Parallel&);

// Rows `ids` of the matrix as they were before quantising: y float [count][inputs], times `factor`. Ids are in range.
void linear_rows(const LinearFormat&, const uint8_t* weights, const int64_t* ids, int64_t count, float factor, float* y);

const LinearPath& linear_scalar();
const LinearPath* linear_avx2();     // null where it was not compiled in; whether the processor has it: isa.h
const LinearPath* linear_avx512();   // VNNI
const LinearPath* linear_amx();
const LinearPath* linear_neon();     // dot product
const LinearPath* linear_i8mm();

}  // namespace shoal
