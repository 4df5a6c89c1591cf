// Attention with vectors, for any instruction set: the file that includes this one has defined `Lanes`, a vector of
// floats, in shoal's anonymous namespace.
//
// A block of queries (new positions x the heads that share the keys) meets the cache block by block (Dao et al. 2022).
// For many queries a block of keys is transposed once, and a block of values converted once, so that both products are
// the same small product: a scalar of the left side times vectors of the right one, summed in registers. For few, as in
// decoding, keys and values are taken from where they lie.
#include <float.h>

#include "attention_head.h"

namespace shoal {
namespace {

using Vector = Lanes::Vector;
constexpr int64_t kWidth = Lanes::width;
constexpr int kTile = 6;     // queries whose products are summed at once
constexpr int kFewTile = 4;  // where they are few
constexpr int64_t kAhead = 8192;  // bytes

// 2^x for x <= 0; zero below 2^-125. The polynomial is the minimax one of 2^f, |f| <= 1/2: 2e-9.
Vector exp2(Vector x) {
  const Vector whole = Lanes::round(x), f = Lanes::sub(x, whole);
  constexpr float terms[] = {0x1.5f456ap-10f, 0x1.3b2dbcp-7f, 0x1.c6aed4p-5f, 0x1.ebfbdap-3f, 0x1.62e430p-1f, 1.0f};
  Vector y = Lanes::set(0x1.41d334p-13f);
  for (float term : terms) y = Lanes::fma(y, f, Lanes::set(term));
  return Lanes::scale(y, whole);
}

// A vector of at most `count` numbers, zeros after them: memory beyond is not read.
template <class Number>
Vector load_first(const Number* from, int64_t count) {
  if (count >= kWidth) return Lanes::load(from);
  Number part[kWidth] = {};
  memcpy(part, from, count * sizeof(Number));
  return Lanes::load(part);
}

// Asks for `Count` numbers kAhead bytes after `from`. Memory that is read once, several rows beside each other, would
// come at half speed: what prefetches by itself follows a stream that is read from front to back.
template <int64_t Count, class Number>
void fetch(const Number* from) {
  const char* to = reinterpret_cast<const char*>(from) + kAhead;
#pragma GCC unroll 16
  for (int64_t i = 0; i < Count * int64_t{sizeof(Number)}; i += 64) __builtin_prefetch(to + i);
}

// c [Rows][Columns vectors] = c * shrink[row] + a [Rows][depth] * b [depth][Columns vectors]; null shrink: c was zero.
// `fetched`: of what to fetch on the way, as many numbers, or null. Loops are unrolled before all else, so that sums are registers from beginning to end.
template <int Rows, int Columns, class Number>
void multiply(const float* a, int64_t a_row, const Number* b, int64_t b_row, int64_t depth, const float* shrink,
              float* c, int64_t c_row, const Number* fetched) {
  Vector sum[Rows][Columns];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < Columns; ++i)
      sum[r][i] = shrink ? Lanes::mul(Lanes::load(c + r * c_row + i * kWidth), Lanes::set(shrink[r])) : Lanes::set(0);
  }
  for (int64_t k = 0; k < depth; ++k, ++a, b += b_row) {
    if (fetched) fetch<Columns * kWidth>(fetched + k * Columns * kWidth);
    Vector x[Columns];
#pragma GCC unroll 8
    for (int i = 0; i < Columns; ++i) x[i] = Lanes::load(b + i * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vector y = Lanes::set(a[r * a_row]);
#pragma GCC unroll 8
      for (int i = 0; i < Columns; ++i) sum[r][i] = Lanes::fma(y, x[i], sum[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < Columns; ++i) Lanes::store(c + r * c_row + i * kWidth, sum[r][i]);
  }
}

template <int Rows, class Number>
void multiply_rows(const float* a, int64_t a_row, const Number* b, int64_t b_row, int64_t depth, const float* shrink,
                   float* c, int64_t c_row, int64_t width, const Number* fetched) {
  constexpr int columns = Lanes::columns(Rows);
  const auto from = [&](int64_t i) { return fetched ? fetched + i * depth : nullptr; };
  int64_t i = 0;
  for (; i + columns * kWidth <= width; i += columns * kWidth)
    multiply<Rows, columns>(a, a_row, b + i, b_row, depth, shrink, c + i, c_row, from(i));
  for (; i < width; i += kWidth) multiply<Rows, 1>(a, a_row, b + i, b_row, depth, shrink, c + i, c_row, from(i));
}

// scores [Rows][count] = queries [Rows][n] * keys [count][n]^T, n whole vectors. As many sums as registers hold are
// kept at once, for Rows queries and some keys, and then added up together.
template <int Rows, class Number>
void score_rows(const float* queries, const Number* keys, int64_t n, int64_t count, float* scores) {
  constexpr int sums = Lanes::sums, together = sums / (Rows > 2 ? 4 : Rows);
  for (int64_t key = 0; key < count; key += together) {
    const Number* row[together];  // beyond the last key it is taken again
#pragma GCC unroll 16
    for (int j = 0; j < together; ++j) row[j] = keys + least(key + j, count - 1) * n;
    Vector sum[sums];
#pragma GCC unroll 16
    for (int j = 0; j < sums; ++j) sum[j] = Lanes::set(0);
    for (int64_t i = 0; i < n; i += kWidth) {
      fetch<together * kWidth>(keys + key * n + i * together);
      Vector x[together];
#pragma GCC unroll 16
      for (int j = 0; j < together; ++j) x[j] = Lanes::load(row[j] + i);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Vector query = Lanes::load(queries + r * n + i);
#pragma GCC unroll 16
        for (int j = 0; j < together; ++j) sum[r * together + j] = Lanes::fma(query, x[j], sum[r * together + j]);
      }
    }
    float totals[sums];
    for (int j = 0; j < sums; j += kWidth) Lanes::store(totals + j, Lanes::sum_each(sum + j));
    for (int r = 0; r < Rows; ++r)
      memcpy(scores + r * kKeys + key, totals + r * together, together * sizeof(float));
  }
}

// to [n][kKeys] = from [count][n], transposed; columns up to a whole vector become zero.
template <class Number>
void load_keys(const Number* from, int64_t count, int64_t n, float* to) {
  for (int64_t key = 0; key < count; key += kWidth) {
    for (int64_t i = 0; i < n; i += kWidth) {
      const Number* corner = from + key * n + i;
      float* column = to + i * kKeys + key;
      Vector block[kWidth];
      if (key + kWidth <= count && i + kWidth <= n) {
#pragma GCC unroll 16
        for (int64_t j = 0; j < kWidth; ++j) block[j] = Lanes::load(corner + j * n);
        Lanes::transpose(block);
#pragma GCC unroll 16
        for (int64_t j = 0; j < kWidth; ++j) Lanes::store(column + j * kKeys, block[j]);
      } else {
        for (int64_t j = 0; j < kWidth; ++j)
          block[j] = key + j < count ? load_first(corner + j * n, n - i) : Lanes::set(0);
        Lanes::transpose(block);
        for (int64_t j = 0; j < least(kWidth, n - i); ++j) Lanes::store(column + j * kKeys, block[j]);
      }
    }
  }
}

// to [count][n, up to whole vectors] = from [count][n].
template <class Number>
void load_values(const Number* from, int64_t count, int64_t n, float* to) {
  for (int64_t key = 0; key < count; ++key, from += n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth, to += kWidth) Lanes::store(to, Lanes::load(from + i));
    if (i < n) Lanes::store(to, load_first(from + i, n - i)), to += kWidth;
  }
}

// The weights of one query over a block: weights = 2^(scores - peak), scores outside [from, to) being none. Raises
// `peak`, adds to `totals` (a vector of partial sums), and returns what everything summed before has to shrink by.
float weigh(float* scores, int64_t from, int64_t to, float& peak, float* totals) {
  for (int64_t i = 0; i < least(from, kKeys); ++i) scores[i] = -INFINITY;
  for (int64_t i = most<int64_t>(0, to); i < kKeys; ++i) scores[i] = -INFINITY;
  constexpr int count = kKeys / kWidth;
  Vector x[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) x[i] = Lanes::load(scores + i * kWidth);
  Vector top = x[0];
#pragma GCC unroll 16
  for (int i = 1; i < count; ++i) top = Lanes::max(top, x[i]);
  float shrink = 1;
  Vector sum = Lanes::load(totals);
  const float highest = Lanes::highest(top);
  if (highest > peak) {
    const Vector factor = exp2(Lanes::set(peak - highest));
    sum = Lanes::mul(sum, factor);
    shrink = Lanes::first(factor);
    peak = highest;
  }
  const Vector base = Lanes::set(peak);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) {
    const Vector weight = exp2(Lanes::sub(x[i], base));
    sum = Lanes::add(sum, weight);
    Lanes::store(scores + i * kWidth, weight);
  }
  Lanes::store(totals, sum);
  return shrink;
}

// By the number of rows - 1.
template <class Number>
constexpr decltype(&score_rows<1, Number>) kScoreFew[kFewTile] = {score_rows<1, Number>, score_rows<2, Number>,
                                                                 score_rows<3, Number>, score_rows<4, Number>};
template <class Number>
constexpr decltype(&multiply_rows<1, Number>) kMultiplyFew[kFewTile] = {
    multiply_rows<1, Number>, multiply_rows<2, Number>, multiply_rows<3, Number>, multiply_rows<4, Number>};
constexpr decltype(&multiply_rows<1, float>) kMultiply[kTile] = {multiply_rows<1, float>, multiply_rows<2, float>,
                                                                 multiply_rows<3, float>, multiply_rows<4, float>,
                                                                 multiply_rows<5, float>, multiply_rows<6, float>};

// Some queries of one kv head: query i of all is of row i / group, and of head i % group of those that share the keys.
struct Queries {
  const AttentionShape& shape;
  const AttentionCall& call;
  int64_t sequence, kv_head, group, first, count;

  int64_t row(int64_t i) const { return (first + i) / group; }
  int64_t head(int64_t i) const { return kv_head * group + (first + i) % group; }
  int64_t position(int64_t i) const { return position_of(call, sequence, row(i)); }
  int64_t sees_from(int64_t i) const { return first_seen(shape, position(i)); }

  // to [head_dim], for keys as they are stored: their scales are taken here once. Scores are exponents of 2.
  void load(int64_t i, float* to) const {
    const float* k_scale = channel_scales(shape, call.k_scale, kv_head);
    const float scale = shape.scale * 1.44269504f;
    turn(shape, call, new_vector(shape, call, sequence, row(i), head(i)), call.q_norm, position(i), to);
    for (int64_t d = 0; d < shape.head_dim; ++d) to[d] *= shape.cache == CacheType::i8 ? scale * k_scale[d] : scale;
  }

  float* out(int64_t i) const {
    return call.out + ((sequence * call.length + row(i)) * shape.heads + head(i)) * shape.head_dim;
  }

  // to = sums of weighted values as they are stored, over `total`, that of the weights.
  void finish(const float* sums, float total, float* to) const {
    const float* v_scale = channel_scales(shape, call.v_scale, kv_head);
    const float scale = 1.0f / total;
    for (int64_t d = 0; d < shape.head_dim; ++d)
      to[d] = sums[d] * (shape.cache == CacheType::i8 ? scale * v_scale[d] : scale);
  }
};

// Rows [from, to); `part` null: of all keys, into the call's `out`.
template <class Number>
void attend_as(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head, int64_t from,
               int64_t to, const AttentionPart* part, void* memory) {
  const int64_t n = shape.head_dim, padded = round_up(n, kWidth), group = shape.heads / shape.kv_heads;
  const int64_t cache = (sequence * shape.kv_heads + kv_head) * shape.capacity * n;
  const Scratch scratch(shape);
  float* base = aligned(memory);
  float *q = base + scratch.queries, *sums = base + scratch.sums, *totals = base + scratch.totals;
  float *keys = base + scratch.keys, *values = base + scratch.values;
  float peaks[kMostQueries];

  for (int64_t first = from * group; first < to * group; first += scratch.count) {
    const int64_t count = least(scratch.count, to * group - first);
    const Queries queries = {shape, call, sequence, kv_head, group, first, count};
    const bool few = count <= kFewQueries && n % kWidth == 0;
    const int64_t highest = few ? kFewTile : kTile, tiles = (count + highest - 1) / highest;
    for (int64_t i = 0; i < count; ++i) queries.load(i, q + i * n);
    memset(sums, 0, count * padded * sizeof(float));
    memset(totals, 0, count * kWidth * sizeof(float));
    for (int64_t i = 0; i < count; ++i) peaks[i] = -FLT_MAX;

    int64_t start = queries.sees_from(0), end = queries.position(count - 1) + 1;
    if (part) start = most(start, part->from), end = least(end, part->to);
    for (; start < end; start += kKeys) {
      const int64_t present = least(kKeys, end - start);
      const Number* stored_keys = static_cast<const Number*>(call.keys) + cache + start * n;
      const Number* stored_values = static_cast<const Number*>(call.values) + cache + start * n;
      if (!few) {
        load_keys(stored_keys, present, n, keys);
        load_values(stored_values, present, n, values);
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t i = count * tile / tiles, rows = count * (tile + 1) / tiles - i;
        const int64_t seen = least(present, queries.position(i + rows - 1) + 1 - start);  // by the last of them
        if (seen <= 0 || queries.sees_from(i) >= start + present) continue;
        alignas(64) float scores[kTile * kKeys];
        float shrink[kTile];
        if (few) {
          kScoreFew<Number>[rows - 1](q + i * n, stored_keys, n, seen, scores);
        } else {
          kMultiply[rows - 1](q + i * n, n, keys, kKeys, n, nullptr, scores, kKeys, round_up(seen, kWidth), nullptr);
        }
        for (int64_t r = 0; r < rows; ++r)
          shrink[r] = weigh(scores + r * kKeys, queries.sees_from(i + r) - start,
                            least(present, queries.position(i + r) + 1 - start), peaks[i + r],
                            totals + (i + r) * kWidth);
        float* to_sums = sums + i * padded;
        if (few) {  // piece by piece, as columns are taken a few at a time
          constexpr float kept[kFewTile] = {1, 1, 1, 1};
          const int64_t step = most<int64_t>(8, kAhead / (n * sizeof(Number)));
          for (int64_t at = 0; at < seen; at += step)
            kMultiplyFew<Number>[rows - 1](scores + at, kKeys, stored_values + at * n, n, least(step, seen - at),
                                           at ? kept : shrink, to_sums, padded, padded, stored_values + at * n);
        } else {
          kMultiply[rows - 1](scores, kKeys, values, padded, seen, shrink, to_sums, padded, padded, nullptr);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const float total = Lanes::sum(Lanes::load(totals + i * kWidth));
      queries.finish(sums + i * padded, total, part ? part->out + i * n : queries.out(i));
      if (part) part->peaks[i] = peaks[i], part->totals[i] = total;
    }
  }
}

void attend_any(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head, int64_t from,
                int64_t to, const AttentionPart* part, void* scratch) {
  switch (shape.cache) {
    case CacheType::f32: return attend_as<float>(shape, call, sequence, kv_head, from, to, part, scratch);
    case CacheType::f16: return attend_as<uint16_t>(shape, call, sequence, kv_head, from, to, part, scratch);
    case CacheType::i8: return attend_as<int8_t>(shape, call, sequence, kv_head, from, to, part, scratch);
  }
}

void attend(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head, int64_t from,
            int64_t to, void* scratch) {
  attend_any(shape, call, sequence, kv_head, from, to, nullptr, scratch);
}

void attend_part(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head,
                 const AttentionPart& part, void* scratch) {
  attend_any(shape, call, sequence, kv_head, 0, call.length, &part, scratch);
}

void save(const float* from, const float*, int64_t n, float* to) { memcpy(to, from, n * sizeof(float)); }

void save(const float* from, const float* scale, int64_t n, int8_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_int8(from[i], scale[i]);
}

void save(const float* from, const float*, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; i += kWidth) {
    uint16_t halves[kWidth];
    Lanes::store(halves, load_first(from + i, n - i));
    memcpy(to + i, halves, least(kWidth, n - i) * sizeof(uint16_t));
  }
}

template <class Number>
void store_as(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head, int64_t from,
              int64_t to) {
  const int64_t n = shape.head_dim;
  float key[kMostHeadDim];
  for (int64_t row = from; row < to; ++row) {
    const int64_t position = position_of(call, sequence, row);
    const int64_t at = ((sequence * shape.kv_heads + kv_head) * shape.capacity + position) * n;
    turn(shape, call, new_vector(shape, call, sequence, row, shape.heads + kv_head), call.k_norm, position, key);
    save(key, channel_scales(shape, call.k_scale, kv_head), n, static_cast<Number*>(call.keys) + at);
    save(new_vector(shape, call, sequence, row, shape.heads + shape.kv_heads + kv_head),
         channel_scales(shape, call.v_scale, kv_head), n, static_cast<Number*>(call.values) + at);
  }
}

void store(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head, int64_t from,
           int64_t to) {
  switch (shape.cache) {
    case CacheType::f32: return store_as<float>(shape, call, sequence, kv_head, from, to);
    case CacheType::f16: return store_as<uint16_t>(shape, call, sequence, kv_head, from, to);
    case CacheType::i8: return store_as<int8_t>(shape, call, sequence, kv_head, from, to);
  }
}

}  // namespace
}  // namespace shoal
