// NEON with int8 matrix products: smmla takes two rows times two outputs over eight inputs. All but `tile` is what
// linear_neon.cpp does; `expand` puts its result in the order of smmla's operands.
#include "linear.h"

#if defined(__ARM_FEATURE_MATMUL_INT8)
#include <arm_neon.h>

#include <algorithm>
#include <cstring>

namespace shoal {
namespace {

constexpr int kStep = 8;                // rows at once: with eight outputs, 16 sums of two by two
constexpr int64_t kChunk = 4 * kBlock;  // inputs that two panels and 32 rows keep in the first cache

int8x16_t codes_of(const int8_t* at) { return vld1q_s8(at); }
int8x16_t low_halves(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}
int8x16_t high_halves(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

// Eight inputs of a panel become eight registers, each of two outputs.
void expand(const LinearFormat& f, const uint8_t* panel, int8_t* to) {
  linear_neon()->expand(f, panel, to);
  for (int8_t* end = to + f.padded() * kPanel; to < end; to += 8 * kPanel)
    for (int i = 0; i < 4; ++i) {
      // Zipped in place: the pair that four outputs of two quads make goes where the two quads were
      const int32x4_t a = vreinterpretq_s32_s8(codes_of(to + 16 * i));
      const int32x4_t b = vreinterpretq_s32_s8(codes_of(to + 64 + 16 * i));
      vst1q_s8(to + 16 * i, vreinterpretq_s8_s32(vzip1q_s32(a, b)));
      vst1q_s8(to + 64 + 16 * i, vreinterpretq_s8_s32(vzip2q_s32(a, b)));
    }
}

// Two by two sums: of rows 2i, 2i + 1 and, as register four + 4 * odd, outputs 4 * four + 2 * odd and the next.
using Sums = int32x4_t[kPanel / 2];

// Adds the products of `inputs` inputs to the sums of eight rows, which lie together in a tile, and four of the
// registers of outputs: w is the first of them.
void add_rows(const int8_t* w, const int8_t* rows, int64_t inputs, Sums* sums, int from) {
  int32x4_t part[kStep / 2][4];
  for (int i = 0; i < kStep / 2; ++i)
    for (int n = 0; n < 4; ++n) part[i][n] = sums[i][from + n];
  for (int64_t k = 0; k < inputs; k += 16) {
    const int8_t* at = rows + k / kBlock * kTile * kBlock + k % kBlock;
    int8x16_t x[2][kStep / 2];
    for (int i = 0; i < kStep / 2; ++i) {
      const int8x16_t even = codes_of(at + 2 * i * kBlock), odd = codes_of(at + (2 * i + 1) * kBlock);
      x[0][i] = low_halves(even, odd);
      x[1][i] = high_halves(even, odd);
    }
    for (int eight = 0; eight < 2; ++eight, w += 8 * kPanel)
      for (int n = 0; n < 4; ++n) {
        const int8x16_t v = codes_of(w + 16 * n);
        for (int i = 0; i < kStep / 2; ++i) part[i][n] = vmmlaq_s32(part[i][n], x[eight][i], v);
      }
  }
  for (int i = 0; i < kStep / 2; ++i)
    for (int n = 0; n < 4; ++n) sums[i][from + n] = part[i][n];
}

void tile(const LinearFormat& f, const int8_t* weights, const uint8_t* const* headers, int panels,
          const Activations& a, int64_t first, int64_t count, float* out, int64_t ld) {
  const int64_t padded = f.padded(), spans = f.spans(), tile_bytes = padded * kTile;
  const int8_t* rows = a.block(first, 0, f.blocks());
  Sums sums[kPair][kRows / 2];
  for (int64_t span = 0, k = 0; span < spans; ++span) {
    std::memset(sums, 0, sizeof sums);
    for (const int64_t end = std::min(k + f.span, padded); k < end;) {
      const int64_t inputs = std::min(kChunk, end - k);
      for (int p = 0; p < panels; ++p)
        for (int64_t r = 0; r < count; r += kStep)  // rows beyond the last come to nothing
          for (int from = 0; from < kPanel / 2; from += 4)
            add_rows(weights + (p * padded + k) * kPanel + 16 * from,
                     rows + r / kTile * tile_bytes + k * kTile + r % kTile * kBlock, inputs, sums[p] + r / 2, from);
      k += inputs;
    }
    for (int p = 0; p < panels; ++p) {
      const float* scales = reinterpret_cast<const float*>(headers[p]) + span * kPanel;
      const auto zeros = reinterpret_cast<const int8_t*>(headers[p] + f.groups_at() + span * kPanel);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t index = (first + r) * spans + span;
        for (int four = 0; four < kPanel / 4; ++four) {
          const int64x2_t low = vreinterpretq_s64_s32(sums[p][r / 2][four]);
          const int64x2_t high = vreinterpretq_s64_s32(sums[p][r / 2][four + 4]);
          int32x4_t sum = vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(low, high) : vzip1q_s64(low, high));
          if (f.bits == 8) {
            const int32x4_t zero = {zeros[4 * four], zeros[4 * four + 1], zeros[4 * four + 2], zeros[4 * four + 3]};
            sum = vmlsq_n_s32(sum, zero, a.totals[index]);
          }
          float* y = out + r * ld + p * kPanel + 4 * four;
          const float32x4_t scale = vmulq_n_f32(vld1q_f32(scales + 4 * four), a.scales[index]);
          vst1q_f32(y, vfmaq_f32(span ? vld1q_f32(y) : vdupq_n_f32(0), vcvtq_f32_s32(sum), scale));
        }
      }
    }
  }
}

}  // namespace

const LinearPath* linear_i8mm() {
  static const LinearPath path = [] {
    LinearPath i8mm = *linear_neon();
    i8mm.name = "i8mm";
    i8mm.expand = expand;
    i8mm.tile = tile;
    return i8mm;
  }();
  return &path;
}

}  // namespace shoal

#else
const shoal::LinearPath* shoal::linear_i8mm() { return nullptr; }
#endif
