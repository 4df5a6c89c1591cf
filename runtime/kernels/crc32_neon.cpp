// CRC-32 by the instruction that Armv8.1 requires, eight bytes at a step.
#include "crc32.h"

#if defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>

#include <cstring>

namespace shoal {

uint32_t crc32_neon(uint32_t state, const uint8_t* data, size_t size) {
  for (; size >= 8; data += 8, size -= 8) {
    uint64_t eight;
    std::memcpy(&eight, data, 8);
    state = __crc32d(state, eight);
  }
  for (; size; ++data, --size) state = __crc32b(state, *data);
  return state;
}

}  // namespace shoal
#else
namespace shoal {
uint32_t crc32_neon(uint32_t state, const uint8_t* data, size_t size) { return crc32_scalar(state, data, size); }
}  // namespace shoal
#endif
