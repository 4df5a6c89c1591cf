// Attention with NEON (AArch64): 4 lanes, 32 registers.
#include "attention.h"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#include <string.h>

namespace shoal {
namespace {

struct Lanes {
  using Vector = float32x4_t;
  static constexpr int64_t width = 4;
  static constexpr int columns(int rows) { return rows <= 2 ? 8 : 4; }  // vectors beside each other in a product
  static constexpr int sums = 16;                                       // vectors that are added up together

  static Vector set(float x) { return vdupq_n_f32(x); }
  static Vector load(const float* from) { return vld1q_f32(from); }
  static Vector load(const uint16_t* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
  static Vector load(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
  }
  static void store(float* to, Vector x) { vst1q_f32(to, x); }
  static void store(uint16_t* to, Vector x) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static Vector sub(Vector a, Vector b) { return vsubq_f32(a, b); }
  static Vector mul(Vector a, Vector b) { return vmulq_f32(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
  static Vector max(Vector a, Vector b) { return vmaxq_f32(a, b); }
  static Vector round(Vector x) { return vrndnq_f32(x); }
  // x * 2^power for whole powers and x in [1/2, 2); zero below 2^-125.
  static Vector scale(Vector x, Vector power) {
    const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(power), 23);
    const int32x4_t scaled = vaddq_s32(vreinterpretq_s32_f32(x), exponent);
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_s32(scaled), vcltq_f32(power, set(-125))));
  }
  static float first(Vector x) { return vgetq_lane_f32(x, 0); }
  static float sum(Vector x) { return vaddvq_f32(x); }
  static float highest(Vector x) { return vmaxvq_f32(x); }

  // Element i is the sum of x[i].
  static Vector sum_each(const Vector* x) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }

  static void transpose(Vector (&x)[4]) {
    const auto pairs = [](Vector y) { return vreinterpretq_f64_f32(y); };
    const float64x2_t a = pairs(vtrn1q_f32(x[0], x[1])), b = pairs(vtrn2q_f32(x[0], x[1]));
    const float64x2_t c = pairs(vtrn1q_f32(x[2], x[3])), d = pairs(vtrn2q_f32(x[2], x[3]));
    x[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    x[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    x[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    x[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
  }
};

}  // namespace
}  // namespace shoal

#include "attention_vector.inl"

namespace shoal {

const AttentionPath* attention_neon() {
  static const AttentionPath path = {"neon", store, attend, attend_part};
  return &path;
}

}  // namespace shoal
#else

namespace shoal {
const AttentionPath* attention_neon() { return nullptr; }
}  // namespace shoal

#endif
