// Signs of a BitStack, chosen with error feedback: what the converter does for every input of every block. Products of
// whole blocks of inputs are left to who calls; here is what goes input by input, for outputs side by side.
//
// All arrays are row-major, an input a row of `outputs` floats. `sizes` and `signs` have `count` (1 to 4) arrays each: the
// magnitudes of blocks that are chosen together, the largest first, and one byte for each sign.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "scratch.h"
#include "own_threads.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define SHOAL_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SHOAL_WIDE
#endif

namespace {

using namespace shoal;

constexpr int64_t kWide = 64;  // outputs side by side
constexpr int kMost = 4;

struct Choice {
  int64_t inputs, outputs;
  const float* factor;  // [inputs][ld]
  int64_t ld;
  int count;
  const float* const* sizes;
  uint8_t* const* signs;
};

// took = the levels nearest to want, and their signs.
inline void nearest(const Choice& c, int64_t at, int64_t wide, const float* want, float* took) {
  for (int64_t i = 0; i < wide; ++i) took[i] = 0;
  for (int b = 0; b < c.count; ++b) {
    const float* size = c.sizes[b] + at;
    uint8_t* sign = c.signs[b] + at;
    for (int64_t i = 0; i < wide; ++i) {
      const bool positive = want[i] >= took[i];
      sign[i] = positive;
      took[i] += positive ? size[i] : -size[i];
    }
  }
}

// From the last input to the first: w_j and the errors carried to it from those behind it, here and (in `carried`)
// before; what is left of w_j then goes on. Adds roots_j^2 (wanted - taken)^2 up.
SHOAL_WIDE double forward(const Choice& c, int64_t first, int64_t wide, const float* carried, float* left,
                          const float* roots, float* kept) {
  double error = 0;
  alignas(64) float want[kWide] = {}, took[kWide] = {};
  for (int64_t j = c.inputs - 1; j >= 0; --j) {
    const float* row = c.factor + j * c.ld;
    for (int64_t i = 0; i < wide; ++i) want[i] = carried[j * c.outputs + first + i];
    for (int64_t k = j + 1; k < c.inputs; ++k) {
      const float f = row[k];
      const float* e = kept + k * kWide;
      for (int64_t i = 0; i < kWide; ++i) want[i] += f * e[i];
    }
    nearest(c, j * c.outputs + first, wide, want, took);
    float* of = left + j * c.outputs + first;
    float* e = kept + j * kWide;
    float sum = 0;
    for (int64_t i = 0; i < wide; ++i) {
      of[i] -= took[i];
      e[i] = of[i];
      const float miss = want[i] - took[i];
      sum += miss * miss;
    }
    for (int64_t i = wide; i < kWide; ++i) e[i] = want[i] = 0;
    error += static_cast<double>(roots[j]) * roots[j] * sum;
  }
  return error;
}

// Each input once more, given all others: `pull` is moments * left as it was before, `moved` what the levels change by.
SHOAL_WIDE void again(const Choice& c, int64_t first, int64_t wide, const float* pull, float* left, float* moved,
                      float* kept) {
  alignas(64) float want[kWide] = {}, took[kWide] = {}, before[kWide] = {};
  for (int64_t j = 0; j < c.inputs; ++j) {
    const float* row = c.factor + j * c.ld;
    const int64_t at = j * c.outputs + first;
    for (int64_t i = 0; i < wide; ++i) want[i] = pull[at + i];
    for (int64_t k = 0; k < j; ++k) {
      const float f = row[k];
      const float* m = kept + k * kWide;
      for (int64_t i = 0; i < kWide; ++i) want[i] -= f * m[i];
    }
    for (int64_t i = 0; i < wide; ++i) before[i] = 0;
    for (int b = 0; b < c.count; ++b)
      for (int64_t i = 0; i < wide; ++i) before[i] += c.signs[b][at + i] ? c.sizes[b][at + i] : -c.sizes[b][at + i];
    const float inverse = 1 / row[j];
    for (int64_t i = 0; i < wide; ++i) want[i] = before[i] + want[i] * inverse;
    nearest(c, at, wide, want, took);
    float* m = kept + j * kWide;
    for (int64_t i = 0; i < wide; ++i) {
      m[i] = took[i] - before[i];
      left[at + i] -= m[i];
      moved[at + i] = m[i];
    }
    for (int64_t i = wide; i < kWide; ++i) m[i] = want[i] = 0;
  }
}

// Calls work(first, wide, scratch) for all outputs; false where memory ran out.
template <class Work>
bool over_outputs(const Choice& c, int threads, Work&& work) {
  Threads pool{std::max(threads, 1)};
  bool enough = true;
  pool.parallel()((c.outputs + kWide - 1) / kWide, [&](int64_t item) {
    Scratch scratch(static_cast<size_t>(c.inputs * kWide) * sizeof(float));
    if (!scratch) return __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
    work(item, item * kWide, std::min(kWide, c.outputs - item * kWide), scratch.take<float>(c.inputs * kWide));
  });
  return enough;
}

}  // namespace

// 0 where it was done. `errors` has one sum for each 64 outputs.
extern "C" __attribute__((visibility("default"))) int shoal_signs(int64_t inputs, int64_t outputs, const float* carried,
                                                                  float* left, const float* factor, int64_t ld,
                                                                  const float* roots, int count, const float* const* sizes,
                                                                  uint8_t* const* signs, double* errors, int threads) {
  const Choice c{inputs, outputs, factor, ld, count, sizes, signs};
  if (inputs < 1 || outputs < 1 || ld < inputs || count < 1 || count > kMost) return 1;
  return over_outputs(c, threads, [&](int64_t item, int64_t first, int64_t wide, float* kept) {
    errors[item] = forward(c, first, wide, carried, left, roots, kept);
  }) ? 0 : 2;
}

extern "C" __attribute__((visibility("default"))) int shoal_signs_again(int64_t inputs, int64_t outputs, const float* pull,
                                                                        float* left, const float* moments, int64_t ld,
                                                                        int count, const float* const* sizes,
                                                                        uint8_t* const* signs, float* moved, int threads) {
  const Choice c{inputs, outputs, moments, ld, count, sizes, signs};
  if (inputs < 1 || outputs < 1 || ld < inputs || count < 1 || count > kMost) return 1;
  return over_outputs(c, threads, [&](int64_t, int64_t first, int64_t wide, float* kept) {
    again(c, first, wide, pull, left, moved, kept);
  }) ? 0 : 2;
}
