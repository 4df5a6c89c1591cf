// AMX: sixteen rows times sixteen outputs times sixty-four inputs an instruction. A span is summed whole in the tiles;
// its sums are scaled while the tiles already sum the next.
//
// The tiles are a state of the thread that others in the process use as well (ONNX Runtime on the very same threads),
// so every call looks whether they are shaped as it needs and shapes them if not. It does not release them: the shape
// is the one that ONNX Runtime expects and leaves, and the next call would have to wait for a new one.
#include "linear.h"

#if (defined(__AMX_INT8__) || defined(__AMXINT8__)) && defined(__AVX512VNNI__)  // clang 14 names it so
#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace shoal {
namespace {

constexpr int64_t kAhead = 2048;           // bytes of prefetch before use: what a core reads while memory answers
constexpr int64_t kTileBytes = 1024;       // 16 rows of 64 bytes; a block of weights or of a tile of activations
constexpr int64_t kSumRows = 2 * kTile;    // rows of activations in the tiles at once

// Palette 1; from byte 16 on the bytes of a row, from 48 on the rows of each tile.
alignas(64) constexpr uint8_t kShape[64] = {1, 0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,   //
                                            64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,  //
                                            0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,  //
                                            16, 16, 16, 16, 16, 16, 16, 16};

// With operands that name all 64 bytes: g++ 12's own intrinsics name the first 8.
void shape_tiles() {
  __m512i now;
  asm volatile("sttilecfg %0" : "=m"(now));
  const auto& wanted = *reinterpret_cast<const __m512i*>(kShape);
  if (_mm512_cmpneq_epi64_mask(now, wanted)) asm volatile("ldtilecfg %0" ::"m"(wanted) : "memory");
}

__m512i bytes_of(const void* at) { return _mm512_loadu_si512(at); }

// The codes of quad j (of 8) of inputs, 4 of each of the 16 outputs, of the half block that begins at input k.
template <int Bits>
__m512i quad(const uint8_t* codes, int64_t k, int j) {
  if constexpr (Bits == 4) {
    const __m512i pair = bytes_of(codes + k * kPanel / 2 + j / 2 * 64);
    return _mm512_and_si512(j % 2 ? _mm512_srli_epi16(pair, 4) : pair, _mm512_set1_epi8(15));
  } else {
    const uint8_t* block = codes + k / kBlock * (kBlock * kPanel * Bits / 8);
    const __m512i four = bytes_of(block + k % kBlock * kPanel / 4 + j / 4 * 64);
    const auto shift = static_cast<unsigned>(j % 4 * 2);
    const __m512i low = _mm512_and_si512(_mm512_srli_epi16(four, shift), _mm512_set1_epi8(3));
    if constexpr (Bits == 2) return low;
    const __m512i third = _mm512_srli_epi16(bytes_of(block + 256 + k % kBlock * 2), static_cast<unsigned>(j));
    return _mm512_or_si512(low, _mm512_slli_epi16(_mm512_and_si512(third, _mm512_set1_epi8(1)), 2));
  }
}

template <int Bits>
void expand_any(const LinearFormat& f, const uint8_t* panel, int8_t* to) {
  const uint8_t* groups = panel + f.groups_at();
  const uint8_t* codes = panel + f.codes_at();
  const __m512i each_four_times = _mm512_set_epi32(
      0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,  //
      0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
  for (int64_t k = 0; k < f.padded(); k += 32) {
    for (int64_t line = 0; line < 32 * kPanel * Bits / 8; line += 64)
      _mm_prefetch(codes + k * kPanel * Bits / 8 + kAhead + line, _MM_HINT_T0);
    // Bytes times bytes in 16-bit lanes: a lane of two codes times one multiplier, as no product exceeds a byte
    // (at most 15 * 15), so that the lower never carries into the upper.
    const __m512i both = _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(groups + k / f.group * kPanel))),
        each_four_times);
    const __m512i multipliers = _mm512_and_si512(both, _mm512_set1_epi16(15));
    const __m512i zeros = _mm512_and_si512(_mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
    const __m512i least = _mm512_mullo_epi16(zeros, multipliers);
    const __m512i steps = Bits < 4 ? _mm512_add_epi16(multipliers, multipliers) : multipliers;
    for (int j = 0; j < 8; ++j)
      _mm512_store_si512(to + k * kPanel + 64 * j,
                         _mm512_sub_epi8(_mm512_mullo_epi16(quad<Bits>(codes, k, j), steps), least));
  }
}

void expand(const LinearFormat& f, const uint8_t* panel, int8_t* to) {
  switch (f.bits) {
    case 2: return expand_any<2>(f, panel, to);
    case 3: return expand_any<3>(f, panel, to);
    case 4: return expand_any<4>(f, panel, to);
    default: std::memcpy(to, panel + f.codes_at(), static_cast<size_t>(f.blocks() * kTileBytes));
  }
}

// What a call has in its tiles and on its way out of them: tiles 0 to 3 sum up to 32 rows times 2 panels, 4 and 5 are
// rows of activations, 6 and 7 panels.
template <int Panels>
struct Product {
  const LinearFormat& f;
  const uint8_t* const* headers;
  const Activations& a;
  const int64_t first;
  float* out;
  const int64_t ld, spans;
  int32_t (*const sums)[Panels * kPanel];  // of `span`, rows up to `end`; those from `row` on are not yet scaled
  int64_t span = 0, row = 0, end = 0;
  __m512 scales[Panels] = {};  // of `span`
  __m512i zeros[Panels] = {};

  static void zero(bool both) {
    _tile_zero(0);
    if constexpr (Panels == 2) _tile_zero(1);
    if (!both) return;
    _tile_zero(2);
    if constexpr (Panels == 2) _tile_zero(3);
  }

  // Adds a block of inputs; `next` bytes lead to the next sixteen rows and to the next panel. Loads stand just before
  // what first needs them, so that they and products alternate.
  static void add(const int8_t* x, const int8_t* weights, int64_t next, bool both) {
    _tile_loadd(6, weights, 64);
    _tile_loadd(4, x, 64);
    _tile_dpbssd(0, 4, 6);
    if constexpr (Panels == 2) {
      _tile_loadd(7, weights + next, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if (!both) return;
    _tile_loadd(5, x + next, 64);
    _tile_dpbssd(2, 5, 6);
    if constexpr (Panels == 2) _tile_dpbssd(3, 5, 7);
  }

  void store(int64_t at, int64_t count, int64_t of) {
    constexpr int64_t stride = Panels * kPanel * sizeof(int32_t);
    _tile_stored(0, sums[0], stride);
    if constexpr (Panels == 2) _tile_stored(1, sums[0] + kPanel, stride);
    if (count > kTile) {
      _tile_stored(2, sums[kTile], stride);
      if constexpr (Panels == 2) _tile_stored(3, sums[kTile] + kPanel, stride);
    }
    for (int p = 0; p < Panels; ++p) {
      auto zero = reinterpret_cast<const __m128i*>(headers[p] + f.groups_at() + of * kPanel);
      scales[p] = _mm512_loadu_ps(headers[p] + of * kPanel * sizeof(float));
      if (f.bits == 8) zeros[p] = _mm512_cvtepi8_epi32(_mm_loadu_si128(zero));
    }
    span = of, row = at, end = at + count;
  }

  // Scales what is stored, up to `most` rows of it.
  void scale(int64_t most) {
    const bool zeroed = f.bits == 8;
    const __mmask16 before = span ? 0xffff : 0;
    for (const int64_t until = std::min(row + most, end); row < until; ++row) {
      const int64_t index = (first + row) * spans + span;
      for (int p = 0; p < Panels; ++p) {
        __m512i sum = _mm512_load_si512(sums[row % kSumRows] + p * kPanel);
        if (zeroed) sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zeros[p], _mm512_set1_epi32(a.totals[index])));
        float* y = out + row * ld + p * kPanel;
        const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(a.scales[index]), scales[p]);
        _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, _mm512_maskz_loadu_ps(before, y)));
      }
    }
  }
};

template <int Panels>
void tile_any(const LinearFormat& f, const int8_t* weights, const uint8_t* const* headers, const Activations& a,
              int64_t first, int64_t count, float* out, int64_t ld) {
  shape_tiles();
  const int64_t blocks = f.blocks(), spans = f.spans(), span_blocks = f.span / kBlock, next = blocks * kTileBytes;
  alignas(64) int32_t sums[kSumRows][Panels * kPanel];
  Product<Panels> product{f, headers, a, first, out, ld, spans, sums};
  for (int64_t row = 0; row < count; row += kSumRows) {
    const int64_t rows = std::min(kSumRows, count - row);
    const bool both = rows > kTile;
    const int8_t* x = a.block(first + row, 0, blocks);
    const int8_t* w = weights;
    for (int64_t span = 0; span < spans; ++span) {
      const int64_t length = std::min(span_blocks, blocks - span * span_blocks);
      const int64_t share = kSumRows / length + 1;
      product.zero(both);
      for (int64_t block = 0; block < length; ++block, x += kTileBytes, w += kTileBytes) {
        product.add(x, w, next, both);
        if (block) product.scale(share);  // of the span before, whose stores had a block's time to arrive
      }
      product.scale(kSumRows);
      product.store(row, rows, span);
    }
  }
  product.scale(kSumRows);
}

void tile(const LinearFormat& f, const int8_t* weights, const uint8_t* const* headers, int panels,
          const Activations& a, int64_t first, int64_t count, float* out, int64_t ld) {
  (panels == 1 ? tile_any<1> : tile_any<2>)(f, weights, headers, a, first, count, out, ld);
}

}  // namespace

const LinearPath* linear_amx() {
  static const LinearPath path = [] {
    LinearPath amx = *linear_avx512();
    amx.name = "amx";
    amx.expand = expand;
    amx.tile = tile;
    return amx;
  }();
  return &path;
}

}  // namespace shoal

#else
const shoal::LinearPath* shoal::linear_amx() { return nullptr; }
#endif
