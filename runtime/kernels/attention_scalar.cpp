// Attention in plain C++: what the other paths are compared with, and what runs where none of them can.
#include <float.h>

#include "attention_head.h"

namespace shoal {
namespace {

float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, size = half & 0x7fffu;
  if (size < 0x400) {  // a multiple of 2^-24
    const float value = static_cast<float>(size) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | ((size << 13) + ((size < 0x7c00 ? 112u : 224u) << 23));
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// To nearest, ties to even.
uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) half = 0x7e00u;        // not a number
  else if (size >= 0x477ff000u) half = 0x7c00u;  // beyond the largest half
  else if (size < 0x38800000u) half = static_cast<uint32_t>(rintf(fabsf(value) * 0x1p24f));
  else half = ((size + 0xfffu + (size >> 13 & 1u)) >> 13) - (112u << 10);
  return static_cast<uint16_t>(sign | half);
}

void load(const AttentionShape& shape, const void* cache, int64_t at, const float* scale, float* to) {
  for (int64_t i = 0; i < shape.head_dim; ++i) {
    switch (shape.cache) {
      case CacheType::f32: to[i] = static_cast<const float*>(cache)[at + i]; break;
      case CacheType::f16: to[i] = half_to_float(static_cast<const uint16_t*>(cache)[at + i]); break;
      case CacheType::i8: to[i] = static_cast<float>(static_cast<const int8_t*>(cache)[at + i]) * scale[i]; break;
    }
  }
}

void save(const AttentionShape& shape, const float* from, const float* scale, void* cache, int64_t at) {
  for (int64_t i = 0; i < shape.head_dim; ++i) {
    switch (shape.cache) {
      case CacheType::f32: static_cast<float*>(cache)[at + i] = from[i]; break;
      case CacheType::f16: static_cast<uint16_t*>(cache)[at + i] = float_to_half(from[i]); break;
      case CacheType::i8: static_cast<int8_t*>(cache)[at + i] = to_int8(from[i], scale[i]); break;
    }
  }
}

void store(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head, int64_t from,
           int64_t to) {
  const int64_t n = shape.head_dim;
  const float* k_scale = channel_scales(shape, call.k_scale, kv_head);
  const float* v_scale = channel_scales(shape, call.v_scale, kv_head);
  float key[kMostHeadDim];
  for (int64_t row = from; row < to; ++row) {
    const int64_t position = position_of(call, sequence, row);
    const int64_t at = ((sequence * shape.kv_heads + kv_head) * shape.capacity + position) * n;
    turn(shape, call, new_vector(shape, call, sequence, row, shape.heads + kv_head), call.k_norm, position, key);
    save(shape, key, k_scale, call.keys, at);
    save(shape, new_vector(shape, call, sequence, row, shape.heads + shape.kv_heads + kv_head), v_scale, call.values,
         at);
  }
}

// The query of `head` of new position `row` over the keys of positions [from, to); `out` is not yet over the total.
struct Peak {
  float peak, total;
};
Peak attend_one(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t row, int64_t head,
                int64_t from, int64_t to, float* out) {
  const int64_t n = shape.head_dim, kv_head = head / (shape.heads / shape.kv_heads);
  const int64_t cache = (sequence * shape.kv_heads + kv_head) * shape.capacity;
  const int64_t position = position_of(call, sequence, row);
  const float* k_scale = channel_scales(shape, call.k_scale, kv_head);
  const float* v_scale = channel_scales(shape, call.v_scale, kv_head);
  float query[kMostHeadDim], x[kMostHeadDim], peak = -FLT_MAX, total = 0;
  turn(shape, call, new_vector(shape, call, sequence, row, head), call.q_norm, position, query);
  for (int64_t i = 0; i < n; ++i) out[i] = 0;
  const int64_t end = least(to, position + 1);
  for (int64_t seen = most(from, first_seen(shape, position)); seen < end; ++seen) {
    load(shape, call.keys, (cache + seen) * n, k_scale, x);
    float score = 0;
    for (int64_t i = 0; i < n; ++i) score += query[i] * x[i];
    score *= shape.scale;
    if (score > peak) {  // what was summed under the old peak shrinks
      const float shrink = expf(peak - score);
      total *= shrink;
      for (int64_t i = 0; i < n; ++i) out[i] *= shrink;
      peak = score;
    }
    const float weight = expf(score - peak);
    total += weight;
    load(shape, call.values, (cache + seen) * n, v_scale, x);
    for (int64_t i = 0; i < n; ++i) out[i] += weight * x[i];
  }
  for (int64_t i = 0; i < n; ++i) out[i] /= total;
  return {peak, total};
}

void attend(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head, int64_t from,
            int64_t to, void*) {
  const int64_t n = shape.head_dim, group = shape.heads / shape.kv_heads;
  for (int64_t row = from; row < to; ++row)
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      attend_one(shape, call, sequence, row, head, 0, INT64_MAX,
                 call.out + ((sequence * call.length + row) * shape.heads + head) * n);
}

void attend_part(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head,
                 const AttentionPart& part, void*) {
  const int64_t group = shape.heads / shape.kv_heads;
  for (int64_t i = 0; i < call.length * group; ++i) {
    const Peak found = attend_one(shape, call, sequence, i / group, kv_head * group + i % group, part.from, part.to,
                                  part.out + i * shape.head_dim);
    part.peaks[i] = found.peak * 1.44269504f;
    part.totals[i] = found.total;
  }
}

}  // namespace

size_t scratch_bytes(const AttentionShape& shape) {
  const int64_t floats = most(Scratch(shape).floats, shape.fast ? FastScratch(round_up(shape.head_dim, 16)).floats : 0);
  return static_cast<size_t>(floats) * sizeof(float) + 64;  // 64: see aligned
}

const AttentionPath& attention_scalar() {
  static const AttentionPath path = {"scalar", store, attend, attend_part};
  return path;
}

}  // namespace shoal
