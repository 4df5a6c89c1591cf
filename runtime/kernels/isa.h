// Which instruction sets this processor and system offer, found once; SHOAL_ISA names the best that may be used
// (scalar, avx2, avx512, amx, neon, i8mm), so that slower paths can be tried where faster ones exist.
#pragma once

namespace shoal {

struct Isa {
  bool avx2, avx512, amx;  // avx512: F, BW, VL, DQ, VNNI, VBMI not needed; amx: TILE and INT8, and the system grants them
  bool neon, i8mm;         // neon: with dot product
};

const Isa& isa();

struct LinearPath;
struct AttentionPath;
struct StackPath;
const LinearPath& linear_path();        // the fastest
const LinearPath* linear_path(const char* name);        // null where this machine lacks it
const AttentionPath& attention_path();
const AttentionPath* attention_path(const char* name);
const StackPath& stack_path();
const StackPath* stack_path(const char* name);

}  // namespace shoal
