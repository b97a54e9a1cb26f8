// Rows of channels, worked on some registers at a time.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace imaml {

// As many neighbouring channels as a register holds.
#if defined(__AVX512F__)
#define IMAML_REGISTER 64
#elif defined(__AVX__)
#define IMAML_REGISTER 32
#else
#define IMAML_REGISTER 16
#endif
template <typename T, int bytes>
struct Vector {
  typedef T type __attribute__((vector_size(bytes)));
};
template <typename T, int bytes = IMAML_REGISTER>
using Register = typename Vector<T, bytes>::type;

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

// f(0), ..., f(N - 1), of numbers that the compiler knows: a loop may leave it with registers that it keeps in memory.
template <int N, typename F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, N>());
}

// N registers that are treated as one, so that a pass over rows reads longer pieces of memory.
template <typename T, int N>
struct Wide {
  Register<T> r[N];
};
#define IMAML_EACH(op)                                                             \
  template <typename T, int N>                                                     \
  inline Wide<T, N> operator op(const Wide<T, N>& a, const Wide<T, N>& b) {        \
    Wide<T, N> c;                                                                  \
    unrolled<N>([&](auto i) { c.r[i] = a.r[i] op b.r[i]; });                       \
    return c;                                                                      \
  }                                                                                \
  template <typename T, int N>                                                     \
  inline void operator op##=(Wide<T, N>& a, const Wide<T, N>& b) {                 \
    a = a op b;                                                                    \
  }
IMAML_EACH(+)
IMAML_EACH(-)
IMAML_EACH(*)
#undef IMAML_EACH

template <typename V, typename T>
  requires requires { V::r; }
V load(const T* from) {
  V value;
  constexpr int lanes = sizeof(value.r[0]) / sizeof(T);
  unrolled<sizeof(value) / sizeof(value.r[0])>([&](auto i) { value.r[i] = load<Register<T>>(from + i * lanes); });
  return value;
}
template <typename T, int N>
void store(T* to, const Wide<T, N>& value) {
  constexpr int lanes = sizeof(value.r[0]) / sizeof(T);
  unrolled<N>([&](auto i) { store(to + i * lanes, value.r[i]); });
}

// g where y is positive or nan, zero elsewhere.
template <typename V>
V where_positive(const V& g, const V& y) {
  return y <= V{} ? V{} : g;
}
template <typename T, int N>
Wide<T, N> where_positive(const Wide<T, N>& g, const Wide<T, N>& y) {
  Wide<T, N> c;
  unrolled<N>([&](auto i) { c.r[i] = where_positive(g.r[i], y.r[i]); });
  return c;
}

// f(zero, rows [begin, end), channel) for blocks of rows from `first` to `last`, and in them for channels, as many at once as `zero`
// holds: `many` registers, one, or a single channel.
template <typename T, int many, typename F>
void over_blocks(int64_t first, int64_t last, int64_t channels, const F& f) {
  constexpr int64_t block = 64, one = sizeof(Register<T>) / sizeof(T);
  for (int64_t begin = first; begin < last; begin += block) {
    const int64_t end = std::min(begin + block, last);
    int64_t j = 0;
    if constexpr (many > 1)
      for (; j + many * one <= channels; j += many * one) f(Wide<T, many>{}, begin, end, j);
    for (; j + one <= channels; j += one) f(Register<T>{}, begin, end, j);
    for (; j < channels; ++j) f(T(0), begin, end, j);
  }
}

// The even or the odd numbered places of the result are a's, the others b's; from their first or second halves.
template <bool second, typename V, size_t... i>
V interleaved(const V& a, const V& b, std::index_sequence<i...>) {
  constexpr size_t lanes = sizeof...(i), from = second ? lanes / 2 : 0;
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (i % 2 * lanes + from + i / 2)...);
#else  // g++ before 12
  return V{(i % 2 ? b[from + i / 2] : a[from + i / 2])...};
#endif
}

// to(j)[i] = from(i)[j] for i < rows, j < columns; from(i) and to(j) are where rows begin. In squares of a register's side, the shorter
// way through them in the inner loop, so that a line of the cache is done with before others take its place; what they leave over
// in squares of half the side, and what the smallest leave over number by number.
template <typename T, int bytes = IMAML_REGISTER, typename From, typename To>
void transpose(int64_t rows, int64_t columns, const From& from, const To& to) {
  using V = Register<T, bytes>;
  constexpr int64_t lanes = bytes / sizeof(T);
  constexpr auto each = std::make_index_sequence<lanes>();
  const int64_t whole_rows = rows / lanes * lanes, whole_columns = columns / lanes * lanes;
  const auto square = [&](int64_t i, int64_t j) {
    V a[lanes], b[lanes];
#pragma GCC unroll 16
    for (int64_t r = 0; r < lanes; ++r) a[r] = load<V>(from(i + r) + j);
#pragma GCC unroll 8
    for (int64_t stage = 1; stage < lanes; stage *= 2) {  // each is one riffle of the cards
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes / 2; ++r) {
        b[2 * r] = interleaved<false>(a[r], a[r + lanes / 2], each);
        b[2 * r + 1] = interleaved<true>(a[r], a[r + lanes / 2], each);
      }
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r) a[r] = b[r];
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < lanes; ++r) store(to(j + r) + i, a[r]);
  };
  if (rows < columns)
    for (int64_t j = 0; j < whole_columns; j += lanes)
      for (int64_t i = 0; i < whole_rows; i += lanes) square(i, j);
  else
    for (int64_t i = 0; i < whole_rows; i += lanes)
      for (int64_t j = 0; j < whole_columns; j += lanes) square(i, j);
  const auto rest = [&](int64_t i, int64_t until, int64_t j, int64_t end) {
    if (i == until || j == end) return;
    if constexpr (lanes > 4)
      transpose<T, bytes / 2>(
          until - i, end - j, [&](int64_t r) { return from(i + r) + j; }, [&](int64_t r) { return to(j + r) + i; });
    else
      for (; j < end; ++j) {
        T* out = to(j);
        for (int64_t r = i; r < until; ++r) out[r] = from(r)[j];
      }
  };
  rest(whole_rows, rows, 0, whole_columns);
  rest(0, rows, whole_columns, columns);
}

}  // namespace imaml
