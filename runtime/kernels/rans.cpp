// rANS: see rans.h. An encoder goes from the last symbol to the first, so that a decoder can go forward.
#include "rans.h"

#define SHOAL_API extern "C" __attribute__((visibility("default")))

namespace shoal {
namespace {

constexpr uint32_t kMask = (1u << kRansBits) - 1;

constexpr uint32_t first_state(int lanes) { return lanes == 1 ? kRansAlone : kRansLow; }

// Calls work(table, first, last) for runs of elements that share a table, forward or backward.
template <class Work>
void in_tables(const RansFormat& format, const RansTables& tables, bool backward, Work&& work) {
  const int64_t runs = format.batch * format.channels;
  int64_t channel = backward ? format.channels - 1 : 0;
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t run = backward ? runs - 1 - i : i;
    if (!work(tables.of[channel], run * format.inner, (run + 1) * format.inner)) return;
    channel += backward ? -1 : 1;
    if (channel < 0 || channel == format.channels) channel = backward ? format.channels - 1 : 0;
  }
}

template <int lanes>
int64_t encode(const RansFormat& format, const RansTables& tables, const uint8_t* symbols, uint8_t* end) {
  uint32_t states[lanes];
  for (auto& state : states) state = first_state(lanes);
  uint8_t* at = end;
  in_tables(format, tables, true, [&](int64_t table, int64_t first, int64_t i) {
    const uint32_t* of = tables.symbols + (table << format.bits);
    auto put = [&](uint32_t& state, uint8_t symbol) {
      const uint32_t frequency = of[symbol] & 0xFFFF, start = of[symbol] >> 16;
      if (state >= frequency << (32 - kRansBits)) {
        *--at = static_cast<uint8_t>(state >> 8);
        *--at = static_cast<uint8_t>(state);
        state >>= 16;
      }
      state = (state / frequency << kRansBits) + state % frequency + start;
    };
    while (i > first && i % lanes) --i, put(states[i % lanes], symbols[i]);
    uint32_t own[lanes];  // in registers
    for (int lane = 0; lane < lanes; ++lane) own[lane] = states[lane];
    for (; i - first >= lanes; i -= lanes)
      for (int lane = lanes - 1; lane >= 0; --lane) put(own[lane], symbols[i - lanes + lane]);
    for (int lane = 0; lane < lanes; ++lane) states[lane] = own[lane];
    while (i > first) --i, put(states[i % lanes], symbols[i]);
    return true;
  });
  for (int lane = lanes - 1; lane >= 0; --lane)
    for (int byte = 3; byte >= 0; --byte)
      if (lanes > 1 || states[lane] >> 8 * byte) *--at = static_cast<uint8_t>(states[lane] >> 8 * byte);
  return end - at;
}

template <int lanes>
bool decode(const RansFormat& format, const RansTables& tables, const uint8_t* data, int64_t size, uint8_t* symbols) {
  // One state takes 3 or 4 bytes where words follow, which are of 2: so the size says which
  const int64_t head = lanes > 1 ? 4 * lanes : size <= 4 ? size : 4 - size % 2;
  if (size < head || (size - head) % 2) return false;
  uint32_t states[lanes] = {};
  for (int64_t byte = 0; byte < head; ++byte) states[byte / 4] |= static_cast<uint32_t>(data[byte]) << 8 * (byte % 4);
  if (lanes == 1 && head && !data[head - 1]) return false;  // a shorter one would say the same
  for (auto& state : states)
    if (lanes > 1 && state < kRansLow) return false;
  const uint8_t *at = data + head, *const end = data + size;
  bool right = true;
  in_tables(format, tables, false, [&](int64_t table, int64_t i, int64_t last) {
    const uint32_t* of = tables.symbols + (table << format.bits);
    const uint8_t* slots = tables.slots + (table << kRansBits);
    auto get = [&](uint32_t& state) {
      const uint32_t slot = state & kMask;
      const uint8_t symbol = slots[slot];
      state = (of[symbol] & 0xFFFF) * (state >> kRansBits) + slot - (of[symbol] >> 16);
      if (state < kRansLow) {
        if (at != end) {
          state = state << 16 | static_cast<uint32_t>(at[1]) << 8 | at[0];
          at += 2;
        } else if (lanes > 1) {
          right = false;
        }
      }
      return symbol;
    };
    while (i < last && i % lanes) symbols[i] = get(states[i % lanes]), ++i;
    uint32_t own[lanes];
    for (int lane = 0; lane < lanes; ++lane) own[lane] = states[lane];
    for (; last - i >= lanes; i += lanes)
      for (int lane = 0; lane < lanes; ++lane) symbols[i + lane] = get(own[lane]);
    for (int lane = 0; lane < lanes; ++lane) states[lane] = own[lane];
    while (i < last) symbols[i] = get(states[i % lanes]), ++i;
    return right;
  });
  for (auto state : states) right = right && state == first_state(lanes);
  return right && at == end;
}

}  // namespace

bool RansFormat::valid() const {
  if (bits < 1 || bits > 8 || batch < 1 || channels < 1 || inner < 1) return false;
  return batch <= kRansMost && channels <= kRansMost / batch && inner <= kRansMost / (batch * channels);
}

int64_t rans_encode(const RansFormat& format, const RansTables& tables, const uint8_t* symbols, uint8_t* end) {
  uint8_t all = 0;
  for (int64_t i = 0; i < format.elements(); ++i) all |= symbols[i];
  if (all >> format.bits) return -1;
  return format.lanes() == 1 ? encode<1>(format, tables, symbols, end) : encode<kRansLanes>(format, tables, symbols, end);
}

bool rans_decode(const RansFormat& format, const RansTables& tables, const uint8_t* data, int64_t size, uint8_t* symbols) {
  return format.lanes() == 1 ? decode<1>(format, tables, data, size, symbols)
                             : decode<kRansLanes>(format, tables, data, size, symbols);
}

}  // namespace shoal

using namespace shoal;

namespace {

enum Problem { kDone = 0, kFormat = 1, kRange = 4 };

}  // namespace

// Symbols uint8 [batch][channels][inner] into the last *size bytes of `out`, of which there are `room`; tables as rans.h
// says.
SHOAL_API int shoal_rans_encode(int bits, int64_t batch, int64_t channels, int64_t inner, const uint16_t* of,
                                const uint32_t* tables, const uint8_t* symbols, uint8_t* out, int64_t room, int64_t* size) {
  const RansFormat format{bits, batch, channels, inner};
  if (!format.valid() || room < format.most_bytes()) return kFormat;
  *size = rans_encode(format, {of, tables, nullptr}, symbols, out + room);
  return *size < 0 ? kRange : kDone;
}

// Those symbols from `size` bytes; *right is 0 where no encoder would have made these, and the symbols are then nothing.
SHOAL_API int shoal_rans_decode(int bits, int64_t batch, int64_t channels, int64_t inner, const uint16_t* of,
                                const uint32_t* tables, const uint8_t* slots, const uint8_t* data, int64_t size,
                                uint8_t* symbols, int* right) {
  const RansFormat format{bits, batch, channels, inner};
  if (!format.valid() || size < 0) return kFormat;
  *right = rans_decode(format, {of, tables, slots}, data, size, symbols);
  return kDone;
}
