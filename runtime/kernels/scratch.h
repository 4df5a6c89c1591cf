// Memory for the length of one call: kept and handed out again, so that a step costs no page faults.
#pragma once
#include <cstddef>
#include <cstdint>

namespace shoal {

// 64-byte aligned; null data where memory ran out.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(data_ + used_);
    used_ += round_up(static_cast<size_t>(count) * sizeof(T));
    return at;
  }
  static constexpr size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace shoal
