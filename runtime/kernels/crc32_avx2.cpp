// CRC-32 by carry-less products: 64 bytes are folded onto the next 64 at a time, which any power of x modulo the
// polynomial allows, then onto 16, and the last 128 bits are reduced (Gopal et al. 2009). The constants are bits of
// x^n mod P, reflected and shifted by one: the first of a pair is for a register's high half.
#include "crc32.h"

#if defined(__PCLMUL__) && defined(__AVX2__)
#include <immintrin.h>

namespace shoal {
namespace {

// `of`, carried over as many bits as `powers` are for, onto `next`
__m128i fold(__m128i of, __m128i powers, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(of, powers, 0x00), high = _mm_clmulepi64_si128(of, powers, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

__m128i load(const uint8_t* data) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data)); }

}  // namespace

uint32_t crc32_avx2(uint32_t state, const uint8_t* data, size_t size) {
  if (size < 64) return crc32_scalar(state, data, size);
  const __m128i over_512 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4);   // x^(512 - 32), x^(512 + 32)
  const __m128i over_128 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);   // x^(128 - 32), x^(128 + 32)
  const __m128i over_64 = _mm_set_epi64x(0, 0x163cd6124);              // x^64
  const __m128i reduction = _mm_set_epi64x(0x1f7011641, 0x1db710641);  // floor(x^64 / P), P
  const __m128i half = _mm_setr_epi32(-1, 0, -1, 0);
  __m128i lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = load(data + 16 * i);
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(state)));
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64)
    for (int i = 0; i < 4; ++i) lanes[i] = fold(lanes[i], over_512, load(data + 16 * i));
  __m128i all = lanes[0];
  for (int i = 1; i < 4; ++i) all = fold(all, over_128, lanes[i]);
  for (; size >= 16; data += 16, size -= 16) all = fold(all, over_128, load(data));
  all = _mm_xor_si128(_mm_srli_si128(all, 8), _mm_clmulepi64_si128(all, over_128, 0x10));  // 96 bits
  all = _mm_xor_si128(_mm_srli_si128(all, 4), _mm_clmulepi64_si128(_mm_and_si128(all, half), over_64, 0x00));
  __m128i times = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(all, half), reduction, 0x10), half);
  times = _mm_clmulepi64_si128(times, reduction, 0x00);
  state = static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(all, times), 1));
  return crc32_scalar(state, data, size);
}

}  // namespace shoal
#else
namespace shoal {
uint32_t crc32_avx2(uint32_t state, const uint8_t* data, size_t size) { return crc32_scalar(state, data, size); }
}  // namespace shoal
#endif
