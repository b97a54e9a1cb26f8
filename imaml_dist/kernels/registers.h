// Rows of channels, worked on a register at a time.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace imaml {

// As many neighbouring channels as a register holds.
#if defined(__AVX512F__)
#define IMAML_REGISTER 64
#elif defined(__AVX__)
#define IMAML_REGISTER 32
#else
#define IMAML_REGISTER 16
#endif
typedef float Floats __attribute__((vector_size(IMAML_REGISTER)));
typedef double Doubles __attribute__((vector_size(IMAML_REGISTER)));
template <typename T>
using Register = std::conditional_t<std::is_same_v<T, float>, Floats, Doubles>;

template <typename V, typename T>
V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <typename V, typename T>
void store(T* to, const V& value) {
  std::memcpy(to, &value, sizeof(V));
}

// f(zero, rows [begin, end), channel) for blocks of rows that stay in the first cache, and in them for channels, as many at once as
// `zero` holds.
template <typename T, typename F>
void over_blocks(int64_t rows, int64_t channels, const F& f) {
  constexpr int64_t block = 64, wide = sizeof(Register<T>) / sizeof(T);
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t end = std::min(begin + block, rows);
    int64_t j = 0;
    for (; j + wide <= channels; j += wide) f(Register<T>{}, begin, end, j);
    for (; j < channels; ++j) f(T(0), begin, end, j);
  }
}

}  // namespace imaml
