// AVX2: eight outputs a register, vpmaddubsw with the codes as its unsigned side.
//
// Codes of up to 4 bits are at most 15, so products of the 8 quads of 32 inputs add up in int16; a group's multiplier
// comes with the vpmaddwd that widens them, its zero once a group by way of the activations' sums. `tile` does so too,
// as that is half the work of int8 weights: what `expand` gives it are step * code. Codes of 8 bits, 128 added, are two
// planes of 4 bits: that is less than what it takes to multiply signed bytes.
#include "linear.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "elementwise.inl"
#include "gathered.h"

namespace shoal {
namespace {

constexpr int kHalf = 32;  // inputs of half a block: a group is whole halves
constexpr int kStep = 4;   // rows of `tile` at once

__m256i bytes_of(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

__m256i quad_of(const int8_t* at) {
  int32_t quad;
  std::memcpy(&quad, at, 4);
  return _mm256_set1_epi32(quad);
}

// Shifted right, or left; bits cross bytes.
__m256i right(__m256i v, int bits) { return bits < 0 ? _mm256_slli_epi16(v, -bits) : _mm256_srli_epi16(v, bits); }

int32_t total(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

// Eight floats of x from k on, 0 beyond its end.
__m256 floats(const float* x, int64_t k, int64_t inputs) {
  if (k + 8 <= inputs) return _mm256_loadu_ps(x + k);
  const __m256i left = _mm256_set1_epi32(static_cast<int>(inputs - k));
  return _mm256_maskload_ps(x + k, _mm256_cmpgt_epi32(left, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}

void quantize(const LinearFormat& f, const float* x, const Activations& to, int64_t row) {
  const int64_t inputs = f.inputs, padded = f.padded(), spans = f.spans(), stride = to.tile * kBlock;
  int8_t* codes = const_cast<int8_t*>(to.block(row, 0, f.blocks()));
  int32_t* sums = to.sums + row * f.groups();
  for (int64_t span = 0, k = 0; span < spans; ++span) {
    const int64_t end = std::min(k + f.span, padded);
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = k; i < end; i += 8)
      most = _mm256_max_epi32(
          most, _mm256_and_si256(_mm256_castps_si256(floats(x, i, inputs)), _mm256_set1_epi32(0x7fffffff)));
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
    const int32_t bits = *std::max_element(lanes, lanes + 8);
    float amax;
    std::memcpy(&amax, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const float inverse = finite && amax >= 1e-30f ? 127 / amax : 0;
    to.scales[row * spans + span] = !finite ? std::nanf("") : inverse ? amax / 127 : 0;
    int32_t of_span = 0;
    while (k < end) {
      int32_t of_group = 0;
      for (const int64_t stop = std::min(k + f.group, end); k < stop; k += kHalf) {
        __m256i v[4];
        for (int i = 0; i < 4; ++i)
          v[i] = inverse ? _mm256_cvtps_epi32(_mm256_mul_ps(floats(x, k + 8 * i, inputs), _mm256_set1_ps(inverse)))
                         : _mm256_setzero_si256();
        of_group += total(_mm256_add_epi32(_mm256_add_epi32(v[0], v[1]), _mm256_add_epi32(v[2], v[3])));
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        _mm256_store_si256(reinterpret_cast<__m256i*>(codes + k / kBlock * stride + k % kBlock),
                           _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
      }
      *sums++ = of_group;
      of_span += of_group;
    }
    to.totals[row * spans + span] = of_span;
  }
}

// Half a block's codes. quad(j, side): step * code of inputs 4j .. 4j + 3 for the outputs from 8 * side on; with 8 bits
// 128 more. They are read in order and not prefetched: what the processor does by itself is a third faster (Zen 4).
template <int Bits>
struct Half {
  const uint8_t* at;
  const uint8_t* third;  // bits, of 3

  Half(const uint8_t* codes, int64_t k) {
    const uint8_t* block = codes + k / kBlock * (kBlock * kPanel * Bits / 8);
    at = block + k % kBlock * kPanel * (Bits == 3 ? 2 : Bits) / 8;
    third = block + kBlock * kPanel / 4 + k % kBlock * kPanel / 8;
  }

  __m256i quad(int j, int side) const {
    if constexpr (Bits == 8) return _mm256_xor_si256(bytes_of(at + 64 * j + 32 * side), _mm256_set1_epi8(-128));
    if constexpr (Bits == 4) {
      return _mm256_and_si256(right(bytes_of(at + j / 2 * 64 + 32 * side), j % 2 * 4), _mm256_set1_epi8(15));
    }
    const __m256i low = right(bytes_of(at + j / 4 * 64 + 32 * side), j % 4 * 2 - 1);
    if constexpr (Bits == 2) return _mm256_and_si256(low, _mm256_set1_epi8(6));
    const __m256i high = right(bytes_of(third + 32 * side), j - 3);
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(6)), _mm256_and_si256(high, _mm256_set1_epi8(8)));
  }
};

// Plane 0 or 1 of the codes of a quad: below 16, whether there are one or two.
template <int Planes>
__m256i plane_of(__m256i quad, int plane) {
  return Planes == 1 ? quad : _mm256_and_si256(right(quad, 4 * plane), _mm256_set1_epi8(15));
}

// Adds the products of a quad, two by two; eight times at most 2 * 15 * 127 fit int16.
__m256i add_quad(__m256i sum, __m256i w, __m256i x) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
  asm("" : "+x"(sum));  // in this order: g++ would add up a tree, for which there are not enough registers
  return sum;
}

// What a group's outputs have in common.
template <int Planes>
struct Group {
  __m256i multiplier[2];  // each twice, as int16: for the two sums of two that make an output's quad
  __m256i zero[2];        // times the multiplier

  explicit Group(const uint8_t* at) {
    for (int side = 0; side < 2; ++side) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8 * side));
      if constexpr (Planes == 2) {
        multiplier[side] = _mm256_set1_epi16(1);
        zero[side] = _mm256_add_epi32(_mm256_cvtepi8_epi32(bytes), _mm256_set1_epi32(128));
      } else {
        const __m256i both = _mm256_cvtepu8_epi32(bytes), once = _mm256_and_si256(both, _mm256_set1_epi32(15));
        multiplier[side] = _mm256_or_si256(once, _mm256_slli_epi32(once, 16));
        zero[side] = _mm256_mullo_epi16(_mm256_srli_epi32(both, 4), once);
      }
    }
  }

  // Adds what eight quads of a plane came to.
  __m256i add(__m256i sum, __m256i quads, int side, int plane) const {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(quads, plane ? _mm256_set1_epi16(16) : multiplier[side]));
  }

  // Takes off the zeros' part, for activations that add up to `total`.
  __m256i finish(__m256i sum, int side, int32_t total) const {
    return _mm256_sub_epi32(sum, _mm256_mullo_epi32(zero[side], _mm256_set1_epi32(total)));
  }
};

// y + scale * sum: the end of a span.
__m256 scaled(__m256i sum, float activation_scale, const float* weight_scale, __m256 y) {
  const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(activation_scale), _mm256_loadu_ps(weight_scale));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, y);
}

template <int Bits, int Rows>
void dot_rows(const LinearFormat& f, const uint8_t* panel, const Activations& a, int64_t first, float* out,
              int64_t ld) {
  constexpr int kPlanes = Bits == 8 ? 2 : 1;
  const uint8_t* codes = panel + f.codes_at();
  // The codes are one stream then; beside a second one the processor's own prefetching halves
  for (const uint8_t* at = panel; at < codes; at += 64) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
  const int64_t padded = f.padded(), spans = f.spans(), groups = f.groups(), stride = a.tile * kBlock;
  const int8_t* rows[Rows];
  for (int r = 0; r < Rows; ++r) rows[r] = a.block(first + r, 0, f.blocks());
  __m256 y[Rows][2] = {};
  for (int64_t span = 0, index = 0, k = 0; span < spans; ++span) {
    __m256i sums[Rows][2] = {};
    for (const int64_t end = std::min(k + f.span, padded); k < end; ++index) {
      const Group<kPlanes> group(panel + f.groups_at() + index * kPanel);
      for (const int64_t stop = std::min(k + f.group, end); k < stop; k += kHalf) {
        const Half<Bits> half(codes, k);
        const int64_t at = k / kBlock * stride + k % kBlock;
        __m256i quads[Rows][2][kPlanes] = {};
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
          for (int side = 0; side < 2; ++side) {
            const __m256i w = half.quad(j, side);
            for (int r = 0; r < Rows; ++r)
              for (int plane = 0; plane < kPlanes; ++plane) {
                __m256i& sum = quads[r][side][plane];
                sum = add_quad(sum, plane_of<kPlanes>(w, plane), quad_of(rows[r] + at + 4 * j));
              }
          }
        for (int r = 0; r < Rows; ++r)
          for (int side = 0; side < 2; ++side)
            for (int plane = 0; plane < kPlanes; ++plane)
              sums[r][side] = group.add(sums[r][side], quads[r][side][plane], side, plane);
      }
      for (int r = 0; r < Rows; ++r)
        for (int side = 0; side < 2; ++side)
          sums[r][side] = group.finish(sums[r][side], side, a.sums[(first + r) * groups + index]);
    }
    const float* scale = reinterpret_cast<const float*>(panel) + span * kPanel;
    for (int r = 0; r < Rows; ++r)
      for (int side = 0; side < 2; ++side)
        y[r][side] = scaled(sums[r][side], a.scales[(first + r) * spans + span], scale + 8 * side, y[r][side]);
  }
  for (int r = 0; r < Rows; ++r)
    for (int side = 0; side < 2; ++side) _mm256_storeu_ps(out + r * ld + 8 * side, y[r][side]);
}

template <int Bits>
void expand_bits(const LinearFormat& f, const uint8_t* panel, int8_t* to) {
  const uint8_t* codes = panel + f.codes_at();
  for (int64_t k = 0, padded = f.padded(); k < padded; k += kHalf, to += kHalf * kPanel) {
    const Half<Bits> half(codes, k);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
      for (int side = 0; side < 2; ++side)
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64 * j + 32 * side), half.quad(j, side));
  }
}

// Adds the products of a plane of half a block to the sums of four rows, which lie together in a tile; with totals also
// takes off the zeros. Its own function, as then eight sums and two weights stay in registers.
template <int Planes, int Plane>
__attribute__((noinline)) void add_rows(const int8_t* w, const int8_t* rows, const Group<Planes>& group,
                                        const int32_t* totals, __m256i (*sums)[2]) {
  __m256i quads[kStep][2] = {};
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const __m256i low = plane_of<Planes>(bytes_of(w + 64 * j), Plane);
    const __m256i high = plane_of<Planes>(bytes_of(w + 64 * j + 32), Plane);
#pragma GCC unroll 4
    for (int r = 0; r < kStep; ++r) {
      const __m256i x = quad_of(rows + r * kBlock + 4 * j);
      quads[r][0] = add_quad(quads[r][0], low, x);
      quads[r][1] = add_quad(quads[r][1], high, x);
    }
  }
  for (int r = 0; r < kStep; ++r)
    for (int side = 0; side < 2; ++side) {
      const __m256i sum = group.add(sums[r][side], quads[r][side], side, Plane);
      sums[r][side] = totals ? group.finish(sum, side, totals[r]) : sum;
    }
}

template <int Planes>
void tile_rows(const LinearFormat& f, const int8_t* weights, const uint8_t* const* headers, int panels,
               const Activations& a, int64_t first, int64_t count, float* out, int64_t ld) {
  const int64_t padded = f.padded(), spans = f.spans(), groups = f.groups(), tile_bytes = padded * kTile;
  const int8_t* rows = a.block(first, 0, f.blocks());
  __m256i sums[kPair][kRows][2];
  int32_t totals[kRows] = {};
  for (int64_t span = 0, index = 0, k = 0; span < spans; ++span) {
    std::memset(sums, 0, sizeof sums);
    for (const int64_t end = std::min(k + f.span, padded); k < end; ++index) {
      const Group<Planes> group[kPair] = {Group<Planes>(headers[0] + f.groups_at() + index * kPanel),
                                          Group<Planes>(headers[panels - 1] + f.groups_at() + index * kPanel)};
      for (int64_t r = 0; r < count; ++r) totals[r] = a.sums[(first + r) * groups + index];
      for (const int64_t stop = std::min(k + f.group, end); k < stop; k += kHalf)
        for (int p = 0; p < panels; ++p) {
          const int8_t* w = weights + (p * padded + k) * kPanel;
          const int8_t* x = rows + k / kBlock * kTile * kBlock + k % kBlock;
          for (int64_t r = 0; r < count; r += kStep) {  // rows beyond the last come to nothing
            const int8_t* four = x + r / kTile * tile_bytes + r % kTile * kBlock;
            if constexpr (Planes == 2) add_rows<2, 1>(w, four, group[p], nullptr, sums[p] + r);
            add_rows<Planes, 0>(w, four, group[p], k + kHalf < stop ? nullptr : totals + r, sums[p] + r);
          }
        }
    }
    for (int p = 0; p < panels; ++p)
      for (int64_t r = 0; r < count; ++r)
        for (int side = 0; side < 2; ++side) {
          float* y = out + r * ld + p * kPanel + 8 * side;
          const float* scale = reinterpret_cast<const float*>(headers[p]) + span * kPanel + 8 * side;
          const __m256 before = span ? _mm256_loadu_ps(y) : _mm256_setzero_ps();
          _mm256_storeu_ps(y, scaled(sums[p][r][side], a.scales[(first + r) * spans + span], scale, before));
        }
  }
}

void tile(const LinearFormat& f, const int8_t* weights, const uint8_t* const* headers, int panels,
          const Activations& a, int64_t first, int64_t count, float* out, int64_t ld) {
  (f.bits == 8 ? tile_rows<2> : tile_rows<1>)(f, weights, headers, panels, a, first, count, out, ld);
}

#include "linear_dispatch.inl"

constexpr int kWords = 8, kBias = 128;  // of gathered.inl
typedef uint32_t Words __attribute__((vector_size(4 * kWords), may_alias));
typedef Words Wide;
constexpr int kWide = kWords;

template <int Bits>
Words add_quads(Words sum, Words codes, Words x) {
  auto add = [&](Words some, int factor) {
    const __m256i twos = _mm256_maddubs_epi16((__m256i)some, (__m256i)x);
    sum += (Words)_mm256_madd_epi16(twos, _mm256_set1_epi16(static_cast<int16_t>(factor)));
  };
  if constexpr (Bits == 8) {
    codes ^= 0x80808080u;
    add(codes >> 4u & 0x0f0f0f0fu, 16);
    codes &= 0x0f0f0f0fu;
  }
  add(codes, 1);
  return sum;
}

template <int Bits>
Wide group_of(const uint8_t* at) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
  return (Wide)(Bits == 8 ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
}

#include "gathered.inl"

}  // namespace

const LinearPath* linear_avx2() {
  static const LinearPath path{"avx2", prepare_any, quantize, dot, expand, tile, finish_any, rows, columns};
  return &path;
}

}  // namespace shoal

#else
const shoal::LinearPath* shoal::linear_avx2() { return nullptr; }
#endif
