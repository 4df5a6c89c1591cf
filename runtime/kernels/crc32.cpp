// CRC-32 by tables, eight bytes at a step, and the choice of a faster one.
#include "crc32.h"

#include <array>

#include "isa.h"

namespace shoal {

uint32_t crc32_scalar(uint32_t state, const uint8_t* data, size_t size) {
  static const auto tables = [] {
    std::array<std::array<uint32_t, 256>, 8> found{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t value = byte;
      for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
      found[0][byte] = value;
    }
    for (size_t step = 1; step < 8; ++step)
      for (size_t byte = 0; byte < 256; ++byte)
        found[step][byte] = found[step - 1][byte] >> 8 ^ found[0][found[step - 1][byte] & 255];
    return found;
  }();
  for (; size >= 8; data += 8, size -= 8) {
    uint32_t low = 0, high = 0;
    for (uint32_t i = 0; i < 4; ++i) {
      low |= static_cast<uint32_t>(data[i]) << 8 * i;
      high |= static_cast<uint32_t>(data[4 + i]) << 8 * i;
    }
    low ^= state;
    state = tables[7][low & 255] ^ tables[6][low >> 8 & 255] ^ tables[5][low >> 16 & 255] ^ tables[4][low >> 24] ^
            tables[3][high & 255] ^ tables[2][high >> 8 & 255] ^ tables[1][high >> 16 & 255] ^ tables[0][high >> 24];
  }
  for (; size; ++data, --size) state = state >> 8 ^ tables[0][(state ^ *data) & 255];
  return state;
}

uint32_t crc32(const uint8_t* data, size_t size) {
#if defined(__x86_64__)
  if (isa().avx2) return ~crc32_avx2(~0u, data, size);
#elif defined(__aarch64__)
  if (isa().neon) return ~crc32_neon(~0u, data, size);
#endif
  return ~crc32_scalar(~0u, data, size);
}

}  // namespace shoal
