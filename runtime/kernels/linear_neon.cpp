// NEON with the dot product: four outputs a register, sdot with a row's 16 inputs as the lanes of one register.
#include "linear.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "elementwise.inl"
#include "gathered.h"

namespace shoal {
namespace {

constexpr int kFour = kPanel / 4;      // registers of a panel's outputs
constexpr int kHalf = 32;              // inputs of half a block: a group is whole halves
constexpr int64_t kChunk = 4 * kBlock;  // inputs that two panels and 32 rows keep in the first cache

uint8x16_t bytes_of(const void* at) { return vld1q_u8(static_cast<const uint8_t*>(at)); }
int8x16_t codes_of(const void* at) { return vld1q_s8(static_cast<const int8_t*>(at)); }

// Four floats of x from k on, 0 beyond its end.
float32x4_t floats(const float* x, int64_t k, int64_t inputs) {
  if (k + 4 <= inputs) return vld1q_f32(x + k);
  float lanes[4] = {};
  for (int i = 0; k + i < inputs; ++i) lanes[i] = x[k + i];
  return vld1q_f32(lanes);
}

void quantize(const LinearFormat& f, const float* x, const Activations& to, int64_t row) {
  const int64_t inputs = f.inputs, padded = f.padded(), spans = f.spans(), stride = to.tile * kBlock;
  int8_t* codes = const_cast<int8_t*>(to.block(row, 0, f.blocks()));
  int32_t* sums = to.sums + row * f.groups();
  for (int64_t span = 0, k = 0; span < spans; ++span) {
    const int64_t end = std::min(k + f.span, padded);
    uint32x4_t most = vdupq_n_u32(0);  // of the magnitudes' bits, in which what is not finite comes last
    for (int64_t i = k; i < end; i += 4) most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(floats(x, i, inputs))));
    const uint32_t bits = vmaxvq_u32(most);
    float amax;
    std::memcpy(&amax, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const float inverse = finite && amax >= 1e-30f ? 127 / amax : 0;
    to.scales[row * spans + span] = !finite ? std::nanf("") : inverse ? amax / 127 : 0;
    int32_t of_span = 0;
    while (k < end) {
      int32_t of_group = 0;
      for (const int64_t stop = std::min(k + f.group, end); k < stop; k += 16) {
        int16x4_t v[4];
        for (int i = 0; i < 4; ++i)
          v[i] = inverse ? vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(floats(x, k + 4 * i, inputs), inverse)))
                         : vdup_n_s16(0);
        const int8x16_t packed =
            vcombine_s8(vmovn_s16(vcombine_s16(v[0], v[1])), vmovn_s16(vcombine_s16(v[2], v[3])));
        vst1q_s8(codes + k / kBlock * stride + k % kBlock, packed);
        of_group += vaddlvq_s8(packed);
      }
      *sums++ = of_group;
      of_span += of_group;
    }
    to.totals[row * spans + span] = of_span;
  }
}

// Half a block's codes. quad(j, four): step * code of inputs 4j .. 4j + 3 for the outputs from 4 * four on.
template <int Bits>
struct Half {
  const uint8_t* at;
  const uint8_t* third;  // bits, of 3

  Half(const uint8_t* codes, int64_t k) {
    const uint8_t* block = codes + k / kBlock * (kBlock * kPanel * Bits / 8);
    at = block + k % kBlock * kPanel * (Bits == 3 ? 2 : Bits) / 8;
    third = block + kBlock * kPanel / 4 + k % kBlock * kPanel / 8;
  }

  int8x16_t quad(int j, int four) const {
    if constexpr (Bits == 8) return codes_of(at + 64 * j + 16 * four);
    if constexpr (Bits == 4) {
      const uint8x16_t v = bytes_of(at + j / 2 * 64 + 16 * four);
      return vreinterpretq_s8_u8(j % 2 ? v >> 4 : v & 15);
    }
    const uint8x16_t low = right(bytes_of(at + j / 4 * 64 + 16 * four), j % 4 * 2 - 1) & 6;
    if constexpr (Bits == 2) return vreinterpretq_s8_u8(low);
    return vreinterpretq_s8_u8(low | (right(bytes_of(third + 16 * four), j - 3) & 8));
  }

  static uint8x16_t right(uint8x16_t v, int bits) {
    return bits < 0 ? v << static_cast<uint8_t>(-bits) : v >> static_cast<uint8_t>(bits);
  }
};

// Adds the products of 16 inputs, a quad in each of w.
inline int32x4_t dot16(int32x4_t sum, const int8x16_t (&w)[4], int8x16_t x) {
  sum = vdotq_laneq_s32(sum, w[0], x, 0);
  sum = vdotq_laneq_s32(sum, w[1], x, 1);
  sum = vdotq_laneq_s32(sum, w[2], x, 2);
  return vdotq_laneq_s32(sum, w[3], x, 3);
}

// Four of sixteen bytes as integers.
inline int32x4_t integers(const uint8_t* at, int four, bool is_signed) {
  const uint8x16_t bytes = bytes_of(at), index = {0, 16, 16, 16, 1, 16, 16, 16, 2, 16, 16, 16, 3, 16, 16, 16};
  const int32x4_t v = vreinterpretq_s32_u8(vqtbl1q_u8(bytes, index + static_cast<uint8_t>(4 * four)));
  return is_signed ? vshrq_n_s32(vshlq_n_s32(v, 24), 24) : v;
}

// y + scale * sums: the end of a span.
inline float32x4_t scaled(int32x4_t sums, float activation_scale, const float* weight_scale, float32x4_t y) {
  return vfmaq_f32(y, vcvtq_f32_s32(sums), vmulq_n_f32(vld1q_f32(weight_scale), activation_scale));
}

template <int Bits, int Rows>
void dot_rows(const LinearFormat& f, const uint8_t* panel, const Activations& a, int64_t first, float* out,
              int64_t ld) {
  const uint8_t* codes = panel + f.codes_at();
  const int64_t padded = f.padded(), spans = f.spans(), groups = f.groups(), stride = a.tile * kBlock;
  const int8_t* rows[Rows];
  for (int r = 0; r < Rows; ++r) rows[r] = a.block(first + r, 0, f.blocks());
  float32x4_t y[Rows][kFour] = {};
  for (int64_t span = 0, index = 0, k = 0; span < spans; ++span) {
    int32x4_t sums[Rows][kFour] = {};
    for (const int64_t end = std::min(k + f.span, padded); k < end; ++index) {
      int32x4_t of_group[Rows][kFour] = {};
      for (const int64_t stop = std::min(k + f.group, end); k < stop; k += kHalf) {
        const Half<Bits> half(codes, k);
        const int64_t at = k / kBlock * stride + k % kBlock;
#pragma GCC unroll 2
        for (int j = 0; j < 8; j += 4) {
          int8x16_t x[Rows];
          for (int r = 0; r < Rows; ++r) x[r] = codes_of(rows[r] + at + 4 * j);
#pragma GCC unroll 4
          for (int four = 0; four < kFour; ++four) {
            const int8x16_t w[4] = {half.quad(j, four), half.quad(j + 1, four), half.quad(j + 2, four),
                                    half.quad(j + 3, four)};
            for (int r = 0; r < Rows; ++r) of_group[r][four] = dot16(of_group[r][four], w, x[r]);
          }
        }
      }
      for (int four = 0; four < kFour; ++four) {
        const int32x4_t both = integers(panel + f.groups_at() + index * kPanel, four, Bits == 8);
        const int32x4_t multiplier = Bits == 8 ? vdupq_n_s32(1) : vandq_s32(both, vdupq_n_s32(15));
        const int32x4_t zero = Bits == 8 ? both : vmulq_s32(multiplier, vshrq_n_s32(both, 4));
        for (int r = 0; r < Rows; ++r) {
          int32x4_t& sum = sums[r][four];
          sum = vmlaq_s32(sum, of_group[r][four], multiplier);
          sum = vmlsq_n_s32(sum, zero, a.sums[(first + r) * groups + index]);
        }
      }
    }
    const float* scale = reinterpret_cast<const float*>(panel) + span * kPanel;
    for (int r = 0; r < Rows; ++r)
      for (int four = 0; four < kFour; ++four)
        y[r][four] = scaled(sums[r][four], a.scales[(first + r) * spans + span], scale + 4 * four, y[r][four]);
  }
  for (int r = 0; r < Rows; ++r)
    for (int four = 0; four < kFour; ++four) vst1q_f32(out + r * ld + 4 * four, y[r][four]);
}

template <int Bits>
void expand_bits(const LinearFormat& f, const uint8_t* panel, int8_t* to) {
  const uint8_t* codes = panel + f.codes_at();
  const uint8x16_t each = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  for (int64_t k = 0, padded = f.padded(); k < padded; k += kHalf, to += kHalf * kPanel) {
    const Half<Bits> half(codes, k);
    const uint8x16_t both = bytes_of(panel + f.groups_at() + k / f.group * kPanel);
#pragma GCC unroll 4
    for (int four = 0; four < kFour; ++four) {
      const uint8x16_t mine = vqtbl1q_u8(both, each + static_cast<uint8_t>(4 * four));
      const int8x16_t multiplier = vreinterpretq_s8_u8(mine & 15), zero = vreinterpretq_s8_u8(mine >> 4);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        int8x16_t v = half.quad(j, four);
        if constexpr (Bits < 8) v = vmulq_s8(vsubq_s8(v, zero), multiplier);
        vst1q_s8(to + 64 * j + 16 * four, v);
      }
    }
  }
}

// Adds the products of `inputs` inputs to the sums of four rows, which lie together in a tile.
void add_rows(const int8_t* w, const int8_t* rows, int64_t inputs, int32x4_t (*sums)[kFour]) {
  constexpr int kStep = 4;
  int32x4_t part[kStep][kFour];
  for (int r = 0; r < kStep; ++r)
    for (int four = 0; four < kFour; ++four) part[r][four] = sums[r][four];
  for (int64_t k = 0; k < inputs; k += 16, w += 16 * kPanel) {
    const int8_t* at = rows + k / kBlock * kTile * kBlock + k % kBlock;
    int8x16_t x[kStep];
    for (int r = 0; r < kStep; ++r) x[r] = codes_of(at + r * kBlock);
#pragma GCC unroll 4
    for (int four = 0; four < kFour; ++four) {
      const int8_t* quads = w + 16 * four;
      const int8x16_t v[4] = {codes_of(quads), codes_of(quads + 64), codes_of(quads + 128), codes_of(quads + 192)};
      for (int r = 0; r < kStep; ++r) part[r][four] = dot16(part[r][four], v, x[r]);
    }
  }
  for (int r = 0; r < kStep; ++r)
    for (int four = 0; four < kFour; ++four) sums[r][four] = part[r][four];
}

void tile(const LinearFormat& f, const int8_t* weights, const uint8_t* const* headers, int panels,
          const Activations& a, int64_t first, int64_t count, float* out, int64_t ld) {
  const int64_t padded = f.padded(), spans = f.spans(), tile_bytes = padded * kTile;
  const int8_t* rows = a.block(first, 0, f.blocks());
  int32x4_t sums[kPair][kRows][kFour];
  for (int64_t span = 0, k = 0; span < spans; ++span) {
    std::memset(sums, 0, sizeof sums);
    for (const int64_t end = std::min(k + f.span, padded); k < end;) {
      const int64_t inputs = std::min(kChunk, end - k);
      for (int p = 0; p < panels; ++p)
        for (int64_t r = 0; r < count; r += 4)  // rows beyond the last come to nothing
          add_rows(weights + (p * padded + k) * kPanel, rows + r / kTile * tile_bytes + k * kTile + r % kTile * kBlock,
                   inputs, sums[p] + r);
      k += inputs;
    }
    for (int p = 0; p < panels; ++p)
      for (int four = 0; four < kFour; ++four) {
        const float* scale = reinterpret_cast<const float*>(headers[p]) + span * kPanel + 4 * four;
        const int32x4_t zero =
            f.bits == 8 ? integers(headers[p] + f.groups_at() + span * kPanel, four, true) : vdupq_n_s32(0);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t index = (first + r) * spans + span;
          float* y = out + r * ld + p * kPanel + 4 * four;
          const float32x4_t before = span ? vld1q_f32(y) : vdupq_n_f32(0);
          const int32x4_t sum = vmlsq_n_s32(sums[p][r][four], zero, a.totals[index]);
          vst1q_f32(y, scaled(sum, a.scales[index], scale, before));
        }
      }
  }
}

#include "linear_dispatch.inl"

constexpr int kWords = 4, kBias = 0;  // of gathered.inl
typedef uint32_t Words __attribute__((vector_size(4 * kWords), may_alias));
typedef Words Wide;
constexpr int kWide = kWords;

template <int Bits>
Words add_quads(Words sum, Words codes, Words x) {
  return (Words)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x);
}

template <int Bits>
Wide group_of(const uint8_t* at) {
  int32_t lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = Bits == 8 ? static_cast<int8_t>(at[i]) : at[i];
  return (Wide)vld1q_s32(lanes);
}

#include "gathered.inl"

}  // namespace

const LinearPath* linear_neon() {
  static const LinearPath path{"neon", prepare_any, quantize, dot, expand, tile, finish_any, rows, columns};
  return &path;
}

}  // namespace shoal

#else
const shoal::LinearPath* shoal::linear_neon() { return nullptr; }
#endif
