// AVX-512 with VNNI: sixteen outputs a register, vpdpbusd with the weights as its unsigned side.
#include "linear.h"

#if defined(__AVX512VNNI__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "elementwise.inl"
#include "gathered.h"

namespace shoal {
namespace {

__mmask16 tail(int64_t left) { return static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1); }

__m512i bytes_of(const void* at) { return _mm512_loadu_si512(at); }

// Sixteen bytes, one for each output, as integers.
__m512i integers(const uint8_t* at) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))); }
__m512i signed_integers(const uint8_t* at) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

void quantize(const LinearFormat& f, const float* x, const Activations& to, int64_t row) {
  auto value = [&](int64_t k) { return _mm512_maskz_loadu_ps(tail(f.inputs - k), x + k); };
  int32_t* sums = to.sums + row * f.groups();
  int64_t group = 0, left = f.group;
  std::memset(sums, 0, static_cast<size_t>(f.groups()) * sizeof(int32_t));
  for (int64_t span = 0; span < f.spans(); ++span) {
    int64_t begin = span * f.span, end = std::min(begin + f.span, f.padded());
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = begin; k < end; k += 16)
      most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(value(k)), _mm512_set1_epi32(0x7fffffff)));
    uint32_t bits = _mm512_reduce_max_epu32(most);
    float amax;
    std::memcpy(&amax, &bits, 4);
    bool finite = bits < 0x7f800000;
    float inverse = finite && amax >= 1e-30f ? 127 / amax : 0;
    to.scales[row * f.spans() + span] = !finite ? std::nanf("") : inverse ? amax / 127 : 0;
    int32_t total = 0;
    const __m512 factor = _mm512_set1_ps(inverse);
    for (int64_t k = begin; k < end; k += kBlock) {
      __m512i codes = _mm512_setzero_si512();
      if (inverse) {
        auto part = [&](int64_t i) { return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(value(k + i), factor))); };
        const __m256i low = _mm256_set_m128i(part(16), part(0)), high = _mm256_set_m128i(part(48), part(32));
        codes = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      }
      _mm512_storeu_si512(const_cast<int8_t*>(to.block(row, k / kBlock, f.blocks())), codes);
      // Sums of four, then of the eight fours of each half block
      __m512i fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), codes);
      fours = _mm512_add_epi32(fours, _mm512_shuffle_epi32(fours, _MM_PERM_BADC));
      fours = _mm512_add_epi32(fours, _mm512_shuffle_epi32(fours, _MM_PERM_CDAB));
      fours = _mm512_add_epi32(fours, _mm512_shuffle_i64x2(fours, fours, 0xb1));
      const int32_t first = _mm_cvtsi128_si32(_mm512_castsi512_si128(fours));
      const int32_t second = _mm_cvtsi128_si32(_mm512_extracti32x4_epi32(fours, 2));
      for (const int32_t half : {first, second}) {
        sums[group] += half;
        left -= 32;
        if (!left) ++group, left = f.group;
      }
      total += first + second;
    }
    to.totals[row * f.spans() + span] = total;
  }
}

// Calls use(quad, codes) for the 8 quads of inputs of the half block that begins at input k: codes are bytes, 4 inputs
// of each of the 16 outputs; with 8 bits 128 too large.
template <int Bits, class Use>
void quads(const uint8_t* codes, int64_t k, Use&& use) {
  if constexpr (Bits == 8) {
    const uint8_t* at = codes + k * kPanel;
    for (int j = 0; j < 8; ++j) {
      use(j, _mm512_xor_si512(bytes_of(at + 64 * j), _mm512_set1_epi8(-128)));
    }
  } else if constexpr (Bits == 4) {
    const uint8_t* at = codes + k * kPanel / 2;
    const __m512i low = _mm512_set1_epi8(15);
    for (int j = 0; j < 4; ++j) {
      __m512i v = bytes_of(at + 64 * j);
      asm("" : "+v"(v));  // one load, not one for each nibble
      use(2 * j, _mm512_and_si512(v, low));
      use(2 * j + 1, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
    }
  } else {
    const uint8_t* block = codes + k / kBlock * (kBlock * kPanel * Bits / 8);
    const uint8_t* at = block + k % kBlock * kPanel / 4;
    const __m512i low = _mm512_set1_epi8(3), third = _mm512_set1_epi8(4);
    __m512i high = Bits == 3 ? bytes_of(block + 256 + k % kBlock * 2) : _mm512_setzero_si512();
    for (int j = 0; j < 8; ++j) {
      __m512i v = _mm512_and_si512(_mm512_srli_epi16(bytes_of(at + j / 4 * 64), static_cast<unsigned>(j % 4 * 2)), low);
      if constexpr (Bits == 3) {
        __m512i bit = j < 2 ? _mm512_slli_epi16(high, static_cast<unsigned>(2 - j))
                            : _mm512_srli_epi16(high, static_cast<unsigned>(j - 2));
        v = _mm512_or_si512(v, _mm512_and_si512(bit, third));
      }
      use(j, v);
    }
  }
}

template <int Bits, int Count>
void dot_rows(const LinearFormat& f, const uint8_t* panel, const Activations& a, int64_t first, float* out,
              int64_t ld) {
  const uint8_t* groups = panel + f.groups_at();
  const uint8_t* codes = panel + f.codes_at();
  const int64_t padded = f.padded(), spans = f.spans(), all_groups = f.groups(), blocks = f.blocks();
  // The codes are one stream then; beside a second one the processor's own prefetching halves
  for (const uint8_t* at = panel; at < codes; at += 64) _mm_prefetch(at, _MM_HINT_T0);
  const int8_t* rows[Count];
  for (int r = 0; r < Count; ++r) rows[r] = a.block(first + r, 0, blocks);
  const int64_t stride = a.tile * kBlock;
  __m512 y[Count];
  for (auto& lane : y) lane = _mm512_setzero_ps();
  for (int64_t span = 0, k = 0, group = 0; span < spans; ++span) {
    __m512i sums[Count];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t end = std::min(k + f.span, padded); k < end; ++group) {
      const int32_t* of_group = a.sums + first * all_groups + group;
      const __m512i both = Bits == 8 ? signed_integers(groups + group * kPanel) : integers(groups + group * kPanel);
      const __m512i zero = Bits == 8 ? _mm512_add_epi32(both, _mm512_set1_epi32(128)) : _mm512_srli_epi32(both, 4);
      __m512i even[Count], odd[Count];  // two chains, as one waits for the other
      for (int r = 0; r < Count; ++r) even[r] = odd[r] = _mm512_setzero_si512();
      for (int64_t stop = std::min(k + f.group, end); k < stop; k += 32) {
        const int64_t at = k / kBlock * stride + k % kBlock;
        quads<Bits>(codes, k, [&](int j, __m512i v) {
          for (int r = 0; r < Count; ++r) {
            int32_t quad;
            std::memcpy(&quad, rows[r] + at + 4 * j, 4);
            __m512i& sum = j % 2 ? odd[r] : even[r];
            sum = _mm512_dpbusd_epi32(sum, v, _mm512_set1_epi32(quad));
          }
        });
      }
      for (int r = 0; r < Count; ++r) {
        __m512i sum = _mm512_add_epi32(even[r], odd[r]);
        if constexpr (Bits < 4) sum = _mm512_add_epi32(sum, sum);
        sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, _mm512_set1_epi32(of_group[r * all_groups])));
        if constexpr (Bits < 8) sum = _mm512_mullo_epi32(sum, _mm512_and_si512(both, _mm512_set1_epi32(15)));
        sums[r] = _mm512_add_epi32(sums[r], sum);
      }
    }
    const __m512 scale = _mm512_loadu_ps(reinterpret_cast<const float*>(panel) + span * kPanel);
    for (int r = 0; r < Count; ++r) {
      __m512 factor = _mm512_mul_ps(_mm512_set1_ps(a.scales[(first + r) * spans + span]), scale);
      y[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), factor, y[r]);
    }
  }
  for (int r = 0; r < Count; ++r) _mm512_storeu_ps(out + r * ld, y[r]);
}

// The weights as unsigned bytes, 128 too large: `tile` begins its sums at -128 times the activations' total.
template <int Bits>
void expand_bits(const LinearFormat& f, const uint8_t* panel, int8_t* to) {
  const uint8_t* groups = panel + f.groups_at();
  const uint8_t* codes = panel + f.codes_at();
  for (int64_t k = 0; k < f.padded(); k += 32) {
    __m512i offsets{}, multipliers{};
    if constexpr (Bits < 8) {
      const __m512i both = integers(groups + k / f.group * kPanel);
      const __m512i multiplier = _mm512_and_si512(both, _mm512_set1_epi32(15));
      const __m512i zero = _mm512_mullo_epi32(multiplier, _mm512_srli_epi32(both, 4));
      const __m512i offset = _mm512_and_si512(_mm512_sub_epi32(zero, _mm512_set1_epi32(128)), _mm512_set1_epi32(255));
      multipliers = _mm512_mullo_epi32(multiplier, _mm512_set1_epi32(0x00010001));
      offsets = _mm512_mullo_epi32(offset, _mm512_set1_epi32(0x01010101));
    }
    quads<Bits>(codes, k, [&](int j, __m512i v) {
      if constexpr (Bits < 8) {
        if constexpr (Bits < 4) v = _mm512_add_epi8(v, v);
        // Two bytes at once: a code times its multiplier is at most 15 * 15, which carries nothing
        v = _mm512_sub_epi8(_mm512_mullo_epi16(v, multipliers), offsets);
      }
      _mm512_store_si512(to + k * kPanel + 64 * j, v);
    });
  }
}

template <int Rows, int Panels>
void tile_rows(const LinearFormat& f, const int8_t* weights, const uint8_t* const* headers, const Activations& a,
               int64_t first, float* out, int64_t ld) {
  const int64_t blocks = f.blocks(), spans = f.spans(), span_blocks = f.span / kBlock;
  const int8_t* rows = a.block(first, 0, blocks);  // all in one tile of the activations
  for (int64_t span = 0, block = 0; span < spans; ++span) {
    __m512i sums[Rows][Panels];
    for (int r = 0; r < Rows; ++r)
      for (int p = 0; p < Panels; ++p)
        sums[r][p] = _mm512_set1_epi32(-128 * a.totals[(first + r) * spans + span]);
    for (int64_t end = std::min(block + span_blocks, blocks); block < end; ++block) {
      const int8_t* w = weights + block * kBlock * kPanel;
      const int8_t* x = rows + block * kTile * kBlock;
      for (int j = 0; j < kBlock / 4; ++j) {
        __m512i v[Panels];
        for (int p = 0; p < Panels; ++p) v[p] = _mm512_load_si512(w + p * blocks * kBlock * kPanel + 64 * j);
        for (int r = 0; r < Rows; ++r) {
          int32_t quad;
          std::memcpy(&quad, x + r * kBlock + 4 * j, 4);
          const __m512i q = _mm512_set1_epi32(quad);
          for (int p = 0; p < Panels; ++p) sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], v[p], q);
        }
      }
    }
    for (int p = 0; p < Panels; ++p) {
      const __m512 scale = _mm512_loadu_ps(reinterpret_cast<const float*>(headers[p]) + span * kPanel);
      const __m512i zero = f.bits == 8 ? signed_integers(headers[p] + f.groups_at() + span * kPanel) : __m512i{};
      for (int r = 0; r < Rows; ++r) {
        const int64_t index = (first + r) * spans + span;
        __m512i sum = sums[r][p];
        if (f.bits == 8) sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, _mm512_set1_epi32(a.totals[index])));
        float* at = out + r * ld + p * kPanel;
        const __m512 y = span ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
        const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(a.scales[index]), scale);
        _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, y));
      }
    }
  }
}

template <int Panels>
void tile_any(const LinearFormat& f, const int8_t* weights, const uint8_t* const* headers, const Activations& a,
              int64_t first, int64_t count, float* out, int64_t ld) {
  for (int64_t row = 0; row < count; row += 8) {
    float* to = out + row * ld;
    switch (count - row) {
      case 1: tile_rows<1, Panels>(f, weights, headers, a, first + row, to, ld); break;
      case 2: tile_rows<2, Panels>(f, weights, headers, a, first + row, to, ld); break;
      case 3: tile_rows<3, Panels>(f, weights, headers, a, first + row, to, ld); break;
      case 4: tile_rows<4, Panels>(f, weights, headers, a, first + row, to, ld); break;
      case 5: tile_rows<5, Panels>(f, weights, headers, a, first + row, to, ld); break;
      case 6: tile_rows<6, Panels>(f, weights, headers, a, first + row, to, ld); break;
      case 7: tile_rows<7, Panels>(f, weights, headers, a, first + row, to, ld); break;
      default: tile_rows<8, Panels>(f, weights, headers, a, first + row, to, ld);
    }
  }
}

void tile(const LinearFormat& f, const int8_t* weights, const uint8_t* const* headers, int panels,
          const Activations& a, int64_t first, int64_t count, float* out, int64_t ld) {
  (panels == 1 ? tile_any<1> : tile_any<2>)(f, weights, headers, a, first, count, out, ld);
}

#include "linear_dispatch.inl"

// Of gathered.inl. Half a block of 4 bits is eight words: shorter vectors are as good for a row
constexpr int kWords = 8, kWide = 16, kBias = 128;
typedef uint32_t Words __attribute__((vector_size(4 * kWords), may_alias));
typedef uint32_t Wide __attribute__((vector_size(4 * kWide), may_alias));

template <int Bits>
Words add_quads(Words sum, Words codes, Words x) {
  if constexpr (Bits == 8) codes ^= 0x80808080u;
  return (Words)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
}

template <int Bits>
Wide add_quads(Wide sum, Wide codes, Wide x) {
  if constexpr (Bits == 8) codes ^= 0x80808080u;
  return (Wide)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
}

template <int Bits>
Wide group_of(const uint8_t* at) {
  return (Wide)(Bits == 8 ? signed_integers(at) : integers(at));
}

#include "gathered.inl"

}  // namespace

const LinearPath* linear_avx512() {
  static const LinearPath path{"avx512", prepare_any, quantize, dot, expand, tile, finish_any, rows, columns};
  return &path;
}

}  // namespace shoal

#else
const shoal::LinearPath* shoal::linear_avx512() { return nullptr; }
#endif
