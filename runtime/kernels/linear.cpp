// One product of quantised weights, as they are where there are few rows, expanded where there are many (spread.h).
#include "linear.h"

#include "spread.h"

namespace shoal {
namespace {

constexpr int64_t kItemRows = 64;  // at least: expanding two panels costs as much as five rows

}  // namespace

bool LinearFormat::valid() const {
  auto within = [](int64_t value, int64_t most) { return value >= 1 && value <= most; };
  if (!within(inputs, 1 << 20) || !within(outputs, 1 << 26) || !within(span, 65536) || span % kBlock) return false;
  if (span > padded() || !within(group, span) || span % group) return false;
  if (rotated && inputs % kBlock) return false;
  if (bits == 8) return group == span;
  return (bits == 2 || bits == 3 || bits == 4) && group % 32 == 0;
}

bool linear(const LinearPath& path, const LinearFormat& f, const LinearCall& call, const Parallel& parallel) {
  if (call.rows == 0) return true;
  const Quantized quantized(f, call.rows);
  if (!quantized || !quantize_rows(path, f, call, quantized.a, parallel)) return false;
  auto panel = [&](int64_t index) { return call.weights + index * f.panel_bytes(); };
  if (call.rows < kTile) {
    few(path, f, call, quantized.a, parallel, kPieceBytes / f.panel_bytes(), [&](int64_t first, int64_t, auto&& use) {
      const uint8_t* const panels[] = {panel(first), panel(first + 1)};
      use(panels);
    });
    return true;
  }
  return many(path, f, call, quantized.a, parallel, kItemRows, 0, [&](int64_t index, uint8_t*, int8_t* weights) {
    path.expand(f, panel(index), weights);
    return panel(index);
  });
}

}  // namespace shoal
