// The reference: what every other path must compute, bit by bit, and what runs where there is none.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "stack_path.h"

namespace shoal {
namespace {

float widen(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest < 0x400) {  // a multiple of 2^-24
    const float value = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (rest + (rest < 0x7c00 ? 112u << 10 : 224u << 10)) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

const uint16_t* halves(const uint8_t* at) { return reinterpret_cast<const uint16_t*>(at); }

bool positive(const uint8_t* panel, int64_t k, int64_t r) {
  return panel[k / 32 * 64 + 4 * r + k % 4] >> (k / 4 % 8) & 1;
}

// The size of a block's weight at output n, input k.
float size_at(const StackFormat& f, const uint8_t* payload, int64_t n, int64_t k) {
  const uint16_t *v = halves(payload), *u = halves(payload + f.u_at());
  float size = widen(u[n]) * widen(v[k]);
  for (int64_t r = 1; r < f.rank; ++r)
    size = std::fma(widen(u[r * f.panels() * kPanel + n]), widen(v[r * f.padded() + k]), size);
  return size;
}

// All blocks on top of `weight`.
float add_blocks(const StackFormat& f, const StackWeights& w, int64_t n, int64_t k, float weight) {
  for (int block = 0; block < w.count; ++block) {
    const float size = size_at(f, w.blocks[block], n, k);
    const uint8_t* signs = w.blocks[block] + f.signs_at() + n / kPanel * f.panel_bytes();
    weight += positive(signs, k, n % kPanel) ? size : -size;
  }
  return weight;
}

void weigh(const uint16_t* v, const float* x, int64_t count, float* z) {
  for (int64_t k = 0; k < count; ++k) z[k] = widen(v[k]) * x[k];
}

void add(const StackFormat& f, const uint8_t* payload, int64_t panel, int64_t panels, const StackRows& a, float* y,
         int64_t ld) {
  const uint16_t* u = halves(payload + f.u_at());
  for (int64_t p = panel; p < panel + panels; ++p)
    for (int64_t row = 0; row < a.rows; ++row)
      for (int64_t r = 0; r < kPanel; ++r) {
        float& sum = y[row * ld + (p - panel) * kPanel + r];
        for (int64_t rank = 0; rank < f.rank; ++rank) {
          const int64_t at = row * f.rank + rank;
          int32_t s = 0;
          for (int64_t k = 0; k < f.padded(); ++k)
            if (positive(payload + f.signs_at() + p * f.panel_bytes(), k, r)) s += a.codes[at * f.padded() + k];
          const float scale = a.scales[at] * widen(u[rank * f.panels() * kPanel + p * kPanel + r]);
          sum = std::fma(static_cast<float>(2 * s - a.totals[at]), scale, sum);
        }
      }
}

// The base's weights of one panel, float [inputs][16].
float base_at(const LinearFormat& f, const uint8_t* panel, const int8_t* expanded, int64_t k, int64_t r) {
  const int64_t span = k / f.span * kPanel + r;
  const int zero = f.bits == 8 ? static_cast<int8_t>(panel[f.groups_at() + span]) : 0;
  return reinterpret_cast<const float*>(panel)[span] * static_cast<float>(expanded[k / 4 * 64 + 4 * r + k % 4] - zero);
}

void rebuild(const StackFormat& f, const StackWeights& w, int64_t panel, int8_t* room, uint8_t* to) {
  const LinearFormat rebuilt = f.rebuilt();
  const uint8_t* base = w.base ? w.base + panel * w.base_format->panel_bytes() : nullptr;
  if (base) linear_scalar().expand(*w.base_format, base, room);
  std::memset(to + rebuilt.groups_at(), 0, static_cast<size_t>(rebuilt.codes_at() - rebuilt.groups_at()));
  for (int64_t r = 0; r < kPanel; ++r)
    for (int64_t span = 0; span < rebuilt.spans(); ++span) {
      const int64_t begin = span * rebuilt.span, end = std::min(begin + rebuilt.span, f.padded());
      float weights[kStackSpan] = {};
      uint32_t most = 0;  // of the magnitudes' bits, in which what is not finite comes last
      for (int64_t k = begin; k < std::min(end, f.inputs); ++k) {
        const float from = base ? base_at(*w.base_format, base, room, k, r) : 0;
        const float weight = weights[k - begin] = add_blocks(f, w, panel * kPanel + r, k, from);
        uint32_t bits;
        std::memcpy(&bits, &weight, 4);
        most = std::max(most, bits & 0x7fffffff);
      }
      float amax;
      std::memcpy(&amax, &most, 4);
      const bool finite = most < 0x7f800000;
      const float inverse = finite && amax >= 1e-30f ? 127 / amax : 0;
      const float scale = !finite ? std::nanf("") : inverse ? amax / 127 : 0;
      std::memcpy(to + (span * kPanel + r) * 4, &scale, 4);
      for (int64_t k = begin; k < end; ++k) {
        const float code = inverse ? std::nearbyint(weights[k - begin] * inverse) : 0;
        to[rebuilt.codes_at() + k / 4 * 64 + 4 * r + k % 4] = static_cast<uint8_t>(static_cast<int8_t>(code));
      }
    }
}

}  // namespace

void stack_rows(const StackFormat& f, const StackWeights& w, const int64_t* ids, int64_t count, float factor,
                float* y) {
  const LinearFormat turn{f.inputs, f.outputs, 8, f.padded(), f.padded(), f.rotated};
  for (int64_t i = 0; i < count; ++i, y += f.inputs) {
    if (w.base) {
      LinearFormat base = *w.base_format;
      base.rotated = false;  // not yet
      linear_rows(base, w.base, ids + i, 1, 1, y);
    }
    for (int64_t k = 0; k < f.inputs; ++k) y[k] = add_blocks(f, w, ids[i], k, w.base ? y[k] : 0);
    if (f.rotated) linear_scalar().prepare(turn, y, nullptr, 0, y);  // its own inverse
    for (int64_t k = 0; k < f.inputs; ++k) y[k] *= factor;
  }
}

const StackPath& stack_scalar() {
  static const StackPath path{"scalar", weigh, add, rebuild};
  return path;
}

}  // namespace shoal
