// Loops over floats that every path compiles for its own instruction set. All of it is local to the including file.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "linear.h"

namespace shoal {
namespace {

// e^x within 2e-7 relative for x <= 88; what is below -87 gives e^-87.
inline float exp_fast(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float n = __builtin_fmaf(x, 1.44269504f, shift);
  uint32_t bits;
  std::memcpy(&bits, &n, 4);
  n -= shift;
  float r = __builtin_fmaf(n, -0.693359375f, x);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r) + 1.0f;
  const uint32_t power = (bits - 0x4b400000u + 127u) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  return p * scale;
}

inline float silu(float x) { return x / (1.0f + exp_fast(-x)); }

inline float gelu_tanh(float x) {
  // 0.5 (1 + tanh t) = 1 / (1 + e^-2t)
  float t = 1.5957691216f * __builtin_fmaf(0.044715f * x * x, x, x);
  return x / (1.0f + exp_fast(-t));
}

inline float gelu(float x) {
  // Abramowitz and Stegun 7.1.26, within 1.5e-7
  float a = std::fabs(x) * 0.70710678f;
  float t = 1.0f / __builtin_fmaf(0.3275911f, a, 1.0f);
  float p = 1.061405429f;
  p = __builtin_fmaf(p, t, -1.453152027f);
  p = __builtin_fmaf(p, t, 1.421413741f);
  p = __builtin_fmaf(p, t, -0.284496736f);
  p = __builtin_fmaf(p, t, 0.254829592f);
  float half = 0.5f * p * t * exp_fast(-a * a);  // of erfc
  return x < 0 ? x * half : x * (1.0f - half);
}

template <float (*Function)(float)>
void gate_with(const float* sums, int64_t ld, int64_t rows, float* y, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < kPanel; ++i)
      y[row * columns + i] = Function(sums[row * ld + i]) * sums[row * ld + kPanel + i];
}

// A gate that is shut leaves 0, whatever it shuts out: an up that nobody computed too.
inline void gate_with_relu(const float* sums, int64_t ld, int64_t rows, float* y, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < kPanel; ++i) {
      const float gate = sums[row * ld + i];
      y[row * columns + i] = gate <= 0 ? 0 : gate * sums[row * ld + kPanel + i];
    }
}

void finish_any(const LinearFormat& f, const LinearCall& call, const float* sums, int64_t ld, int64_t first,
                int64_t rows, int64_t panel, int64_t panels) {
  if (call.activation != Activation::none) {
    const int64_t columns = f.outputs / 2;
    float* y = call.y + first * columns + panel / 2 * kPanel;
    switch (call.activation) {
      case Activation::silu: return gate_with<silu>(sums, ld, rows, y, columns);
      case Activation::gelu: return gate_with<gelu>(sums, ld, rows, y, columns);
      case Activation::relu: return gate_with_relu(sums, ld, rows, y, columns);
      default: return gate_with<gelu_tanh>(sums, ld, rows, y, columns);
    }
  }
  const int64_t begin = panel * kPanel, left = f.outputs - begin, count = left < panels * kPanel ? left : panels * kPanel;
  for (int64_t row = 0; row < rows; ++row) {
    float* y = call.y + (first + row) * f.outputs + begin;
    const float* sum = sums + row * ld;
    const float* residual = call.residual ? call.residual + (first + row) * f.outputs + begin : nullptr;
    if (call.bias && residual) {
      for (int64_t n = 0; n < count; ++n) y[n] = sum[n] + call.bias[begin + n] + residual[n];
    } else if (call.bias) {
      for (int64_t n = 0; n < count; ++n) y[n] = sum[n] + call.bias[begin + n];
    } else if (residual) {
      for (int64_t n = 0; n < count; ++n) y[n] = sum[n] + residual[n];
    } else {
      std::memcpy(y, sum, static_cast<size_t>(count) * sizeof(float));
    }
  }
}

// Sixteen floats, whatever registers the path has.
typedef float Sixteen __attribute__((vector_size(64), may_alias));
typedef int32_t Lanes __attribute__((vector_size(64)));

// The butterflies of one distance below 16: a + b in the lower lane of a pair, a - b in the upper.
template <int Distance>
void butterfly(Sixteen& v) {
  constexpr int d = Distance;
  constexpr auto sign = [](int lane) { return lane & d ? INT32_MIN : 0; };
  const Lanes signs = {sign(0), sign(1), sign(2),  sign(3),  sign(4),  sign(5),  sign(6),  sign(7),
                       sign(8), sign(9), sign(10), sign(11), sign(12), sign(13), sign(14), sign(15)};
#if defined(__clang__)
  const Sixteen others = __builtin_shufflevector(v, v, 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d, 8 ^ d,
                                                 9 ^ d, 10 ^ d, 11 ^ d, 12 ^ d, 13 ^ d, 14 ^ d, 15 ^ d);
#else  // g++ knows that one too, from 12 on
  const Lanes from = {0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d,
                      8 ^ d, 9 ^ d, 10 ^ d, 11 ^ d, 12 ^ d, 13 ^ d, 14 ^ d, 15 ^ d};
  const Sixteen others = __builtin_shuffle(v, from);
#endif
  v = others + (Sixteen)((Lanes)v ^ signs);
}

[[maybe_unused]] void rotate(const float* x, int64_t count, float* to) {
  for (int64_t at = 0; at < count; at += kBlock) {
    Sixteen v[4];
    std::memcpy(v, x + at, sizeof v);
    for (auto& part : v) {
      butterfly<1>(part);
      butterfly<2>(part);
      butterfly<4>(part);
      butterfly<8>(part);
    }
    auto block = reinterpret_cast<Sixteen*>(to + at);
    const Sixteen a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
    block[0] = (a + c) * 0.125f;
    block[1] = (b + d) * 0.125f;
    block[2] = (a - c) * 0.125f;
    block[3] = (b - d) * 0.125f;
  }
}

[[maybe_unused]] void prepare_any(const LinearFormat& f, const float* x, const float* norm, float epsilon, float* to) {
  const int64_t count = f.inputs;
  if (norm) {
    float sums[16] = {};
    int64_t k = 0;
    for (; k + 16 <= count; k += 16)
      for (int i = 0; i < 16; ++i) sums[i] = __builtin_fmaf(x[k + i], x[k + i], sums[i]);
    for (; k < count; ++k) sums[k % 16] = __builtin_fmaf(x[k], x[k], sums[k % 16]);
    for (int half = 8; half; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    const float factor = 1 / std::sqrt(sums[0] / static_cast<float>(count) + epsilon);
    for (int64_t i = 0; i < count; ++i) to[i] = x[i] * factor * norm[i];
    x = to;
  }
  if (f.rotated) {
    rotate(x, count, to);
  } else if (x != to) {
    std::memcpy(to, x, static_cast<size_t>(count) * sizeof(float));
  }
}

}  // namespace
}  // namespace shoal
