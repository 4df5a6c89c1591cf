// CRC-32 of random bytes, of every short length and of long ones, at every alignment, against one bit at a time.
#include "crc32.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

uint32_t bit_by_bit(const uint8_t* data, size_t size) {
  uint32_t value = ~0u;
  for (; size; --size) {
    value ^= *data++;
    for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
  }
  return ~value;
}

}  // namespace

int main(int count, char** arguments) {
  std::mt19937 random(count > 1 ? std::atoi(arguments[1]) : 1);
  const int rounds = count > 2 ? std::atoi(arguments[2]) : 100;
  const uint8_t digits[] = {'1', '2', '3', '4', '5', '6', '7', '8', '9'};
  bool right = shoal::crc32(digits, 9) == 0xCBF43926u;  // the published check value
  for (int round = 0; round < rounds && right; ++round)
    for (size_t size = 0; size < 400 && right; size += 1 + random() % 5) {
      const size_t start = random() % 17, all = round % 10 ? size : size * 97;
      std::vector<uint8_t> data(start + all);  // its end is the end of what may be read
      for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
      right = shoal::crc32(data.data() + start, all) == bit_by_bit(data.data() + start, all);
      if (!right) std::fprintf(stderr, "%zu bytes from %zu on\n", all, start);
    }
  if (right) std::puts("all as it should be");
  return !right;
}
