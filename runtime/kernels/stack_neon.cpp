// NEON: signs are looked up, four at a time. For each four codes a table holds the sums of all sixteen ways to sign
// them, and tbl finds those of a panel's outputs at once, as in T-MAC (Wei et al. 2024). A sum has ten bits, kept as
// two of five, eight of which add up in a byte. ld4 gathers the sixteen bytes that meet the same codes: those of one
// place i. Their nibbles are the signs of inputs i, 4 + i, 8 + i and 12 + i of each half of 32.
#include "stack_path.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace shoal {
namespace {

constexpr int64_t kTable = 8;      // bytes of tables for each code
constexpr int kOffset = 4 * 127;   // that makes a sum of four signed codes positive
constexpr int kVector = 32;        // inputs of a vector of signs
constexpr int64_t kVectors = 256;  // whose low halves, 31 * 8 each, fit 16 bits
constexpr int kFour = kPanel / 4;  // registers of a panel's outputs

float32x4_t floats(const uint16_t* halves) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves))); }

void weigh(const uint16_t* v, const float* x, int64_t count, float* z) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) vst1q_f32(z + k, vmulq_f32(floats(v + k), vld1q_f32(x + k)));
  for (; k < count; ++k) z[k] = vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_dup_u16(v + k))), 0) * x[k];
}

// The tables of a vector of signs lie as `signed_sums` wants them: for place i, for each 16 of 32 inputs, the low five
// bits and then the others.
void tabulate(const int8_t* codes, int64_t padded, uint8_t* to) {
  const int16x8_t first = {-1, 1, -1, 1, -1, 1, -1, 1}, second = {-1, -1, 1, 1, -1, -1, 1, 1};
  const int16x8_t third = {-1, -1, -1, -1, 1, 1, 1, 1};
  for (int64_t k = 0; k < padded; k += kVector)
    for (int i = 0; i < 4; ++i)
      for (int part = 0; part < 2; ++part, to += 2 * kPanel) {
        const int8_t* at = codes + k + 16 * part + i;
        int16x8_t three = vmlaq_n_s16(vdupq_n_s16(kOffset), first, at[0]);
        three = vmlaq_n_s16(vmlaq_n_s16(three, second, at[4]), third, at[8]);
        const int16x8_t last = vdupq_n_s16(at[12]);
        const uint16x8_t low = vreinterpretq_u16_s16(vsubq_s16(three, last));
        const uint16x8_t high = vreinterpretq_u16_s16(vaddq_s16(three, last));
        vst1q_u8(to, vandq_u8(vcombine_u8(vmovn_u16(low), vmovn_u16(high)), vdupq_n_u8(31)));
        vst1q_u8(to + kPanel, vcombine_u8(vshrn_n_u16(low, 5), vshrn_n_u16(high, 5)));
      }
}

// Bytes added up in 16 bits.
struct Wide {
  uint16x8_t half[2] = {vdupq_n_u16(0), vdupq_n_u16(0)};

  void add(uint8x16_t bytes) {
    half[0] = vaddw_u8(half[0], vget_low_u8(bytes));
    half[1] = vaddw_high_u8(half[1], bytes);
  }
  uint32x4_t of(int four) const {
    const uint16x8_t v = half[four / 2];
    return four % 2 ? vmovl_high_u16(v) : vmovl_u16(vget_low_u16(v));
  }
};

// sums[row][four] = the codes of `Rows` rows, added where a panel's sign is positive and taken off elsewhere.
template <int Rows>
void signed_sums(const uint8_t* signs, int64_t vectors, const uint8_t* tables, int32x4_t (*sums)[kFour]) {
  for (int r = 0; r < Rows; ++r)
    for (int four = 0; four < kFour; ++four)
      sums[r][four] = vdupq_n_s32(static_cast<int32_t>(-kOffset * (kVector / 4) * vectors));
  for (int64_t vector = 0; vector < vectors;) {
    Wide low[Rows], high[Rows];
    for (const int64_t end = std::min(vector + kVectors, vectors); vector < end; ++vector, signs += 64) {
      const uint8x16x4_t places = vld4q_u8(signs);
      uint8x16_t lows[Rows], highs[Rows];
      for (int r = 0; r < Rows; ++r) lows[r] = highs[r] = vdupq_n_u8(0);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8x16_t index[2] = {vandq_u8(places.val[i], vdupq_n_u8(15)), vshrq_n_u8(places.val[i], 4)};
        for (int part = 0; part < 2; ++part)
          for (int r = 0; r < Rows; ++r) {
            const uint8_t* table = tables + (r * vectors + vector) * kVector * kTable + 64 * i + 32 * part;
            lows[r] = vaddq_u8(lows[r], vqtbl1q_u8(vld1q_u8(table), index[part]));
            highs[r] = vaddq_u8(highs[r], vqtbl1q_u8(vld1q_u8(table + kPanel), index[part]));
          }
      }
      for (int r = 0; r < Rows; ++r) {
        low[r].add(lows[r]);
        high[r].add(highs[r]);
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int four = 0; four < kFour; ++four) {
        const uint32x4_t sum = vaddq_u32(low[r].of(four), vshlq_n_u32(high[r].of(four), 5));
        sums[r][four] = vaddq_s32(sums[r][four], vreinterpretq_s32_u32(sum));
      }
  }
}

void sums_of(int64_t rows, const uint8_t* signs, int64_t vectors, const uint8_t* tables, int32x4_t (*sums)[kFour]) {
  switch (rows) {
    case 1: return signed_sums<1>(signs, vectors, tables, sums);
    case 2: return signed_sums<2>(signs, vectors, tables, sums);
    case 3: return signed_sums<3>(signs, vectors, tables, sums);
    default: return signed_sums<4>(signs, vectors, tables, sums);
  }
}

void add(const StackFormat& f, const uint8_t* payload, int64_t panel, int64_t panels, const StackRows& a, float* y,
         int64_t ld) {
  const int64_t vectors = f.padded() / kVector, rows = a.rows * f.rank;
  const uint8_t* signs = payload + f.signs_at() + panel * f.panel_bytes();
  const auto* u = reinterpret_cast<const uint16_t*>(payload + f.u_at()) + panel * kPanel;
  for (int64_t p = 0; p < panels; ++p, signs += f.panel_bytes(), u += kPanel, y += kPanel)
    for (int64_t first = 0; first < rows; first += kFew) {
      const int64_t count = std::min<int64_t>(kFew, rows - first);
      int32x4_t sums[kFew][kFour];
      sums_of(count, signs, vectors, a.tables + first * f.padded() * kTable, sums);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = (first + i) / f.rank, rank = (first + i) % f.rank;
        for (int four = 0; four < kFour; ++four) {
          const float32x4_t scale = vmulq_n_f32(floats(u + rank * f.panels() * kPanel + 4 * four), a.scales[first + i]);
          float* at = y + row * ld + 4 * four;
          vst1q_f32(at, vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(sums[i][four]), scale));
        }
      }
    }
}

// The weights of a span of inputs and 16 outputs.
struct Span {
  float w[kStackSpan][kPanel];

  float32x4_t at(int64_t k, int four) const { return vld1q_f32(w[k] + 4 * four); }
  void set(int64_t k, int four, float32x4_t v) { vst1q_f32(w[k] + 4 * four, v); }
};

// Sets inputs begin .. begin + count to the base's, expanded.
void set_base(const LinearFormat& f, const uint8_t* panel, const int8_t* expanded, int64_t begin, int64_t count,
              Span& to) {
  for (int64_t k = 0; k < count; k += 4) {
    const int64_t span = (begin + k) / f.span * kPanel;
    for (int four = 0; four < kFour; ++four) {
      const float32x4_t scale = vld1q_f32(reinterpret_cast<const float*>(panel) + span + 4 * four);
      int32x4_t zero = vdupq_n_s32(0);
      if (f.bits == 8) {
        int8_t zeros[8] = {};
        std::memcpy(zeros, panel + f.groups_at() + span + 4 * four, 4);
        zero = vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(zeros))));
      }
      int32x4_t quad = vreinterpretq_s32_s8(vld1q_s8(expanded + (begin + k) * kPanel + 16 * four));
      for (int64_t i = 0; i < 4; ++i, quad = vshrq_n_s32(quad, 8)) {
        const int32x4_t code = vsubq_s32(vshrq_n_s32(vshlq_n_s32(quad, 24), 24), zero);
        to.set(k + i, four, vmulq_f32(scale, vcvtq_f32_s32(code)));
      }
    }
  }
}

// Adds inputs begin .. begin + count of a block, to 0 where it is the `First`. `Ranks` is 1, or 0 for any.
template <bool First, int Ranks>
void add_block(const StackFormat& f, const uint8_t* payload, int64_t panel, int64_t begin, int64_t count, Span& to) {
  const int ranks = Ranks ? Ranks : f.rank;
  const auto* u = reinterpret_cast<const uint16_t*>(payload + f.u_at()) + panel * kPanel;
  const auto* v = reinterpret_cast<const uint16_t*>(payload) + begin;
  const uint8_t* signs = payload + f.signs_at() + panel * f.panel_bytes() + begin * kPanel / 8;
  float values[kStackRanks][kStackSpan];
  float32x4_t factors[kStackRanks][kFour], negative[kFour];
  for (int r = 0; r < ranks; ++r) {
    for (int four = 0; four < kFour; ++four) factors[r][four] = floats(u + r * f.panels() * kPanel + 4 * four);
    for (int64_t k = 0; k < count; k += 4) vst1q_f32(values[r] + k, floats(v + r * f.padded() + k));
  }
  for (int four = 0; four < kFour; ++four) negative[four] = vnegq_f32(factors[0][four]);
  const uint32x4_t top = vdupq_n_u32(1u << 31);
  for (int64_t half = 0; half < count; half += kVector, signs += 64) {
    uint32x4_t bits[kFour];
    for (int four = 0; four < kFour; ++four) bits[four] = vreinterpretq_u32_u8(vld1q_u8(signs + 16 * four));
    for (int64_t i = 3; i >= 0; --i)
      for (int64_t b = 7; b >= 0; --b)  // the uppermost bit is that of input 4b + i
        for (int four = 0; four < kFour; ++four) {
          const int64_t k = half + 4 * b + i;
          float32x4_t size = vmulq_n_f32(negative[four], values[0][k]);
          for (int r = 1; r < ranks; ++r) size = vfmsq_n_f32(size, factors[r][four], values[r][k]);
          size = vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(size), vandq_u32(bits[four], top)));
          to.set(k, four, vaddq_f32(First ? vdupq_n_f32(0) : to.at(k, four), size));
          bits[four] = vshlq_n_u32(bits[four], 1);
        }
  }
}

// Quantises a span of `count` inputs.
void set_codes(const LinearFormat& f, const Span& from, int64_t span, int64_t count, uint8_t* to) {
  uint8_t* codes = to + f.codes_at() + span * f.span * kPanel;
  for (int four = 0; four < kFour; ++four) {
    uint32x4_t most = vdupq_n_u32(0);  // of the magnitudes' bits, in which what is not finite comes last
    for (int64_t k = 0; k < count; ++k) most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(from.at(k, four))));
    const float32x4_t amax = vreinterpretq_f32_u32(most), largest = vdupq_n_f32(127);
    const uint32x4_t finite = vcltq_u32(most, vdupq_n_u32(0x7f800000));
    const uint32x4_t some = vandq_u32(finite, vcgeq_f32(amax, vdupq_n_f32(1e-30f)));
    const float32x4_t none = vdupq_n_f32(0), inverse = vdivq_f32(largest, amax);
    const float32x4_t scale = vbslq_f32(some, vdivq_f32(amax, largest), none);
    float* scales = reinterpret_cast<float*>(to) + span * kPanel + 4 * four;
    vst1q_f32(scales, vbslq_f32(finite, scale, vdupq_n_f32(std::nanf(""))));
    for (int64_t k = 0; k < count; k += 4) {
      auto code = [&](int64_t i) {
        return vcvtnq_s32_f32(vbslq_f32(some, vmulq_f32(from.at(k + i, four), inverse), none));
      };
      const int32x4_t two = vsliq_n_s32(code(0), code(1), 8);
      const int32x4_t all = vsliq_n_s32(vsliq_n_s32(two, code(2), 16), code(3), 24);
      vst1q_u8(codes + k * kPanel + 16 * four, vreinterpretq_u8_s32(all));
    }
  }
}

void rebuild(const StackFormat& f, const StackWeights& w, int64_t panel, int8_t* room, uint8_t* to) {
  const LinearFormat rebuilt = f.rebuilt();
  const uint8_t* base = w.base ? w.base + panel * w.base_format->panel_bytes() : nullptr;
  if (base) linear_neon()->expand(*w.base_format, base, room);
  std::memset(to + rebuilt.groups_at(), 0, static_cast<size_t>(rebuilt.codes_at() - rebuilt.groups_at()));
  const auto add_first = f.rank == 1 ? add_block<true, 1> : add_block<true, 0>;
  const auto add_next = f.rank == 1 ? add_block<false, 1> : add_block<false, 0>;
  Span span;
  for (int64_t index = 0; index < rebuilt.spans(); ++index) {
    const int64_t begin = index * rebuilt.span, count = std::min(rebuilt.span, f.padded() - begin);
    if (base) set_base(*w.base_format, base, room, begin, count, span);
    for (int block = 0; block < w.count; ++block)
      (block || base ? add_next : add_first)(f, w.blocks[block], panel, begin, count, span);
    for (int64_t k = std::max<int64_t>(0, f.inputs - begin); k < count; ++k)  // padding
      for (int four = 0; four < kFour; ++four) span.set(k, four, vdupq_n_f32(0));
    set_codes(rebuilt, span, index, count, to);
  }
}

}  // namespace

const StackPath* stack_neon() {
  static const StackPath path{"neon", weigh, add, rebuild, kTable, tabulate};
  return &path;
}

}  // namespace shoal

#else
const shoal::StackPath* shoal::stack_neon() { return nullptr; }
#endif
