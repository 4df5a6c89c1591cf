/* Loaded before the C library by a test: reads of experts take up to DISTURB_MS longer, and one in DISTURB_FAIL fails. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static atomic_uint state = 12345;

static unsigned draw(void) {
  unsigned value = atomic_fetch_add(&state, 0x9e3779b9u);
  value = (value ^ value >> 16) * 0x85ebca6bu;
  value = (value ^ value >> 13) * 0xc2b2ae35u;
  return value ^ value >> 16;
}

ssize_t pread(int file, void* to, size_t size, off_t at) {
  static ssize_t (*real)(int, void*, size_t, off_t);
  if (!real) real = (ssize_t(*)(int, void*, size_t, off_t))dlsym(RTLD_NEXT, "pread");
  const char *delay = getenv("DISTURB_MS"), *fail = getenv("DISTURB_FAIL");
  if (delay && size >= 4096) {
    const struct timespec time = {0, (long)(draw() % 1000) * 1000 * atoi(delay)};
    nanosleep(&time, NULL);
  }
  if (fail && size >= 4096 && draw() % (unsigned)atoi(fail) == 0) {
    errno = EIO;
    return -1;
  }
  return real(file, to, size, at);
}

ssize_t pread64(int file, void* to, size_t size, off_t at) { return pread(file, to, size, at); }
