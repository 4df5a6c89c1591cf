// Attention with AVX-512: 16 lanes, 32 registers.
#include "attention.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512VNNI__)
#include <immintrin.h>

namespace shoal {
namespace {

struct Lanes {
  using Vector = __m512;
  static constexpr int64_t width = 16;
  static constexpr int columns(int rows) { return rows <= 6 ? 4 : 2; }  // vectors beside each other in a product
  static constexpr int sums = 16;                                       // vectors that are added up together

  static Vector set(float x) { return _mm512_set1_ps(x); }
  static Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static Vector load(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Vector load(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
  static void store(uint16_t* to, Vector x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static Vector round(Vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^power for whole powers; zero below 2^-125.
  static Vector scale(Vector x, Vector power) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(power, set(-125), _CMP_NLT_UQ), x, power);
  }
  static float first(Vector x) { return _mm512_cvtss_f32(x); }
  static float sum(Vector x) { return _mm512_reduce_add_ps(x); }
  static float highest(Vector x) { return _mm512_reduce_max_ps(x); }

  // Element i is the sum of x[i].
  static Vector sum_each(const Vector* x) {
    Vector y[4];  // element 4 m + .. of y[i]: parts of x[4 m + i]
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vector a = halves(x[i], x[4 + i]), b = halves(x[8 + i], x[12 + i]);
      y[i] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    const Vector a = pairs(y[0], y[1]), b = pairs(y[2], y[3]);
    return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  }

  static void transpose(Vector (&x)[16]) {
    Vector y[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {  // x[i + j]: column 4 m + j of rows i .. i + 3 in quarter m
      const auto pair = [&](int j) { return _mm512_castps_pd(y[i + j]); };
      x[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(0), pair(2)));
      x[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(0), pair(2)));
      x[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(1), pair(3)));
      x[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(1), pair(3)));
    }
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j) {
      const Vector even = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88), odd = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd);
      const Vector even_2 = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
      const Vector odd_2 = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
      y[j] = _mm512_shuffle_f32x4(even, even_2, 0x88);
      y[4 + j] = _mm512_shuffle_f32x4(odd, odd_2, 0x88);
      y[8 + j] = _mm512_shuffle_f32x4(even, even_2, 0xdd);
      y[12 + j] = _mm512_shuffle_f32x4(odd, odd_2, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }

 private:
  // The halves of a added to each other, and those of b.
  static Vector halves(Vector a, Vector b) {
    return add(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
  }
  // Likewise in each quarter.
  static Vector pairs(Vector a, Vector b) {
    return add(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
  }
};

}  // namespace
}  // namespace shoal

#include "attention_vector.inl"

// Fast: products of integers, which are taken two or four times as many at once as floats.
//
// Scores are products of 16-bit integers: a query and a key have a scale each. With 8 bits a model whose keys have large
// biases (Qwen 2.5) would be lost. Keys are taken from their mean over the first block, which no softmax notices (Zhang
// et al. 2024). Weights are codes of their query's greatest in the block, so that where one position draws most of the
// weight (Xiao et al. 2024) the others keep their digits, and values have a scale for each channel of the block. Both have
// 8 bits; in the first block and the last, which have most of the weight, 16.
namespace shoal {
namespace {

constexpr int kRows = 6;                // queries at once
constexpr int kColumns = 4;             // vectors beside each other
constexpr float kNothing = -1e30f;      // less than any score

// The greatest codes of 16-bit and 8-bit weights and values: kKeys products fit 32 bits.
constexpr float kWeightLog[] = {14.999956f, 7.9943534f};  // of 32767 and 255
constexpr float kValue[] = {1023, 127};

// The greatest code of a query or key: the products of their n numbers fit 32 bits.
float key_codes(int64_t n) { return least(32767.0f, floorf(sqrtf(2147483520.0f / static_cast<float>(n)))); }

__m512i size_bits(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }

// What codes up to `codes` are multiplied with to give numbers up to `size`, and the inverse; both 0 where all numbers
// are. Not a number where `size` is none.
__m512 scale_of(__m512i size, float codes, __m512& inverse) {
  const __m512 x = _mm512_castsi512_ps(size);
  const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(1e-30f), _CMP_GE_OQ);
  const __mmask16 finite = _mm512_cmplt_epu32_mask(size, _mm512_set1_epi32(0x7f800000));
  inverse = _mm512_maskz_div_ps(some & finite, _mm512_set1_ps(codes), x);
  const __m512 scale = _mm512_maskz_mul_ps(some, x, _mm512_set1_ps(1 / codes));
  return _mm512_mask_blend_ps(finite, _mm512_set1_ps(NAN), scale);
}

// The codes of two vectors beside each other.
__m512i pairs_of(__m512 first, __m512 second) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtps_epi32(second), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_cvtps_epi32(first), high);
}

// Of four, as bytes.
__m512i quads_of(__m512 first, __m512 second, __m512 third, __m512 fourth) {
  const __m512i even = pairs_of(first, third), odd = pairs_of(second, fourth);
  return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, even, _mm512_slli_epi16(odd, 8));
}

// to [n] codes = x [n]; gives their scale.
float round_query(const float* x, int64_t n, int16_t* to) {
  const auto tail = [n](int64_t i) { return static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1); };
  __m512i size = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16)
    size = _mm512_max_epu32(size, size_bits(_mm512_maskz_loadu_ps(tail(i), x + i)));
  __m512 inverse;
  const __m512 scale = scale_of(_mm512_set1_epi32(_mm512_reduce_max_epu32(size)), key_codes(n), inverse);
  for (int64_t i = 0; i < n; i += 16)
    _mm512_mask_cvtsepi32_storeu_epi16(
        to + i, tail(i), _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(tail(i), x + i), inverse)));
  return _mm512_cvtss_f32(scale);
}

// to [n] = the mean of columns [n][kKeys] over the first `count` keys; those up to a whole vector are 0.
void mean_key(const float* columns, int64_t count, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i, columns += kKeys) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t key = 0; key < count; key += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(columns + key));
    to[i] = _mm512_reduce_add_ps(sum) / static_cast<float>(count);
  }
}

// to [n / 2][kKeys] pairs of codes = columns [n][kKeys] - middle, of `count` keys. Whether all are finite.
bool round_keys(const float* columns, const float* middle, int64_t count, int64_t n, int32_t* to, float* scales) {
  __mmask16 finite = 0xffff;
  for (int64_t at = 0; at < count; at += 16) {
    const auto key = [&](int64_t i) {
      return _mm512_sub_ps(_mm512_loadu_ps(columns + i * kKeys + at), _mm512_set1_ps(middle[i]));
    };
    __m512i even = _mm512_setzero_si512(), odd = even;
    for (int64_t i = 0; i < n; i += 2) {
      even = _mm512_max_epu32(even, size_bits(key(i)));
      odd = _mm512_max_epu32(odd, size_bits(key(i + 1)));
    }
    __m512 inverse;
    const __m512 scale = scale_of(_mm512_max_epu32(even, odd), key_codes(n), inverse);
    finite &= _mm512_cmp_ps_mask(scale, scale, _CMP_ORD_Q);
    _mm512_storeu_ps(scales + at, scale);
    for (int64_t i = 0; i < n; i += 2)
      _mm512_storeu_si512(to + i / 2 * kKeys + at,
                          pairs_of(_mm512_mul_ps(key(i), inverse), _mm512_mul_ps(key(i + 1), inverse)));
  }
  return finite == 0xffff;
}

// Where the quad of keys that begins at `key` lies: packing four vectors of weights puts it there.
constexpr int64_t quad_at(int64_t key) { return key % 16 / 4 * 4 + key / 16; }

// to [kKeys / 2 or 4][padded] pairs or, with Quads, quads of codes = values [count][padded].
template <bool Quads>
void round_values(const float* values, int64_t count, int64_t padded, int32_t* to, float* scales) {
  constexpr int64_t step = Quads ? 4 : 2;
  for (int64_t at = 0; at < padded; at += 16) {
    __m512i size = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; ++i) size = _mm512_max_epu32(size, size_bits(_mm512_loadu_ps(values + i * padded + at)));
    __m512 inverse;
    _mm512_storeu_ps(scales + at, scale_of(size, kValue[Quads], inverse));
    const auto value = [&](int64_t i) {
      return i < count ? _mm512_mul_ps(_mm512_loadu_ps(values + i * padded + at), inverse) : _mm512_setzero_ps();
    };
    for (int64_t i = 0; i < count; i += step) {
      __m512i codes;
      if constexpr (Quads) codes = quads_of(value(i), value(i + 1), value(i + 2), value(i + 3));
      else codes = pairs_of(value(i), value(i + 1));
      _mm512_storeu_si512(to + (Quads ? quad_at(i) : i / 2) * padded + at, codes);
    }
  }
}

// Calls use(row, sums) for the rows of a [kRows][depth] * b [depth][Columns vectors], of pairs, or of quads of which a's
// have no signs; a_row in bytes. (The compiler's own function would have it move every sum twice.)
template <int Columns, bool Quads, class Use>
void multiply_codes(const void* a, int64_t a_row, const int32_t* b, int64_t b_row, int64_t depth, Use&& use) {
  __m512i sum[kRows][Columns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < Columns; ++i) sum[r][i] = _mm512_setzero_si512();
  }
  const char* at = static_cast<const char*>(a);
  for (int64_t k = 0; k < depth; ++k, at += 4, b += b_row) {
    __m512i x[Columns];
#pragma GCC unroll 8
    for (int i = 0; i < Columns; ++i) x[i] = _mm512_loadu_si512(b + i * 16);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t codes;
      memcpy(&codes, at + r * a_row, sizeof codes);
      const __m512i y = _mm512_set1_epi32(codes);
#pragma GCC unroll 8
      for (int i = 0; i < Columns; ++i) {
        if constexpr (Quads) asm("vpdpbusd %1, %2, %0" : "+v"(sum[r][i]) : "v"(x[i]), "v"(y));
        else asm("vpdpwssd %1, %2, %0" : "+v"(sum[r][i]) : "v"(x[i]), "v"(y));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) use(r, sum[r]);
}

// 2^x rounded, 0 below -1; 2^f is within 8e-5, as its minimax polynomial is.
__m512i power(__m512 x) {
  const __m512 shift = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = _mm512_max_ps(x, _mm512_set1_ps(-2));
  const __m512 whole = _mm512_add_ps(x, shift), f = _mm512_sub_ps(x, _mm512_sub_ps(whole, shift));
  __m512 y = _mm512_set1_ps(0x1.c3f76cp-5f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.f0de2p-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.62f31ap-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.fff692p-1f));
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(whole), 23);
  return _mm512_cvtps_epi32(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), exponent)));
}

// Six queries and their weights in a block of keys.
struct Six {
  const int16_t* queries;   // [kRows][n]
  const float* scales;      // [kRows]
  uint64_t visible[kRows];  // a bit for each key
  float tops[kRows];        // the greatest score of each
  float sums[kRows][16];    // of the codes of the weights, in parts
  alignas(64) int16_t weights[kRows][kKeys];  // or bytes, in the first half of each row
};

// The weights of the first Columns * 16 keys. Not Masked: all are visible.
template <int Columns, bool Masked, bool Quads>
void weigh_six(Six& six, int64_t n, const int32_t* keys, const float* key_scales) {
  multiply_codes<Columns, false>(six.queries, n * 2, keys, kKeys, n / 2, [&](int r, const __m512i* dots) {
    const auto seen = [&](int i) { return static_cast<__mmask16>(Masked ? six.visible[r] >> 16 * i : 0xffff); };
    __m512 x[Columns], top = _mm512_set1_ps(kNothing);
#pragma GCC unroll 8
    for (int i = 0; i < Columns; ++i) {
      x[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[i]), _mm512_loadu_ps(key_scales + i * 16));
      top = _mm512_mask_max_ps(top, seen(i), top, x[i]);
    }
    const float scale = six.scales[r];
    six.tops[r] = _mm512_reduce_max_ps(top) * scale;
    const __m512 base = _mm512_set1_ps(kWeightLog[Quads] - six.tops[r]);
    __m512i weights[Columns], sum = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < Columns; ++i)
      weights[i] = _mm512_maskz_mov_epi32(seen(i), power(_mm512_fmadd_ps(x[i], _mm512_set1_ps(scale), base)));
    if constexpr (Quads) {
      const __m512i codes = _mm512_packus_epi16(_mm512_packs_epi32(weights[0], weights[1]),
                                                _mm512_packs_epi32(weights[2], weights[3]));
      _mm512_store_si512(six.weights[r], codes);
      sum = _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi8(1));
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < Columns; ++i) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(six.weights[r]) + i, _mm512_cvtsepi32_epi16(weights[i]));
        sum = _mm512_add_epi32(sum, weights[i]);
      }
    }
    _mm512_storeu_ps(six.sums[r], _mm512_cvtepi32_ps(sum));
  });
}

// sums [kRows][Columns vectors] = sums * shrink + weights * values * gain, over the first `seen` keys.
template <int Columns, bool Quads>
void add_six(const Six& six, int64_t seen, const int32_t* values, const float* scales, int64_t padded,
             const float* shrink, const float* gain, float* sums) {
  constexpr int64_t step = Quads ? 4 : 2;
  multiply_codes<Columns, Quads>(
      six.weights, sizeof six.weights[0], values, padded, (seen + step - 1) / step, [&](int r, const __m512i* products) {
#pragma GCC unroll 8
        for (int i = 0; i < Columns; ++i) {
          float* sum = sums + r * padded + i * 16;
          const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(scales + i * 16), _mm512_set1_ps(gain[r]));
          const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(shrink[r]));
          _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[i]), scale, old));
        }
      });
}

template <bool Quads>
void add_six(const Six& six, int64_t seen, const int32_t* values, const float* scales, int64_t padded,
             const float* shrink, const float* gain, float* sums) {
  int64_t at = 0;
  for (; at + kColumns * 16 <= padded; at += kColumns * 16)
    add_six<kColumns, Quads>(six, seen, values + at, scales + at, padded, shrink, gain, sums + at);
  for (; at < padded; at += 16)
    add_six<1, Quads>(six, seen, values + at, scales + at, padded, shrink, gain, sums + at);
}

// By the number of vectors of keys - 1.
constexpr decltype(&weigh_six<1, true, false>) kWeighMasked[kColumns] = {
    weigh_six<1, true, false>, weigh_six<2, true, false>, weigh_six<3, true, false>, weigh_six<4, true, false>};

template <class Number>
void attend_fast_as(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head,
                    int64_t from, int64_t to, void* memory) {
  const int64_t n = shape.head_dim, padded = round_up(n, 16), group = shape.heads / shape.kv_heads;
  const int64_t cache = (sequence * shape.kv_heads + kv_head) * shape.capacity * n;
  const FastScratch scratch(padded);
  float* base = aligned(memory);
  const auto integers = [base](int64_t at) { return reinterpret_cast<int32_t*>(base + at); };
  auto* q = reinterpret_cast<int16_t*>(base + scratch.queries);
  int32_t *key_pairs = integers(scratch.key_pairs), *pairs = integers(scratch.pairs), *quads = integers(scratch.quads);
  float *scales = base + scratch.scales, *peaks = base + scratch.peaks, *sums = base + scratch.sums;
  float *totals = base + scratch.totals, *middle = base + scratch.middle, *key_scales = base + scratch.key_scales;
  float *keys = base + scratch.keys, *values = base + scratch.values;
  float *pair_scales = base + scratch.pair_scales, *quad_scales = base + scratch.quad_scales;
  int64_t lows[FastScratch::count], ends[FastScratch::count];  // what each query sees

  for (int64_t first = from * group; first < to * group; first += scratch.count) {
    const int64_t count = least(scratch.count, to * group - first), all = round_up(count, kRows);
    const Queries queries = {shape, call, sequence, kv_head, group, first, count};
    for (int64_t i = 0; i < all; ++i) {  // the last is there again, until there are whole sixes
      float query[kMostHeadDim];
      const int64_t of = least(i, count - 1);
      queries.load(of, query);
      scales[i] = round_query(query, n, q + i * n);
      peaks[i] = kNothing;
      lows[i] = queries.sees_from(of);
      ends[i] = queries.position(of) + 1;
    }
    memset(sums, 0, all * padded * sizeof(float));
    memset(totals, 0, all * 16 * sizeof(float));

    const int64_t begin = lows[0], end = ends[all - 1];
    for (int64_t start = begin; start < end; start += kKeys) {
      const int64_t present = least(kKeys, end - start);
      load_keys(static_cast<const Number*>(call.keys) + cache + start * n, present, n, keys);
      load_values(static_cast<const Number*>(call.values) + cache + start * n, present, n, values);
      if (start == begin) mean_key(keys, present, n, middle);
      const bool finite = round_keys(keys, middle, present, n, key_pairs, key_scales);
      // Quads for the queries that see all of a block which is not the first, pairs for the others
      if (start != begin && ends[all - 1] >= start + kKeys)
        round_values<true>(values, present, padded, quads, quad_scales);
      if (start == begin || ends[0] < start + kKeys || lows[all - 1] > start)
        round_values<false>(values, present, padded, pairs, pair_scales);
      if (!finite) {  // whoever meets such a key is lost
        for (int64_t i = 0; i < padded; ++i) quad_scales[i] = pair_scales[i] = NAN;
      }
      for (int64_t i = 0; i < all; i += kRows) {
        const int64_t last = i + kRows - 1, seen = least(present, ends[last] - start);
        if (seen <= 0 || lows[i] >= start + present) continue;
        Six six;
        six.queries = q + i * n;
        six.scales = scales + i;
        const bool whole = ends[i] >= start + kKeys && lows[last] <= start, eight = whole && start != begin;
        if (eight) {
          weigh_six<kColumns, false, true>(six, n, key_pairs, key_scales);
        } else {
          for (int64_t r = 0; r < kRows; ++r) {
            const int64_t low = most<int64_t>(0, lows[i + r] - start), high = least(kKeys, ends[i + r] - start);
            six.visible[r] = high <= low ? 0 : ~uint64_t{0} >> (kKeys - (high - low)) << low;
          }
          kWeighMasked[(seen + 15) / 16 - 1](six, n, key_pairs, key_scales);
        }

        float shrink[16], gain[16];  // of what was summed before, and of the block
        const __m512 top = _mm512_maskz_loadu_ps(0x3f, six.tops), old = _mm512_maskz_loadu_ps(0x3f, peaks + i);
        const __m512 peak = _mm512_max_ps(old, top);
        _mm512_mask_storeu_ps(peaks + i, 0x3f, peak);
        _mm512_storeu_ps(shrink, exp2(_mm512_sub_ps(old, peak)));
        const __m512 unit = _mm512_set1_ps(eight ? 1.0f / 255 : 1.0f / 32767);
        _mm512_storeu_ps(gain, _mm512_mul_ps(exp2(_mm512_sub_ps(top, peak)), unit));
        for (int r = 0; r < kRows; ++r) {
          float* total = totals + (i + r) * 16;
          const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(total), _mm512_set1_ps(shrink[r]));
          _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_loadu_ps(six.sums[r]), _mm512_set1_ps(gain[r]), before));
        }
        if (eight) {
          add_six<true>(six, seen, quads, quad_scales, padded, shrink, gain, sums + i * padded);
        } else {
          add_six<false>(six, seen, pairs, pair_scales, padded, shrink, gain, sums + i * padded);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i)
      queries.finish(sums + i * padded, _mm512_reduce_add_ps(_mm512_loadu_ps(totals + i * 16)), queries.out(i));
  }
}

void attend_fast(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head,
                 int64_t from, int64_t to, void* scratch) {
  if (!shape.fast || (to - from) * (shape.heads / shape.kv_heads) <= kFewQueries)
    return attend(shape, call, sequence, kv_head, from, to, scratch);
  switch (shape.cache) {
    case CacheType::f32: return attend_fast_as<float>(shape, call, sequence, kv_head, from, to, scratch);
    case CacheType::f16: return attend_fast_as<uint16_t>(shape, call, sequence, kv_head, from, to, scratch);
    case CacheType::i8: return attend_fast_as<int8_t>(shape, call, sequence, kv_head, from, to, scratch);
  }
}

}  // namespace

const AttentionPath* attention_avx512() {
  static const AttentionPath path = {"avx512", store, attend_fast, attend_part};
  return &path;
}

}  // namespace shoal
#else

namespace shoal {
const AttentionPath* attention_avx512() { return nullptr; }
}  // namespace shoal

#endif
