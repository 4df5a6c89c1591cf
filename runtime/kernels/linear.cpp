// One product, spread over threads: a few rows read each panel once; many rows expand some panels at a time into a
// thread's own scratch, and each tile of the activations meets all of them while it is in the caches.
#include "linear.h"

#include <algorithm>

#include "scratch.h"

namespace shoal {
namespace {

constexpr int64_t kPieceBytes = 32 << 10;  // of weights: a few microseconds of a core's share of memory speed
constexpr int64_t kItems = 8;             // a thread, so that one that started late or slowly does less
constexpr int64_t kItemRows = 64;         // at least: expanding two panels costs as much as five rows
constexpr size_t kExpanded = 512 << 10;   // bytes of panels: about half of a core's second cache

void few(const LinearPath& path, const LinearFormat& f, const LinearCall& call, const Activations& a,
         const Parallel& parallel) {
  const int64_t unit = call.activation == Activation::none ? 1 : 2, units = f.panels() / unit;
  in_runs(parallel, units, std::max<int64_t>(1, kPieceBytes / (f.panel_bytes() * unit)), [&](int64_t from, int64_t to) {
    alignas(64) float sums[kFew * 2 * kPanel];
    for (int64_t at = from; at < to; ++at)
      for (int64_t first = 0; first < call.rows; first += kFew) {
        const int64_t rows = std::min<int64_t>(kFew, call.rows - first);
        for (int64_t p = 0; p < unit; ++p)
          path.dot(f, call.weights + (at * unit + p) * f.panel_bytes(), a, first, rows, sums + p * kPanel, 2 * kPanel);
        path.finish(f, call, sums, 2 * kPanel, first, rows, at * unit, unit);
      }
  });
}

bool many(const LinearPath& path, const LinearFormat& f, const LinearCall& call, const Activations& a,
          const Parallel& parallel) {
  const size_t expanded = static_cast<size_t>(f.padded() * kPanel);
  const int64_t most = 4 * expanded <= kExpanded ? 4 : 2, items = (f.panels() + most - 1) / most;
  const int64_t wanted = (kItems * parallel.threads + items - 1) / items;  // parts of the rows
  int64_t step = std::max(kItemRows, (call.rows + wanted - 1) / wanted);
  step = (step + kRows - 1) / kRows * kRows;
  const int64_t parts = (call.rows + step - 1) / step;
  bool enough = true;
  parallel(items * parts, [&](int64_t item) {
    Scratch scratch(static_cast<size_t>(most) * expanded);
    if (!scratch) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    int8_t* weights = scratch.take<int8_t>(most * f.padded() * kPanel);
    const int64_t begin = item / parts * most, end = std::min(begin + most, f.panels());
    const uint8_t* headers[4];
    for (int64_t p = 0; p < end - begin; ++p) {
      headers[p] = call.weights + (begin + p) * f.panel_bytes();
      path.expand(f, headers[p], weights + static_cast<size_t>(p) * expanded);
    }
    alignas(64) float sums[kRows * 2 * kPanel];
    const int64_t last = std::min(call.rows, (item % parts + 1) * step);
    for (int64_t first = item % parts * step; first < last; first += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, last - first);
      for (int64_t p = 0; p < end - begin; p += 2) {
        const int64_t panels = std::min<int64_t>(2, end - begin - p);
        const int8_t* of = weights + static_cast<size_t>(p) * expanded;
        path.tile(f, of, headers + p, static_cast<int>(panels), a, first, rows, sums, 2 * kPanel);
        path.finish(f, call, sums, 2 * kPanel, first, rows, begin + p, panels);
      }
    }
  });
  return enough;
}

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
  Activations a{};
  a.rows = call.rows;
  a.tile = std::min<int64_t>(call.rows, kTile);
  const int64_t all = (call.rows + a.tile - 1) / a.tile * a.tile;
  auto room = [](int64_t count, size_t size) { return Scratch::round_up(static_cast<size_t>(count) * size); };
  Scratch scratch(room(all * f.padded(), 1) + 2 * room(call.rows * f.spans(), 4) + room(call.rows * f.groups(), 4));
  if (!scratch) return false;
  a.codes = scratch.take<int8_t>(all * f.padded());
  a.scales = scratch.take<float>(call.rows * f.spans());
  a.sums = scratch.take<int32_t>(call.rows * f.groups());
  a.totals = scratch.take<int32_t>(call.rows * f.spans());
  bool enough = true;
  auto quantize = [&](int64_t first, int64_t last) {
    Scratch prepared(static_cast<size_t>(f.inputs) * sizeof(float));
    float* values = prepared.take<float>(f.inputs);
    if (!prepared) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t row = first; row < last; ++row) {
      const float* x = call.x + row * f.inputs;
      const bool as_is = !call.norm && !f.rotated;
      if (!as_is) path.prepare(f, x, call.norm, call.epsilon, values);
      path.quantize(f, as_is ? x : values, a, row);
    }
  };
  if (call.rows <= kFew) {  // cheaper than waking a thread
    quantize(0, call.rows);
  } else {
    parallel((call.rows + 7) / 8, [&](int64_t item) { quantize(item * 8, std::min((item + 1) * 8, call.rows)); });
  }
  if (!enough) return false;
  if (call.rows < kTile) {
    few(path, f, call, a, parallel);
    return true;
  }
  return many(path, f, call, a, parallel);
}

}  // namespace shoal
