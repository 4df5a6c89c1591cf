// The reference: what every other path must compute, bit by bit, and what runs where there is none.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "elementwise.inl"
#include "gathered.h"
#include "linear.h"

namespace shoal {
namespace {

// The code at input k, output r of a panel.
int code_at(const LinearFormat& f, const uint8_t* panel, int64_t k, int64_t r) {
  const uint8_t* block = panel + f.codes_at() + k / kBlock * f.block_bytes();
  int64_t at = k % kBlock;
  switch (f.bits) {
    case 8: return static_cast<int8_t>(block[at / 4 * 64 + 4 * r + at % 4]);
    case 4: return block[at / 8 * 64 + 4 * r + at % 4] >> (at / 4 % 2 * 4) & 15;
    default: {
      int low = block[at / 16 * 64 + 4 * r + at % 4] >> (at / 4 % 4 * 2) & 3;
      if (f.bits == 2) return low;
      return low | (block[256 + at / 32 * 64 + 4 * r + at % 4] >> (at / 4 % 8) & 1) << 2;
    }
  }
}

// Each block of 64 through butterflies of distance 1, 2 .. 32, then an eighth of it.
void rotate_scalar(float* x, int64_t count) {
  for (float* block = x; block < x + count; block += kBlock) {
    for (int distance = 1; distance < kBlock; distance *= 2)
      for (int i = 0; i < kBlock; ++i)
        if (!(i & distance)) {
          const float a = block[i], b = block[i + distance];
          block[i] = a + b;
          block[i + distance] = a - b;
        }
    for (int i = 0; i < kBlock; ++i) block[i] *= 0.125f;
  }
}

// The integer weight at input k, output r; with 8 bits its code.
int weight_at(const LinearFormat& f, const uint8_t* panel, int64_t k, int64_t r) {
  int code = code_at(f, panel, k, r);
  if (f.bits == 8) return code;
  int group = panel[f.groups_at() + k / f.group * kPanel + r];
  return (group & 15) * (f.step() * code - (group >> 4));
}

int zero_at(const LinearFormat& f, const uint8_t* panel, int64_t span, int64_t r) {
  return f.bits == 8 ? static_cast<int8_t>(panel[f.groups_at() + span * kPanel + r]) : 0;
}

void prepare(const LinearFormat& f, const float* x, const float* norm, float epsilon, float* to) {
  float factor = 1;
  if (norm) {
    // Sixteen sums and a tree, so that vectors of any length up to sixteen add in the same order
    float sums[16] = {};
    for (int64_t k = 0; k < f.inputs; ++k) sums[k % 16] = std::fma(x[k], x[k], sums[k % 16]);
    for (int half = 8; half; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    factor = 1 / std::sqrt(sums[0] / static_cast<float>(f.inputs) + epsilon);
  }
  for (int64_t k = 0; k < f.inputs; ++k) to[k] = norm ? x[k] * factor * norm[k] : x[k];
  if (f.rotated) rotate_scalar(to, f.inputs);
}

void quantize(const LinearFormat& f, const float* x, const Activations& to, int64_t row) {
  int32_t* sums = to.sums + row * f.groups();
  std::memset(sums, 0, f.groups() * sizeof(int32_t));
  for (int64_t span = 0; span < f.spans(); ++span) {
    int64_t begin = span * f.span, end = std::min(begin + f.span, f.padded());
    uint32_t most = 0;  // of the magnitudes' bits, in which what is not finite comes last
    for (int64_t k = begin; k < std::min(end, f.inputs); ++k) {
      float v = x[k];
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      most = std::max(most, bits & 0x7fffffff);
    }
    float amax;
    std::memcpy(&amax, &most, 4);
    bool finite = most < 0x7f800000;
    float inverse = finite && amax >= 1e-30f ? 127 / amax : 0;
    to.scales[row * f.spans() + span] = !finite ? std::nanf("") : inverse ? amax / 127 : 0;
    int32_t total = 0;
    for (int64_t k = begin; k < end; ++k) {
      float v = k < f.inputs && inverse ? std::nearbyint(x[k] * inverse) : 0;
      auto code = static_cast<int8_t>(v);
      const_cast<int8_t*>(to.block(row, k / kBlock, f.blocks()))[k % kBlock] = code;
      sums[k / f.group] += code;
      total += code;
    }
    to.totals[row * f.spans() + span] = total;
  }
}

void dot(const LinearFormat& f, const uint8_t* panel, const Activations& a, int64_t first, int64_t count, float* out,
         int64_t ld) {
  auto scales = reinterpret_cast<const float*>(panel);
  for (int64_t row = 0; row < count; ++row)
    for (int64_t r = 0; r < kPanel; ++r) {
      float y = 0;
      for (int64_t span = 0; span < f.spans(); ++span) {
        int64_t sum = 0;
        for (int64_t k = span * f.span; k < std::min((span + 1) * f.span, f.padded()); ++k)
          sum += weight_at(f, panel, k, r) * a.block(first + row, k / kBlock, f.blocks())[k % kBlock];
        int64_t index = (first + row) * f.spans() + span;
        sum -= int64_t{zero_at(f, panel, span, r)} * a.totals[index];
        y = std::fma(static_cast<float>(static_cast<int32_t>(sum)), a.scales[index] * scales[span * kPanel + r], y);
      }
      out[row * ld + r] = y;
    }
}

void expand(const LinearFormat& f, const uint8_t* panel, int8_t* to) {
  for (int64_t k = 0; k < f.padded(); ++k)
    for (int64_t r = 0; r < kPanel; ++r)
      to[k / 4 * 64 + 4 * r + k % 4] = static_cast<int8_t>(weight_at(f, panel, k, r));
}

void tile(const LinearFormat& f, const int8_t* weights, const uint8_t* const* headers, int panels,
          const Activations& a, int64_t first, int64_t count, float* out, int64_t ld) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t n = 0; n < panels * kPanel; ++n) {
      const uint8_t* panel = headers[n / kPanel];
      const int8_t* w = weights + n / kPanel * f.padded() * kPanel;
      int64_t r = n % kPanel;
      float y = 0;
      for (int64_t span = 0; span < f.spans(); ++span) {
        int64_t sum = 0;
        for (int64_t k = span * f.span; k < std::min((span + 1) * f.span, f.padded()); ++k)
          sum += w[k / 4 * 64 + 4 * r + k % 4] * a.block(first + row, k / kBlock, f.blocks())[k % kBlock];
        int64_t index = (first + row) * f.spans() + span;
        sum -= int64_t{zero_at(f, panel, span, r)} * a.totals[index];
        float scale = reinterpret_cast<const float*>(panel)[span * kPanel + r];
        y = std::fma(static_cast<float>(static_cast<int32_t>(sum)), a.scales[index] * scale, y);
      }
      out[row * ld + n] = y;
    }
}

// The integer weight of a code in the group that `group` says; with 8 bits the code.
int weight_of(const LinearFormat& f, int code, int group) {
  return f.bits == 8 ? code : (group & 15) * (f.step() * code - (group >> 4));
}

void rows(const LinearFormat& f, const uint8_t* panel, const Activations& a, const uint32_t*, unsigned which,
          float* out) {
  for (int64_t r = 0; r < kPanel; ++r) {
    if (!(which >> r & 1)) continue;
    const float* scales = reinterpret_cast<const float*>(panel) + r * f.spans();
    const uint8_t* groups = row_at(f, panel, r);
    const uint8_t* codes = groups + row_codes(f);
    out[r] = 0;
    for (int64_t span = 0; span < f.spans(); ++span) {
      int64_t sum = 0;
      for (int64_t k = span * f.span; k < std::min((span + 1) * f.span, f.padded()); ++k) {
        // Input k is in word k / (32 / bits), whose byte k % 4 has one code of each of its quads
        const int64_t inputs = 32 / f.bits, byte = codes[k / inputs * 4 + k % 4];
        const auto code = static_cast<int>(byte >> (k % inputs / 4 * f.bits) & ((1 << f.bits) - 1));
        const int weight = weight_of(f, f.bits == 8 ? static_cast<int8_t>(code) : code, groups[k / f.group]);
        sum += weight * a.block(0, k / kBlock, f.blocks())[k % kBlock];
      }
      if (f.bits == 8) sum -= int64_t{static_cast<int8_t>(groups[span])} * a.totals[span];
      out[r] = std::fma(static_cast<float>(static_cast<int32_t>(sum)), a.scales[span] * scales[span], out[r]);
    }
  }
}

void columns(const LinearFormat& f, const uint8_t* matrix, const Activations& a, const int32_t* channels,
             int64_t active, int64_t line, int64_t count, int32_t*, float* out) {
  const GatheredDown layout(f);
  const int64_t per_line = line_outputs(f);
  for (int64_t i = 0; i < count * per_line; ++i) {
    const int64_t n = line * per_line + i;
    const uint8_t* of_line = matrix + layout.codes_at + n / per_line * kLine;
    auto scales = reinterpret_cast<const float*>(matrix);
    out[i] = 0;
    for (int64_t span = 0, at = 0; span < f.spans(); ++span) {
      int64_t sum = 0;
      for (; at < active && channels[at] < (span + 1) * f.span; ++at) {
        const int64_t k = channels[at];
        uint32_t word;
        std::memcpy(&word, of_line + k * layout.channel + n % kPanel * 4, 4);
        const auto code = static_cast<int>(word >> (n % per_line / kPanel * f.bits) & ((1u << f.bits) - 1));
        const int group = matrix[layout.groups_at + k / f.group * layout.outputs + n];
        const int weight = f.bits == 8 ? static_cast<int8_t>(code) - static_cast<int8_t>(group) : weight_of(f, code, group);
        sum += weight * a.block(0, k / kBlock, f.blocks())[k % kBlock];
      }
      out[i] = std::fma(static_cast<float>(static_cast<int32_t>(sum)), a.scales[span] * scales[span * layout.outputs + n], out[i]);
    }
  }
}

}  // namespace

void linear_rows(const LinearFormat& f, const uint8_t* weights, const int64_t* ids, int64_t count, float factor,
                 float* y) {
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* panel = weights + ids[i] / kPanel * f.panel_bytes();
    int64_t r = ids[i] % kPanel;
    auto scales = reinterpret_cast<const float*>(panel);
    for (int64_t k = 0; k < f.inputs; ++k) {
      int weight = weight_at(f, panel, k, r) - zero_at(f, panel, k / f.span, r);
      y[i * f.inputs + k] = scales[k / f.span * kPanel + r] * static_cast<float>(weight) * factor;
    }
    if (f.rotated) rotate_scalar(y + i * f.inputs, f.inputs);  // its own inverse
  }
}

const LinearPath& linear_scalar() {
  static const LinearPath path{"scalar", prepare, quantize, dot, expand, tile, finish_any, rows, columns};
  return path;
}

}  // namespace shoal
