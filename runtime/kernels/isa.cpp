// Asks the processor what it has and the system what of that it saves when it switches threads, and picks the paths.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "attention.h"
#include "linear.h"
#include "stack_path.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__linux__)
extern "C" __attribute__((weak)) bool shoal_amx_emulated();  // there where tests bring an AMX that cpuid does not know
#endif

namespace shoal {
namespace {

// How far SHOAL_ISA lets us go; a name it does not know allows all.
int most_allowed() {
  const char* name = std::getenv("SHOAL_ISA");
  const struct {
    const char* name;
    int level;
  } levels[] = {{"scalar", 0}, {"avx2", 1}, {"avx512", 2}, {"amx", 3}, {"neon", 1}, {"i8mm", 2}};
  for (const auto& at : levels)
    if (name && !std::strcmp(name, at.name)) return at.level;
  return 3;
}

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Registers(unsigned leaf) { __get_cpuid_count(leaf, 0, &eax, &ebx, &ecx, &edx); }  // 0 where there is none
};

constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;  // of leaf 7's edx; not every cpuid.h names them

// Which registers the system saves (XCR0).
unsigned saved_state() {
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Linux hands out the tile data, the 18th state, only to a process that asks (ARCH_REQ_XCOMP_PERM).
bool tiles_granted() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

bool tiles_emulated() {
#if defined(__linux__)
  return shoal_amx_emulated && shoal_amx_emulated();
#else
  return false;
#endif
}

Isa detect(int allowed) {
  auto has = [](unsigned value, unsigned bits) { return (value & bits) == bits; };
  Isa isa{};
  const Registers basic(1), extended(7);
  if (!has(basic.ecx, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C | bit_PCLMUL)) return isa;
  const unsigned saved = saved_state();
  isa.avx2 = allowed >= 1 && has(extended.ebx, bit_AVX2) && has(saved, 0x6);
  isa.avx512 = allowed >= 2 && isa.avx2 && has(saved, 0xe0) &&
               has(extended.ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ) &&
               has(extended.ecx, bit_AVX512VNNI);
  isa.amx = allowed >= 3 && isa.avx512 &&
            ((has(saved, 0x60000) && has(extended.edx, kAmxTile | kAmxInt8) && tiles_granted()) ||
             tiles_emulated());
  return isa;
}

#elif defined(__aarch64__) && defined(__linux__)

Isa detect(int allowed) {
  const unsigned long base = getauxval(AT_HWCAP), more = getauxval(AT_HWCAP2);
  const unsigned long needed = 1ul << 20 | 1ul << 10 | 1ul << 9;  // ASIMDDP, and ASIMDHP and FPHP for half floats
  Isa isa{};
  isa.neon = allowed >= 1 && (base & needed) == needed;
  isa.i8mm = allowed >= 2 && isa.neon && (more & 1ul << 13);  // HWCAP2_I8MM
  return isa;
}

#else

Isa detect(int) { return {}; }

#endif

}  // namespace

const Isa& isa() {
  static const Isa found = detect(most_allowed());
  return found;
}

// A path's accessor is called only where its instructions exist: its file may use them anywhere.

const LinearPath* linear_path(const char* name) {
  auto is = [name](const char* other) { return !std::strcmp(name, other); };
  if (is("amx")) return isa().amx ? linear_amx() : nullptr;
  if (is("avx512")) return isa().avx512 ? linear_avx512() : nullptr;
  if (is("avx2")) return isa().avx2 ? linear_avx2() : nullptr;
  if (is("i8mm")) return isa().i8mm ? linear_i8mm() : nullptr;
  if (is("neon")) return isa().neon ? linear_neon() : nullptr;
  return is("scalar") ? &linear_scalar() : nullptr;
}

// The fast ones of `linear` use no tiles or matrix instructions here and below: those names mean the vectors they come
// with.
const AttentionPath* attention_path(const char* name) {
  auto is = [name](const char* other) { return !std::strcmp(name, other); };
  if (is("amx")) return isa().amx ? attention_avx512() : nullptr;
  if (is("avx512")) return isa().avx512 ? attention_avx512() : nullptr;
  if (is("avx2")) return isa().avx2 ? attention_avx2() : nullptr;
  if (is("i8mm")) return isa().i8mm ? attention_neon() : nullptr;
  if (is("neon")) return isa().neon ? attention_neon() : nullptr;
  return is("scalar") ? &attention_scalar() : nullptr;
}

const StackPath* stack_path(const char* name) {
  auto is = [name](const char* other) { return !std::strcmp(name, other); };
  if (is("amx")) return isa().amx ? stack_avx512() : nullptr;
  if (is("avx512")) return isa().avx512 ? stack_avx512() : nullptr;
  if (is("avx2")) return isa().avx2 ? stack_avx2() : nullptr;
  if (is("i8mm")) return isa().i8mm ? stack_neon() : nullptr;
  if (is("neon")) return isa().neon ? stack_neon() : nullptr;
  return is("scalar") ? &stack_scalar() : nullptr;
}

namespace {

template <class Path>
const Path& fastest(const Path* (*path)(const char*)) {
  for (const char* name : {"amx", "avx512", "avx2", "i8mm", "neon"})
    if (const Path* found = path(name)) return *found;
  return *path("scalar");
}

}  // namespace

const LinearPath& linear_path() {
  static const LinearPath& path = fastest<LinearPath>(linear_path);
  return path;
}

const AttentionPath& attention_path() {
  static const AttentionPath& path = fastest<AttentionPath>(attention_path);
  return path;
}

const StackPath& stack_path() {
  static const StackPath& path = fastest<StackPath>(stack_path);
  return path;
}

}  // namespace shoal
