// AVX2: signs are looked up, four at a time. For each four codes a table holds the sums of all sixteen ways to sign
// them, and vpshufb finds those of sixteen outputs at once, as in T-MAC (Wei et al. 2024): two thirds of the time of
// masking bits and vpmaddubsw (Zen 4). A sum has ten bits, kept as two of five, eight of which add up in a byte.
//
// vpshufb has one table for sixteen bytes, so those must be outputs that meet the same four codes: a block's bytes are
// turned until a register has one input's place i in all sixteen outputs, of both its vectors. Its nibbles then are the
// signs of inputs i, 4 + i, 8 + i and 12 + i of each half of 32.
#include "stack_path.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace shoal {
namespace {

constexpr int64_t kTable = 8;       // bytes of tables for each code
constexpr int kOffset = 4 * 127;    // that makes a sum of four signed codes positive
constexpr int64_t kBlocks = 128;    // whose low halves, 31 * 8 a block, of both vectors fit 16 bits
constexpr int64_t kTabled = 32;     // whose tables are half of a first cache
constexpr int kSides = 2;           // registers of a panel's outputs

__m256i bytes_of(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
__m128i half_of(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
__m256 floats(const uint16_t* halves) { return _mm256_cvtph_ps(half_of(halves)); }

// Now, in this order: g++ would add up a tree, for which there are not enough registers, or load twice.
__m256i now(__m256i v) {
  asm("" : "+x"(v));
  return v;
}

// Bytes 4j + i of each half of a register to 4i + j; its own inverse.
__m256i turned(__m256i v) {
  const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(turn));
}

void weigh(const uint16_t* v, const float* x, int64_t count, float* z) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) _mm256_storeu_ps(z + k, _mm256_mul_ps(floats(v + k), _mm256_loadu_ps(x + k)));
  for (; k < count; ++k) z[k] = _cvtsh_ss(v[k]) * x[k];
}

// The tables of a block lie as `signed_sums` wants them: for place i, for each 16 of 32 inputs, the low five bits and
// then the others, each for the first vector and then for the second.
void tabulate(const int8_t* codes, int64_t padded, uint8_t* to) {
  const __m256i ones = _mm256_set1_epi8(1);
  const __m256i first = _mm256_setr_epi8(-1, -1, 1, -1, -1, 1, 1, 1, -1, -1, 1, -1, -1, 1, 1, 1,  //
                                         -1, -1, 1, -1, -1, 1, 1, 1, -1, -1, 1, -1, -1, 1, 1, 1);
  const __m256i second = _mm256_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, 1, -1, 1, -1,  //
                                          -1, 1, -1, 1, -1, 1, -1, 1, 1, 1, 1, 1, 1, 1, 1, 1);
  auto pair = [&](const int8_t* at, __m256i signs) {
    int16_t two;
    std::memcpy(&two, at, 2);
    return _mm256_maddubs_epi16(ones, _mm256_sign_epi8(_mm256_set1_epi16(two), signs));
  };
  for (int64_t k = 0; k < padded; k += kBlock, to += kBlock * kTable) {
    alignas(32) int8_t turn[kBlock];
    for (int half = 0; half < 2; ++half)
      _mm256_store_si256(reinterpret_cast<__m256i*>(turn + 32 * half), turned(bytes_of(codes + k + 32 * half)));
    for (int i = 0; i < 4; ++i)
      for (int part = 0; part < 2; ++part) {
        __m256i table[2];
        for (int half = 0; half < 2; ++half) {
          const int8_t* four = turn + 32 * half + 16 * part + 4 * i;
          table[half] = _mm256_add_epi16(_mm256_add_epi16(pair(four, first), pair(four + 2, second)),
                                         _mm256_set1_epi16(kOffset));
        }
        const __m256i mask = _mm256_set1_epi16(31);
        const __m256i low = _mm256_packus_epi16(_mm256_and_si256(table[0], mask), _mm256_and_si256(table[1], mask));
        const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(table[0], 5), _mm256_srli_epi16(table[1], 5));
        auto at = reinterpret_cast<__m256i*>(to + 128 * i + 64 * part);
        _mm256_store_si256(at, _mm256_permute4x64_epi64(low, 0xd8));
        _mm256_store_si256(at + 1, _mm256_permute4x64_epi64(high, 0xd8));
      }
  }
}

// A block's signs: byte r of of[i] has those of place i and output r, the first vector's in its lower half.
struct Turned {
  __m256i of[4];

  explicit Turned(const uint8_t* signs) {
    __m256i v[4];
    for (int j = 0; j < 4; ++j)
      v[j] = turned(_mm256_set_m128i(half_of(signs + 64 + 16 * j), half_of(signs + 16 * j)));
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    of[0] = _mm256_unpacklo_epi64(a, c);
    of[1] = _mm256_unpackhi_epi64(a, c);
    of[2] = _mm256_unpacklo_epi64(b, d);
    of[3] = _mm256_unpackhi_epi64(b, d);
  }
};

// Bytes added up in 16 bits. `all` also has 256 times the odd ones.
struct Wide {
  __m256i all = _mm256_setzero_si256(), odd = all;

  void add(__m256i bytes) {
    all = _mm256_add_epi16(all, bytes);
    odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
  }
  // Both halves together: those of bytes 8 * side .. 8 * side + 7.
  __m256i of(int side) const {
    auto both = [](__m256i v) { return _mm_add_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); };
    const __m128i evens = both(_mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8))), odds = both(odd);
    return _mm256_cvtepu16_epi32(side ? _mm_unpackhi_epi16(evens, odds) : _mm_unpacklo_epi16(evens, odds));
  }
};

// sums[row][side] = the codes of `Rows` rows, added where a panel's sign is positive and taken off elsewhere.
template <int Rows>
void signed_sums(const uint8_t* signs, int64_t blocks, const uint8_t* tables, __m256i (*sums)[kSides]) {
  for (int r = 0; r < Rows; ++r)
    for (int side = 0; side < kSides; ++side)
      sums[r][side] = _mm256_set1_epi32(static_cast<int>(-kOffset * (kBlock / 4) * blocks));
  for (int64_t block = 0; block < blocks;) {
    Wide low[Rows], high[Rows];
    for (const int64_t end = std::min(block + kBlocks, blocks); block < end; ++block, signs += kBlock * kPanel / 8) {
      const Turned places(signs);
      __m256i lows[Rows] = {}, highs[Rows] = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i mask = _mm256_set1_epi8(15), v = now(places.of[i]);
        const __m256i index[2] = {_mm256_and_si256(v, mask), _mm256_and_si256(_mm256_srli_epi16(v, 4), mask)};
        for (int part = 0; part < 2; ++part)
          for (int r = 0; r < Rows; ++r) {
            const uint8_t* table = tables + (r * blocks + block) * kBlock * kTable + 128 * i + 64 * part;
            lows[r] = now(_mm256_add_epi8(lows[r], _mm256_shuffle_epi8(bytes_of(table), index[part])));
            highs[r] = now(_mm256_add_epi8(highs[r], _mm256_shuffle_epi8(bytes_of(table + 32), index[part])));
          }
      }
      for (int r = 0; r < Rows; ++r) {
        low[r].add(lows[r]);
        high[r].add(highs[r]);
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int side = 0; side < kSides; ++side)
        sums[r][side] = _mm256_add_epi32(
            sums[r][side], _mm256_add_epi32(low[r].of(side), _mm256_slli_epi32(high[r].of(side), 5)));
  }
}

void sums_of(int64_t rows, const uint8_t* signs, int64_t blocks, const uint8_t* tables, __m256i (*sums)[kSides]) {
  switch (rows) {
    case 1: return signed_sums<1>(signs, blocks, tables, sums);
    case 2: return signed_sums<2>(signs, blocks, tables, sums);
    case 3: return signed_sums<3>(signs, blocks, tables, sums);
    default: return signed_sums<4>(signs, blocks, tables, sums);
  }
}

// What signed_sums<1> gives, from codes instead of tables: a third slower, but fast where tables are longer than the
// first cache, as a second stream from the second one halves what the processor prefetches of the signs. A byte's bits
// stay where they are, so that there are sums of 1, 2, 4 and 8 times what is wanted.
void masked_sums(const uint8_t* signs, int64_t blocks, const int8_t* codes, int32_t total, __m256i* sums) {
  constexpr int64_t kWithin = 4;  // blocks whose 16 pairs of products, 8 * 2 * 127 each, fit int16
  sums[0] = sums[1] = _mm256_setzero_si256();
  for (int64_t block = 0; block < blocks;) {
    __m256i part[kSides][4] = {};
    for (const int64_t end = std::min(block + kWithin, blocks); block < end; ++block)
      for (int half = 0; half < 2; ++half, signs += 64, codes += 32)
        for (int side = 0; side < kSides; ++side) {
          __m256i v = now(bytes_of(signs + 32 * side));
          for (int i = 0; i < 2; ++i, v = now(_mm256_srli_epi16(v, 4)))
#pragma GCC unroll 4
            for (int b = 0; b < 4; ++b) {
              int32_t quad;
              std::memcpy(&quad, codes + 16 * i + 4 * b, 4);
              const __m256i bits = _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(1 << b)));
              part[side][b] = now(_mm256_add_epi16(part[side][b], _mm256_maddubs_epi16(bits, _mm256_set1_epi32(quad))));
            }
        }
    for (int side = 0; side < kSides; ++side)
      for (int b = 0; b < 4; ++b)
        sums[side] = _mm256_add_epi32(
            sums[side], _mm256_madd_epi16(part[side][b], _mm256_set1_epi16(static_cast<int16_t>(16 >> b))));
  }
  for (int side = 0; side < kSides; ++side)  // 16 times too large, but twice is wanted
    sums[side] = _mm256_sub_epi32(_mm256_srai_epi32(sums[side], 3), _mm256_set1_epi32(total));
}

void add(const StackFormat& f, const uint8_t* payload, int64_t panel, int64_t panels, const StackRows& a, float* y,
         int64_t ld) {
  const int64_t blocks = f.blocks(), rows = a.rows * f.rank;
  const uint8_t* signs = payload + f.signs_at() + panel * f.panel_bytes();
  const auto* u = reinterpret_cast<const uint16_t*>(payload + f.u_at()) + panel * kPanel;
  for (int64_t p = 0; p < panels; ++p, signs += f.panel_bytes(), u += kPanel, y += kPanel)
    for (int64_t first = 0; first < rows; first += kFew) {
      const int64_t count = std::min<int64_t>(kFew, rows - first);
      __m256i sums[kFew][kSides];
      if (rows == 1 && blocks > kTabled) {
        masked_sums(signs, blocks, a.codes, a.totals[0], sums[0]);
      } else {
        sums_of(count, signs, blocks, a.tables + first * f.padded() * kTable, sums);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = (first + i) / f.rank, rank = (first + i) % f.rank;
        for (int side = 0; side < kSides; ++side) {
          const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(a.scales[first + i]),
                                             floats(u + rank * f.panels() * kPanel + 8 * side));
          float* at = y + row * ld + 8 * side;
          _mm256_storeu_ps(at, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i][side]), scale, _mm256_loadu_ps(at)));
        }
      }
    }
}

// The weights of a span of inputs and 16 outputs.
struct Span {
  alignas(32) float w[kStackSpan][kPanel];

  __m256 at(int64_t k, int side) const { return _mm256_load_ps(w[k] + 8 * side); }
  void set(int64_t k, int side, __m256 v) { _mm256_store_ps(w[k] + 8 * side, v); }
};

// Sets inputs begin .. begin + count to the base's, which linear_avx2 expanded: step * code, with 8 bits 128 more.
void set_base(const LinearFormat& f, const uint8_t* panel, const int8_t* expanded, int64_t begin, int64_t count,
              Span& to) {
  const __m256i byte = _mm256_set1_epi32(255);
  for (int64_t k = 0; k < count; k += 32) {  // a group is whole 32s
    const uint8_t* group = panel + f.groups_at() + (begin + k) / f.group * kPanel;
    const float* scales = reinterpret_cast<const float*>(panel) + (begin + k) / f.span * kPanel;
    for (int side = 0; side < kSides; ++side) {
      const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(group + 8 * side));
      const __m256i zero = f.bits == 8 ? _mm256_add_epi32(_mm256_cvtepi8_epi32(both), _mm256_set1_epi32(128))
                                       : _mm256_srli_epi32(_mm256_cvtepu8_epi32(both), 4);
      const __m256i multiplier = f.bits == 8 ? _mm256_set1_epi32(1)
                                             : _mm256_and_si256(_mm256_cvtepu8_epi32(both), _mm256_set1_epi32(15));
      const __m256 times = _mm256_cvtepi32_ps(multiplier), scale = _mm256_loadu_ps(scales + 8 * side);
      for (int64_t j = k; j < k + 32; j += 4) {
        __m256i quad = bytes_of(expanded + (begin + j) * kPanel + 32 * side);
        for (int64_t i = 0; i < 4; ++i, quad = _mm256_srli_epi32(quad, 8)) {
          const __m256i code = _mm256_sub_epi32(_mm256_and_si256(quad, byte), zero);
          to.set(j + i, side, _mm256_mul_ps(scale, _mm256_mul_ps(times, _mm256_cvtepi32_ps(code))));
        }
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
  alignas(32) float values[kStackRanks][kStackSpan];
  __m256 factors[kStackRanks][kSides];
  for (int r = 0; r < ranks; ++r) {
    for (int side = 0; side < kSides; ++side) factors[r][side] = floats(u + r * f.panels() * kPanel + 8 * side);
    for (int64_t k = 0; k < count; k += 8) _mm256_store_ps(values[r] + k, floats(v + r * f.padded() + k));
  }
  const __m256 top = _mm256_set1_ps(-0.0f);
  const __m256 negative[kSides] = {_mm256_xor_ps(factors[0][0], top), _mm256_xor_ps(factors[0][1], top)};
  for (int64_t half = 0; half < count; half += 32, signs += 64) {
    __m256i bits[kSides] = {bytes_of(signs), bytes_of(signs + 32)};
    for (int64_t i = 3; i >= 0; --i)
      for (int64_t b = 7; b >= 0; --b)  // the uppermost bit is that of input 4b + i
        for (int side = 0; side < kSides; ++side) {
          const int64_t k = half + 4 * b + i;
          __m256 size = _mm256_mul_ps(negative[side], _mm256_set1_ps(values[0][k]));
          for (int r = 1; r < ranks; ++r)
            size = _mm256_fnmadd_ps(factors[r][side], _mm256_set1_ps(values[r][k]), size);
          size = _mm256_xor_ps(size, _mm256_and_ps(_mm256_castsi256_ps(bits[side]), top));
          to.set(k, side, _mm256_add_ps(First ? _mm256_setzero_ps() : to.at(k, side), size));
          bits[side] = _mm256_slli_epi32(bits[side], 1);
        }
  }
}

// Quantises a span of `count` inputs.
void set_codes(const LinearFormat& f, const Span& from, int64_t span, int64_t count, uint8_t* to) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 inverse[kSides];
  for (int side = 0; side < kSides; ++side) {
    __m256i most = _mm256_setzero_si256();  // of the magnitudes' bits, in which what is not finite comes last
    for (int64_t k = 0; k < count; ++k)
      most = _mm256_max_epi32(most, _mm256_castps_si256(_mm256_and_ps(from.at(k, side), magnitude)));
    const __m256 amax = _mm256_castsi256_ps(most), largest = _mm256_set1_ps(127);
    const __m256 odd = _mm256_castsi256_ps(_mm256_cmpgt_epi32(most, _mm256_set1_epi32(0x7f7fffff)));
    const __m256 some = _mm256_andnot_ps(odd, _mm256_cmp_ps(amax, _mm256_set1_ps(1e-30f), _CMP_GE_OQ));
    inverse[side] = _mm256_and_ps(some, _mm256_div_ps(largest, amax));
    const __m256 scale = _mm256_and_ps(some, _mm256_div_ps(amax, largest));
    _mm256_storeu_ps(reinterpret_cast<float*>(to) + span * kPanel + 8 * side,
                     _mm256_blendv_ps(scale, _mm256_set1_ps(std::nanf("")), odd));
  }
  uint8_t* codes = to + f.codes_at() + span * f.span * kPanel;
  for (int64_t k = 0; k < count; k += 4, codes += 4 * kPanel)
    for (int side = 0; side < kSides; ++side) {
      const __m256 some = _mm256_cmp_ps(inverse[side], _mm256_setzero_ps(), _CMP_NEQ_OQ);
      __m256i code[4];
      for (int i = 0; i < 4; ++i)  // what is not finite, without a factor, would not give 0
        code[i] = _mm256_cvtps_epi32(_mm256_and_ps(some, _mm256_mul_ps(from.at(k + i, side), inverse[side])));
      const __m256i packed =
          _mm256_packs_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32 * side), turned(packed));
    }
}

void rebuild(const StackFormat& f, const StackWeights& w, int64_t panel, int8_t* room, uint8_t* to) {
  const LinearFormat rebuilt = f.rebuilt();
  const uint8_t* base = w.base ? w.base + panel * w.base_format->panel_bytes() : nullptr;
  if (base) linear_avx2()->expand(*w.base_format, base, room);
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
      for (int side = 0; side < kSides; ++side) span.set(k, side, _mm256_setzero_ps());
    set_codes(rebuilt, span, index, count, to);
  }
}

}  // namespace

const StackPath* stack_avx2() {
  static const StackPath path{"avx2", weigh, add, rebuild, kTable, tabulate};
  return &path;
}

}  // namespace shoal

#else
const shoal::StackPath* shoal::stack_avx2() { return nullptr; }
#endif
