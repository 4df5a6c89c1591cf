// Experts whose ReLU leaves most hidden channels at zero: the same matrices as in linear.h, laid out so that the weights
// of one channel lie together, and a row of activations meets those of the channels alone that are not zero (ReGLU as in
// PowerInfer, Song et al. 2023, and SmallThinker, Song et al. 2025).
//
// gate, up      one after the other, not their panels in turn. The gate's panels are as they are; in an up's, which have
//               the same size, what outputs share out is each output's own:
//                 scales   float [16][spans]
//                 rows     [16]: groups uint8, padded to a multiple of 4, then codes, the words of 4 bytes that the output
//                          has in the vectors of a panel, in their order
// down          by lines of 512 / bits outputs, which a matrix's last may have more of than the matrix:
//                 scales   float [spans][outputs of all lines]
//                 groups   uint8 [groups][outputs of all lines]
//                 codes    [inputs][lines] of 64 bytes: output 16 p + w of a line is bits p * bits .. of word w
//
// Codes are of 2, 4 or 8 bits, and down is not rotated, as that leaves no zero. Sums of a span are exact integers and a
// channel whose activation rounds to 0 adds nothing to them: what is left out changes no bit, whoever leaves it out.
#pragma once
#include "linear.h"
#include "parallel.h"

namespace shoal {

constexpr int64_t kLine = 64;  // bytes

inline int64_t line_outputs(const LinearFormat& f) { return kLine * 8 / f.bits; }
inline int64_t lines(const LinearFormat& f) { return (f.outputs + line_outputs(f) - 1) / line_outputs(f); }

// Where the parts of a gathered down begin, and its bytes.
struct GatheredDown {
  int64_t outputs, groups_at, codes_at, channel, bytes;

  explicit GatheredDown(const LinearFormat& f)
      : outputs(lines(f) * line_outputs(f)),
        groups_at(f.spans() * outputs * 4),
        codes_at(groups_at + f.groups() * outputs),
        channel(lines(f) * kLine),
        bytes(codes_at + f.inputs * channel) {}
};

inline bool gatherable(const LinearFormat& gate_up, const LinearFormat& down) {
  auto known = [](int bits) { return bits == 2 || bits == 4 || bits == 8; };
  return known(gate_up.bits) && known(down.bits) && !down.rotated;
}

// linear() of a gate and its up that are gathered, and of a down: nothing is left out, as several rows together miss no
// channel, so panels are first as they were. False where memory ran out.
bool gathered_gate_up(const LinearPath&, const LinearFormat&, const LinearCall&, const Parallel&);
bool gathered_down(const LinearPath&, const LinearFormat&, const LinearCall&, const Parallel&);

// The panels of these matrices as linear.h has them: one of an up, and all of a down.
void up_panel(const LinearFormat&, const uint8_t* panel, uint8_t* to);
void down_panels(const LinearFormat&, const uint8_t* matrix, uint8_t* to, const Parallel&);

// Panel `index` of an expert's up.
inline const uint8_t* up_at(const LinearFormat& gate_up, const uint8_t* weights, int64_t index) {
  return weights + (gate_up.panels() / 2 + index) * gate_up.panel_bytes();
}

// An output's row in a panel of it, and where in that its codes begin.
inline int64_t row_codes(const LinearFormat& f) { return (f.groups() + 3) / 4 * 4; }
inline const uint8_t* row_at(const LinearFormat& f, const uint8_t* panel, int64_t r) {
  return panel + f.groups_at() + r * (row_codes(f) + f.padded() * f.bits / 8);
}

// What is gathered lies where no processor guesses, so memory is asked for it ahead: for the second cache, as the first
// has too few requests under way to keep memory busy (Zen 4: half of the time).
constexpr int kSecond = 2;

inline void want_rows(const LinearFormat& f, const uint8_t* panel, unsigned which) {
  for (; which; which &= which - 1) {
    const uint8_t* row = row_at(f, panel, __builtin_ctz(which));
    for (const uint8_t *at = row, *end = row_at(f, row, 1) - f.groups_at(); at < end; at += kLine) __builtin_prefetch(at, 0, kSecond);
  }
}

// A row's codes as `rows` wants them: [8 / bits][padded * bits / 32] words of four inputs each.
void deal(const LinearFormat&, const Activations&, int64_t row, uint32_t* to);

// The channels of a row that its product needs, ascending; how many.
int64_t channels(const LinearFormat&, const Activations&, int64_t row, int32_t* to);

}  // namespace shoal
