// The kernels as plain C functions, for Python and whoever else: nothing of an engine, threads made for the call.
// Every function returns 0 where it was done, and what was wrong otherwise.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "linear.h"
#include "scratch.h"
#include "stack_path.h"
#include "own_threads.h"

#define SHOAL_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace shoal;

enum Problem { kDone = 0, kFormat = 1, kMemory = 2, kPath = 3, kRange = 4 };

}  // namespace

// The instruction set in use.
SHOAL_API const char* shoal_isa() { return linear_path().name; }

// Whether the path of that name runs here.
SHOAL_API int shoal_has(const char* path) { return linear_path(path) != nullptr; }

// Of a matrix: bytes of one panel, 0 where the format is impossible.
SHOAL_API int64_t shoal_linear_panel_bytes(int64_t inputs, int64_t outputs, int bits, int64_t group, int64_t span, int rotated) {
  LinearFormat format{inputs, outputs, bits, group, span, rotated != 0};
  return format.valid() ? format.panel_bytes() : 0;
}

// y = W x; `path` null is the fastest, `norm`, `bias` and `residual` may be null, `activation` as linear.h numbers them.
SHOAL_API int shoal_linear(const char* path, int64_t inputs, int64_t outputs, int bits, int64_t group, int64_t span, int rotated,
                           const uint8_t* weights, int64_t weight_bytes, int64_t rows, const float* x,
                           const float* norm, float epsilon, const float* bias, const float* residual, int activation,
                           float* y, int threads) {
  LinearFormat format{inputs, outputs, bits, group, span, rotated != 0};
  if (!format.valid() || weight_bytes < format.bytes() || rows < 0 || activation < 0 || activation > 4) return kFormat;
  if (activation && (outputs % (2 * kPanel) || bias || residual)) return kFormat;
  const LinearPath* chosen = path ? linear_path(path) : &linear_path();
  if (!chosen) return kPath;
  Threads pool{threads < 1 ? 1 : threads};
  LinearCall call{rows, x, weights, norm, epsilon, bias, residual, static_cast<Activation>(activation), y};
  return linear(*chosen, format, call, pool.parallel()) ? kDone : kMemory;
}

SHOAL_API int shoal_linear_rows(int64_t inputs, int64_t outputs, int bits, int64_t group, int64_t span, int rotated,
                                const uint8_t* weights, int64_t weight_bytes, const int64_t* ids, int64_t count,
                                float* y) {
  LinearFormat format{inputs, outputs, bits, group, span, rotated != 0};
  if (!format.valid() || weight_bytes < format.bytes()) return kFormat;
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= outputs) return kRange;
  linear_rows(format, weights, ids, count, 1, y);
  return kDone;
}

// The stacked matrix of `count` payloads, each of `payload_bytes`, on top of `base` (its format is bits, group and span;
// null: none), times x: as shoal_linear.
SHOAL_API int shoal_stacked(const char* path, int64_t inputs, int64_t outputs, int rank, int rotated,
                            const uint8_t* const* payloads, int64_t payload_bytes, int count, int bits, int64_t group,
                            int64_t span, const uint8_t* base, int64_t base_bytes, int64_t rows, const float* x,
                            const float* norm, float epsilon, const float* bias, const float* residual, int activation,
                            float* y, int threads) {
  const StackFormat format{inputs, outputs, rank, rotated != 0};
  const LinearFormat base_format{inputs, outputs, bits, group, span, rotated != 0};
  if (!format.valid() || count < 0 || count > kStackLevels || (count && payload_bytes < format.bytes())) return kFormat;
  if (base ? !base_format.valid() || base_bytes < base_format.bytes() : !count) return kFormat;
  if (rows < 0 || activation < 0 || activation > 4) return kFormat;
  if (activation && (outputs % (2 * kPanel) || bias || residual)) return kFormat;
  const LinearPath* linear = path ? linear_path(path) : &linear_path();
  const StackPath* stack = path ? stack_path(path) : &stack_path();
  if (!linear || !stack) return kPath;
  Threads pool{threads < 1 ? 1 : threads};
  LinearCall call{rows, x, nullptr, norm, epsilon, bias, residual, static_cast<Activation>(activation), y};
  return stack_linear(*linear, *stack, format, {&base_format, base, payloads, count}, call, pool.parallel()) ? kDone : kMemory;
}

SHOAL_API int shoal_stacked_rows(int64_t inputs, int64_t outputs, int rank, int rotated, const uint8_t* const* payloads,
                                 int64_t payload_bytes, int count, int bits, int64_t group, int64_t span,
                                 const uint8_t* base, int64_t base_bytes, const int64_t* ids, int64_t number, float* y) {
  const StackFormat format{inputs, outputs, rank, rotated != 0};
  const LinearFormat base_format{inputs, outputs, bits, group, span, rotated != 0};
  if (!format.valid() || count < 0 || count > kStackLevels || (count && payload_bytes < format.bytes())) return kFormat;
  if (base ? !base_format.valid() || base_bytes < base_format.bytes() : !count) return kFormat;
  for (int64_t i = 0; i < number; ++i)
    if (ids[i] < 0 || ids[i] >= outputs) return kRange;
  stack_rows(format, {&base_format, base, payloads, count}, ids, number, 1, y);
  return kDone;
}

// Multiply-adds a second of the fastest path on `threads` threads, on 8-bit weights and rows that stay in the first
// cache: what a product of many rows could reach.
SHOAL_API double shoal_peak(int threads) {
  const LinearPath& path = linear_path();
  const LinearFormat format{256, 2 * kPanel, 8, 256, 256, false};
  const int64_t rounds = 4000;
  std::atomic<bool> enough{true};
  auto work = [&] {
    Scratch scratch(static_cast<size_t>(format.bytes() + 2 * format.padded() * kPanel + kRows * format.padded() + (64 << 10)));
    if (!scratch) return void(enough = false);
    auto panels = scratch.take<uint8_t>(format.bytes());
    auto weights = scratch.take<int8_t>(2 * format.padded() * kPanel);
    Activations a{kRows, kTile, scratch.take<int8_t>(kRows * format.padded()), scratch.take<float>(kRows),
                  scratch.take<int32_t>(kRows), scratch.take<int32_t>(kRows)};
    auto x = scratch.take<float>(format.inputs), sums = scratch.take<float>(kRows * 2 * kPanel);
    std::memset(panels, 0, static_cast<size_t>(format.bytes()));
    std::memset(x, 0, static_cast<size_t>(format.inputs) * sizeof(float));
    for (int64_t row = 0; row < kRows; ++row) path.quantize(format, x, a, row);
    const uint8_t* headers[] = {panels, panels + format.panel_bytes()};
    for (int p = 0; p < 2; ++p) path.expand(format, headers[p], weights + p * format.padded() * kPanel);
    for (int64_t i = 0; i < rounds; ++i) path.tile(format, weights, headers, 2, a, 0, kRows, sums, 2 * kPanel);
  };
  const auto started = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  const int64_t products = rounds * kRows * format.inputs * format.outputs;
  return enough ? static_cast<double>(std::max(threads, 1)) * static_cast<double>(products) / seconds : 0;
}

// Reads `bytes` from `data` on `threads` threads, a word of each cache line, in the order of a product of one row; what
// is read is summed into *sum.
SHOAL_API int shoal_read(const uint8_t* data, int64_t bytes, int threads, uint64_t* sum) {
  Threads pool{threads < 1 ? 1 : threads};
  std::atomic<uint64_t> total{0};
  in_runs(pool.parallel(), bytes / 64, 512, [&](int64_t from, int64_t to) {
    uint64_t sums[4] = {};
    for (int64_t at = from; at < to; ++at) {
      uint64_t word;
      std::memcpy(&word, data + at * 64, 8);
      sums[at % 4] += word;
    }
    total += sums[0] + sums[1] + sums[2] + sums[3];
  });
  *sum = total;
  return kDone;
}
