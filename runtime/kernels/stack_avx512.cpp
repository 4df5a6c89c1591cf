// AVX-512 with VNNI: signs are bits 1 << b of the weights' bytes, so that vpdpbusd sums 1 << b times what is wanted.
// Looking four signs up at a time, as stack_avx2.cpp does, is no faster here where signs come from memory.
#include "stack_path.h"

#if defined(__AVX512VNNI__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace shoal {
namespace {

__m512 widened(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

void weigh(const uint16_t* v, const float* x, int64_t count, float* z) {
  for (int64_t k = 0; k < count; k += 16) {  // v is padded, x and z may end
    const auto there = static_cast<__mmask16>(count - k >= 16 ? 0xffff : (1 << (count - k)) - 1);
    const __m512 factor = widened(reinterpret_cast<const uint8_t*>(v + k));
    _mm512_mask_storeu_ps(z + k, there, _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(there, x + k)));
  }
}

// out[r] = sums of row r of the codes where the signs of a panel are positive. Each of the kBits bits that are looked
// at has sums of its own, which are 1 << b times too large; the others are shifted there first. With the most inputs
// that a format may have they still fit: (1 << 20) / 4 * 127 << 3.
template <int Rows>
void sums_of(const uint8_t* signs, int64_t vectors, const int8_t* codes, int64_t ld, __m512i* out) {
  constexpr int kBits = Rows <= 2 ? 4 : 2;  // chains enough that no sum is waited for, and few enough for the registers
  __m512i sums[Rows][kBits];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_si512();
  for (int64_t h = 0; h < vectors; ++h) {
    __m512i v = _mm512_loadu_si512(signs + h * 64);
    asm("" : "+v"(v));  // one load, not one for each bit
#pragma GCC unroll 4
    for (int shift = 0; shift < 8; shift += kBits) {
      if (shift) v = _mm512_srli_epi16(v, kBits);
#pragma GCC unroll 4
      for (int b = 0; b < kBits; ++b) {
        const __m512i bits = _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(1 << b)));
        for (int r = 0; r < Rows; ++r) {
          int32_t quad;
          std::memcpy(&quad, codes + r * ld + h * 32 + (shift + b) * 4, 4);
          sums[r][b] = _mm512_dpbusd_epi32(sums[r][b], bits, _mm512_set1_epi32(quad));
        }
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    out[r] = sums[r][0];
    for (unsigned b = 1; b < kBits; ++b) out[r] = _mm512_add_epi32(out[r], _mm512_srai_epi32(sums[r][b], b));
  }
}

void sums_any(int64_t rows, const uint8_t* signs, int64_t vectors, const int8_t* codes, int64_t ld, __m512i* out) {
  switch (rows) {
    case 1: return sums_of<1>(signs, vectors, codes, ld, out);
    case 2: return sums_of<2>(signs, vectors, codes, ld, out);
    case 3: return sums_of<3>(signs, vectors, codes, ld, out);
    case 4: return sums_of<4>(signs, vectors, codes, ld, out);
    case 5: return sums_of<5>(signs, vectors, codes, ld, out);
    default: return sums_of<6>(signs, vectors, codes, ld, out);
  }
}

void add(const StackFormat& f, const uint8_t* payload, int64_t panel, int64_t panels, const StackRows& a, float* y,
         int64_t ld) {
  constexpr int64_t kMost = 6;  // rows of codes at a time
  const int64_t padded = f.padded(), all = f.panels() * kPanel, rank = f.rank;
  const uint8_t* signs = payload + f.signs_at() + panel * f.panel_bytes();
  const uint8_t* u = payload + f.u_at() + panel * kPanel * 2;
  for (int64_t p = 0; p < panels; ++p, signs += f.panel_bytes(), u += kPanel * 2)
    for (int64_t first = 0; first < a.rows * rank; first += kMost) {
      const int64_t count = std::min(kMost, a.rows * rank - first);
      __m512i sums[kMost];
      sums_any(count, signs, padded / 32, a.codes + first * padded, padded, sums);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = first + i;
        float* to = y + at / rank * ld + p * kPanel;
        const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(a.scales[at]), widened(u + at % rank * all * 2));
        const __m512i sum = _mm512_sub_epi32(_mm512_slli_epi32(sums[i], 1), _mm512_set1_epi32(a.totals[at]));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, _mm512_loadu_ps(to)));
      }
    }
}

// A panel's weights of one span: a vector of its outputs for each input.
using Span = __m512[kStackSpan];

// Sets inputs begin .. end of a panel of the base, expanded.
void set_base(const LinearFormat& f, const uint8_t* panel, const int8_t* expanded, int64_t begin, int64_t end,
              Span& w) {
  for (int64_t k = begin; k < end; k += kBlock) {  // a span is whole blocks
    const int64_t span = k / f.span * kPanel;
    const __m512 scale = _mm512_loadu_ps(panel + span * 4);
    const __m128i offset = _mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + f.groups_at() + span));
    const __m512i zero = f.bits == 8 ? _mm512_cvtepi8_epi32(offset) : _mm512_setzero_si512();
    for (int64_t j = k; j < k + kBlock; j += 4) {
      // Unsigned and 128 too large, as expand leaves them; the uppermost byte is the first to be taken
      __m512i quad = _mm512_xor_si512(_mm512_load_si512(expanded + j * kPanel), _mm512_set1_epi8(-128));
      for (int64_t i = 3; i >= 0; --i, quad = _mm512_slli_epi32(quad, 8)) {
        const __m512i integer = _mm512_sub_epi32(_mm512_srai_epi32(quad, 24), zero);
        w[j - begin + i] = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(integer));
      }
    }
  }
}

// Adds inputs begin .. end of a block. Bit 8i + b of the 16 integers of a vector of signs is that of input 4b + i.
template <int Rank>
void add_block(const StackFormat& f, const uint8_t* payload, int64_t panel, int64_t begin, int64_t end, Span& w) {
  const int64_t rank = Rank ? Rank : f.rank, all = f.panels() * kPanel;
  const uint8_t* signs = payload + f.signs_at() + panel * f.panel_bytes();
  alignas(64) float v[Rank ? Rank : kStackRanks][kStackSpan];
  __m512 u[Rank ? Rank : kStackRanks];
  for (int64_t r = 0; r < rank; ++r) {
    u[r] = widened(payload + f.u_at() + (r * all + panel * kPanel) * 2);
    for (int64_t k = begin; k < end; k += 16)
      _mm512_store_ps(v[r] + k - begin, widened(payload + (r * f.padded() + k) * 2));
  }
  for (int64_t k = begin; k < end; k += 32) {
    const __m512i negative = _mm512_xor_si512(_mm512_loadu_si512(signs + k * 2), _mm512_set1_epi32(-1));
#pragma GCC unroll 32
    for (int at = 0; at < 32; ++at) {
      const int64_t to = k - begin + at;
      __m512 size = _mm512_mul_ps(u[0], _mm512_set1_ps(v[0][to]));
      for (int64_t r = 1; r < rank; ++r) size = _mm512_fmadd_ps(u[r], _mm512_set1_ps(v[r][to]), size);
      const __m512i sign = _mm512_slli_epi32(negative, static_cast<unsigned>(31 - at % 4 * 8 - at / 4));
      const __m512i change =  // size ^ (sign & the uppermost bit)
          _mm512_ternarylogic_epi32(_mm512_castps_si512(size), sign, _mm512_set1_epi32(INT32_MIN), 0x78);
      w[to] = _mm512_add_ps(w[to], _mm512_castsi512_ps(change));
    }
  }
}

void add_any(const StackFormat& f, const uint8_t* payload, int64_t panel, int64_t begin, int64_t end, Span& w) {
  switch (f.rank) {
    case 1: return add_block<1>(f, payload, panel, begin, end, w);
    case 2: return add_block<2>(f, payload, panel, begin, end, w);
    case 3: return add_block<3>(f, payload, panel, begin, end, w);
    case 4: return add_block<4>(f, payload, panel, begin, end, w);
    default: return add_block<0>(f, payload, panel, begin, end, w);
  }
}

void quantize_span(const Span& w, int64_t count, uint8_t* scales, uint8_t* codes) {
  __m512i most = _mm512_setzero_si512();  // of the magnitudes' bits, in which what is not finite comes last
  for (int64_t k = 0; k < count; ++k)
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(w[k]), _mm512_set1_epi32(0x7fffffff)));
  const __m512 amax = _mm512_castsi512_ps(most), full = _mm512_set1_ps(127);
  const __mmask16 finite = _mm512_cmplt_epu32_mask(most, _mm512_set1_epi32(0x7f800000));
  const __mmask16 counts = _mm512_mask_cmp_ps_mask(finite, amax, _mm512_set1_ps(1e-30f), _CMP_GE_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(counts, full, amax), scale = _mm512_maskz_div_ps(counts, amax, full);
  _mm512_storeu_ps(scales, _mm512_mask_mov_ps(_mm512_set1_ps(std::nanf("")), finite, scale));
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t k = 0; k < count; k += 4) {
    auto code = [&](int64_t i) { return _mm512_cvtps_epi32(_mm512_maskz_mul_ps(counts, w[k + i], inverse)); };
    const __m512i all = _mm512_packs_epi16(_mm512_packs_epi32(code(0), code(1)), _mm512_packs_epi32(code(2), code(3)));
    _mm512_storeu_si512(codes + k * kPanel, _mm512_shuffle_epi8(all, turn));
  }
}

void rebuild(const StackFormat& f, const StackWeights& weights, int64_t panel, int8_t* room, uint8_t* to) {
  const LinearFormat rebuilt = f.rebuilt();
  const uint8_t* base = weights.base ? weights.base + panel * weights.base_format->panel_bytes() : nullptr;
  if (base) linear_avx512()->expand(*weights.base_format, base, room);
  std::memset(to + rebuilt.groups_at(), 0, static_cast<size_t>(rebuilt.codes_at() - rebuilt.groups_at()));
  Span w;
  for (int64_t begin = 0; begin < f.padded(); begin += rebuilt.span) {
    const int64_t end = std::min(begin + rebuilt.span, f.padded());
    if (base) {
      set_base(*weights.base_format, base, room, begin, end, w);
    } else {
      std::memset(w, 0, sizeof w);
    }
    for (int block = 0; block < weights.count; ++block) add_any(f, weights.blocks[block], panel, begin, end, w);
    for (int64_t k = std::max(begin, f.inputs); k < end; ++k) w[k - begin] = _mm512_setzero_ps();
    quantize_span(w, end - begin, to + begin / rebuilt.span * kPanel * 4, to + rebuilt.codes_at() + begin * kPanel);
  }
}

}  // namespace

const StackPath* stack_avx512() {
  static const StackPath path{"avx512", weigh, add, rebuild};
  return &path;
}

}  // namespace shoal

#else
const shoal::StackPath* shoal::stack_avx512() { return nullptr; }
#endif
