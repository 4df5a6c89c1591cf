// CRC-32 as zlib has it (polynomial 0xEDB88320, reflected), by the processor's own instructions where it has them: a
// record that is read for the first time should not wait longer for its checksum than for the flash.
#pragma once
#include <cstddef>
#include <cstdint>

namespace shoal {

uint32_t crc32(const uint8_t* data, size_t size);

// The parts that `state` goes through, begun at ~0 and inverted at the end; any size, any address.
uint32_t crc32_scalar(uint32_t state, const uint8_t* data, size_t size);
uint32_t crc32_avx2(uint32_t state, const uint8_t* data, size_t size);
uint32_t crc32_neon(uint32_t state, const uint8_t* data, size_t size);

}  // namespace shoal
