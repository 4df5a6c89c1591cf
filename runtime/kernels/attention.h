// Attention of a few new positions over a key-value cache in place: grouped queries (Ainslie et al. 2023), rotary
// positions (Su et al. 2021), an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) so that no row of scores
// is ever whole in memory.
#pragma once
#include <cstddef>
#include <cstdint>

#include "parallel.h"

namespace shoal {

enum class CacheType : int { f32 = 0, f16 = 1, i8 = 2 };

struct AttentionShape {
  int64_t heads, kv_heads, head_dim;  // head_dim: a multiple of 2, at most 512; kv_heads divides heads
  int64_t capacity;                   // positions of a row of the cache
  int64_t pairs;                      // rotated pairs (i, i + pairs): at most head_dim / 2
  int64_t window;                     // 0: all; n sees the last n positions, itself included
  float scale;                        // of the scores
  float epsilon;                      // of q_norm and k_norm
  CacheType cache;
  bool fast;  // many rows at once may be computed with rounded numbers (16 bits, of the keys' and values' own scales)
};

// The pointers of one call. Every array is C-contiguous.
struct AttentionCall {
  int64_t batch, length;         // sequences, new positions of each
  const int32_t* last;           // [batch]: the last position of each, so its first new one is last - length + 1
  const float* qkv;              // [batch][length][(heads + 2 kv_heads) * head_dim]: Q, K, V, heads in order
  const float* q_norm;           // [head_dim] or null: RMS norm of each head before it is rotated
  const float* k_norm;
  const float* cos;              // [>= last + 1][pairs]
  const float* sin;
  void* keys;                    // [batch][kv_heads][capacity][head_dim], new positions are written here
  void* values;
  const float* k_scale;          // i8: [kv_heads * head_dim], stored = rint(x / scale) clipped to -128..127
  const float* v_scale;
  float* out;                    // [batch][length][heads * head_dim]
};

// What the keys of positions [from, to) alone give, of all new rows: a query is a row and one of the heads that share the
// keys, in that order. Parts are merged by their peaks and totals.
struct AttentionPart {
  int64_t from, to;
  float* out;     // [queries][head_dim]
  float* peaks;   // [queries]: the greatest score, as an exponent of 2
  float* totals;  // [queries]: of the weights, 2^(score - peak); 0 where a query sees none of the keys, and no `out` then
};

struct AttentionPath {
  const char* name;
  // Stores the new keys and values of positions [from, to) of (sequence, kv head), normed and rotated.
  void (*store)(const AttentionShape&, const AttentionCall&, int64_t sequence, int64_t kv_head, int64_t from, int64_t to);
  // Attends: rows [from, to) of the new positions of one sequence, for one kv head (all heads / kv_heads query heads
  // that share it), into the call's `out`. `scratch` has scratch_bytes(shape).
  void (*attend)(const AttentionShape&, const AttentionCall&, int64_t sequence, int64_t kv_head, int64_t from,
                 int64_t to, void* scratch);
  // Attends to a part of the keys: all new rows, which are at most kFewQueries queries.
  void (*attend_part)(const AttentionShape&, const AttentionCall&, int64_t sequence, int64_t kv_head,
                      const AttentionPart&, void* scratch);
};

constexpr int64_t kFewQueries = 16;

// Whether it could be done: false where memory ran out.
bool attention(const AttentionPath&, const AttentionShape&, const AttentionCall&, const Parallel&);

size_t scratch_bytes(const AttentionShape&);
const AttentionPath& attention_scalar();
const AttentionPath* attention_avx2();
const AttentionPath* attention_avx512();
const AttentionPath* attention_neon();

}  // namespace shoal
