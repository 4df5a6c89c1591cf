// What every attention path does alike: a head's vector is normed and rotated before it is attended or stored, a row
// sees certain positions, scratch memory is cut. Everything is static, since each path is compiled for another
// processor; the order of operations is fixed, so that what is stored has the same bits whichever path stored it.
#pragma once
#include <math.h>
#include <string.h>

#include "attention.h"

namespace shoal {
namespace {

constexpr int64_t kMostHeadDim = 512;
constexpr int64_t kKeys = 64;            // positions of a block
constexpr int64_t kMostQueries = 256;    // of a block
constexpr int64_t kQueryFloats = 16384;  // of a block's queries, at most

template <class T>
T least(T a, T b) {
  return b < a ? b : a;
}

template <class T>
T most(T a, T b) {
  return a < b ? b : a;
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Scratch memory of a block of queries against a block of keys, as offsets in floats.
struct Scratch {
  int64_t count;  // of queries
  int64_t queries, sums, totals, keys, values, floats;
  explicit Scratch(const AttentionShape& shape) : Scratch(shape, round_up(shape.head_dim, 16)) {}
  Scratch(const AttentionShape& shape, int64_t padded)
      : count(least(kMostQueries, kQueryFloats / shape.head_dim)),
        queries(0),
        sums(queries + count * padded),
        totals(sums + count * padded),
        keys(totals + count * 16),
        values(keys + padded * kKeys),
        floats(values + padded * kKeys) {}
};

// The same where both are rounded to integers; queries are taken in sixes. Key pairs and value pairs are of 16 bits, value
// quads of 8.
struct FastScratch {
  static constexpr int64_t count = 384;
  int64_t queries, scales, peaks, sums, totals, middle, keys, values, key_pairs, key_scales, pairs, pair_scales, quads,
      quad_scales, floats;
  explicit FastScratch(int64_t padded)
      : queries(0),
        scales(queries + count * padded / 2),
        peaks(scales + count),
        sums(peaks + count),
        totals(sums + count * padded),
        middle(totals + count * 16),
        keys(middle + padded),
        values(keys + padded * kKeys),
        key_pairs(values + padded * kKeys),
        key_scales(key_pairs + padded * kKeys / 2),
        pairs(key_scales + kKeys),
        pair_scales(pairs + padded * kKeys / 2),
        quads(pair_scales + padded),
        quad_scales(quads + padded * kKeys / 4),
        floats(quad_scales + padded) {}
};

// Where scratch memory begins: on a cache line.
inline float* aligned(void* memory) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

// The vector of `head` (queries, then keys, then values) of new position `row`.
const float* new_vector(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t row,
                        int64_t head) {
  const int64_t heads = shape.heads + 2 * shape.kv_heads;
  return call.qkv + ((sequence * call.length + row) * heads + head) * shape.head_dim;
}

int64_t position_of(const AttentionCall& call, int64_t sequence, int64_t row) {
  return call.last[sequence] - call.length + 1 + row;
}

// The scales of `kv_head`'s channels, or null.
const float* channel_scales(const AttentionShape& shape, const float* scales, int64_t kv_head) {
  return scales ? scales + kv_head * shape.head_dim : nullptr;
}

// The first position that `position` sees; the last is itself.
int64_t first_seen(const AttentionShape& shape, int64_t position) {
  return shape.window ? most<int64_t>(0, position - shape.window + 1) : 0;
}

// to = x as it is at `position`: RMS-normed where `norm` is given, and rotated.
void turn(const AttentionShape& shape, const AttentionCall& call, const float* x, const float* norm, int64_t position,
          float* to) {
  const int64_t n = shape.head_dim, pairs = shape.pairs;
  if (norm) {
    float strands[16] = {};  // sums that a vector unit may keep beside each other
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
      for (int j = 0; j < 16; ++j) strands[j] += x[i + j] * x[i + j];
    for (; i < n; ++i) strands[i % 16] += x[i] * x[i];
    float sum = 0;
    for (float strand : strands) sum += strand;
    const float factor = 1.0f / sqrtf(sum / static_cast<float>(n) + shape.epsilon);
    for (i = 0; i < n; ++i) to[i] = x[i] * factor * norm[i];
  } else {
    memcpy(to, x, n * sizeof(float));
  }
  const float *cos = call.cos + position * pairs, *sin = call.sin + position * pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = to[i], b = to[i + pairs];
    to[i] = a * cos[i] - b * sin[i];
    to[i + pairs] = b * cos[i] + a * sin[i];
  }
}

// Clipped first: what is not a number becomes -128 too.
int8_t to_int8(float x, float scale) {
  const float code = rintf(x / scale);
  const float clipped = code > -128.0f ? code : -128.0f;
  return static_cast<int8_t>(clipped < 127.0f ? clipped : 127.0f);
}

}  // namespace
}  // namespace shoal
