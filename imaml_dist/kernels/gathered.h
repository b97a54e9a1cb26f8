// Products with rows that lie scattered over an image: what a convolution and its derivatives consist of. Nothing is copied
// together first; a tile of results stays in registers while its factors stream by.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "registers.h"
#include "tensors.h"

namespace imaml {

// Results at once: TALL rows of DEEP registers. They, DEEP factors and one more fill the registers that there are.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TALL = 6, DEEP = 4;
#else
constexpr int TALL = 6, DEEP = 2;
#endif

template <typename T>
constexpr int64_t LANES = sizeof(Register<T>) / sizeof(T);
template <typename T>
int64_t padded(int64_t width) {
  return (width + LANES<T> - 1) / LANES<T> * LANES<T>;
}

// A matrix [rows, padded channels] in panels of PANEL columns, the last of those that are left, each with its rows one behind the
// other: what a tile multiplies with comes in one stream. What pads it is zero at first, its other values are anything.
template <typename T>
constexpr int64_t PANEL = DEEP * LANES<T>;
template <typename T>
struct Panels {
  int64_t rows, width;
  Buffer<T> memory;
  Panels(int64_t rows, int64_t channels)
      : rows(rows), width(padded<T>(channels)), memory(rows * width, width != channels) {}
  int64_t columns(int64_t first) const { return std::min(PANEL<T>, width - first); }
  // Where row `row` of the panel begins whose first column is `first`.
  T* at(int64_t row, int64_t first) { return memory.data() + first * rows + row * columns(first); }
};

// Products below which a second thread costs more than it brings.
constexpr int64_t WORTH_A_THREAD = 1 << 18;

// f(std::integral_constant<int, n>) for a number that is known only now, 1 <= n <= most.
template <int most, typename F>
void with_constant(int64_t n, const F& f) {
  if constexpr (most > 1)
    if (n < most) return with_constant<most - 1>(n, f);
  f(std::integral_constant<int, most>());
}

// Rows of one result image: row r is the sum over entries e of the `depth` values at place from[r, e] of an image, zeros if it
// is -1, times part taps[e] of a matrix; it belongs to place to[r] of the result.
struct Gather {
  std::vector<int64_t> to, taps, from;
  int64_t rows() const { return to.size(); }
  int64_t entries() const { return taps.size(); }
};

// to[R] = start + sum over entries and depth of in[entry, R][depth] panel[entry][depth, N registers], of which `channels` values are
// wanted.
template <int R, int N, typename T>
void gathered_tile(const Gather& g, int64_t depth, const T* const* in, const T* panel, const T* start, T* const* to,
                   int64_t channels) {
  using V = Register<T>;
  V sum[R][N];
  for (int n = 0; n < N; ++n) {
    const V first = start ? load<V>(start + n * LANES<T>) : V{};
    for (int r = 0; r < R; ++r) sum[r][n] = first;
  }
  for (int64_t e = 0; e < g.entries(); ++e, in += R) {
    const T* at[R];
    for (int r = 0; r < R; ++r) at[r] = in[r];
    const T* m = panel + g.taps[e] * depth * N * LANES<T>;
    for (int64_t j = 0; j < depth; ++j, m += N * LANES<T>) {
      V factor[N];
      for (int n = 0; n < N; ++n) factor[n] = load<V>(m + n * LANES<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const T value = at[r][j];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[r][n] += value * factor[n];
      }
    }
  }
  if (channels >= N * LANES<T>)
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) store(to[r] + n * LANES<T>, sum[r][n]);
  else
    for (int r = 0; r < R; ++r) {
      T row[N * LANES<T>];
      for (int n = 0; n < N; ++n) store(row + n * LANES<T>, sum[r][n]);
      std::copy_n(row, channels, to[r]);
    }
}

// out [images, size_out], at the gathered rows `channels` values each, from in [images, size_in], matrix [taps depth, padded
// channels] and start [padded channels], which may be null. Threads that have nothing else to do share the tiles, which are the
// same for any number of them.
template <typename T>
void gathered_product(const Gather& g, int64_t images, const T* in, int64_t size_in, int64_t depth, Panels<T>& matrix,
                      const T* start, T* out, int64_t size_out, int64_t channels) {
  const int64_t width = matrix.width, rows = images * g.rows(), registers = width / LANES<T>;
  const int64_t grain = WORTH_A_THREAD / (TALL * g.entries() * depth * width + 1) + 1;
  const std::vector<T> zeros(depth);
  at::parallel_for(0, (rows + TALL - 1) / TALL, grain, [&](int64_t begin, int64_t end) {
    std::vector<const T*> from(TALL * g.entries());
    const int64_t image = begin * TALL / g.rows(), last = std::min(end * TALL, rows);
    int64_t row = begin * TALL % g.rows();  // of the image at `source` and `target`
    const T* source = in + image * size_in;
    T* target = out + image * size_out;
    for (int64_t first = begin * TALL; first < last; first += TALL) {
      const int64_t tall = std::min<int64_t>(TALL, last - first);
      T* to[TALL];
      for (int64_t r = 0; r < tall; ++r) {
        to[r] = target + g.to[row];
        const int64_t* places = g.from.data() + row * g.entries();
        for (int64_t e = 0; e < g.entries(); ++e) from[e * tall + r] = places[e] < 0 ? zeros.data() : source + places[e];
        if (++row == g.rows()) row = 0, source += size_in, target += size_out;
      }
      for (int64_t n = 0; n < registers; n += DEEP) {
        const int64_t channel = n * LANES<T>;
        const T* bias = start ? start + channel : nullptr;
        with_constant<TALL>(tall, [&](auto R) {
          with_constant<DEEP>(std::min<int64_t>(DEEP, registers - n), [&](auto N) {
            gathered_tile<R.value, N.value, T>(g, depth, from.data(), matrix.at(0, channel), bias, to, channels - channel);
          });
        });
        for (int64_t r = 0; r < tall; ++r) to[r] += PANEL<T>;
      }
    }
  });
}

// panel [J, N registers] += sum over rows i of in[xs[i]][J] g[gs[i]][N registers].
template <int J, int N, typename T>
void outer_tile(int64_t rows, const int64_t* xs, const T* x, const int64_t* gs, const T* g, T* panel) {
  using V = Register<T>;
  V sum[J][N];
  for (int j = 0; j < J; ++j)
    for (int n = 0; n < N; ++n) sum[j][n] = load<V>(panel + (j * N + n) * LANES<T>);
  for (int64_t i = 0; i < rows; ++i) {
    const T *xi = x + xs[i], *gi = g + gs[i];
    V factor[N];
    for (int n = 0; n < N; ++n) factor[n] = load<V>(gi + n * LANES<T>);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const T value = xi[j];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[j][n] += value * factor[n];
    }
  }
  for (int j = 0; j < J; ++j)
    for (int n = 0; n < N; ++n) store(panel + (j * N + n) * LANES<T>, sum[j][n]);
}

// The transpose: matrix [taps depth, padded channels] += sum over images and rows of the values that a row gathers, times the
// `channels` values of y [images, rows, padded channels]. Threads share the tiles of the matrix; each sums over all rows in order.
template <typename T>
void gathered_outer(const Gather& g, int64_t images, const T* x, int64_t size_x, int64_t depth, const T* y,
                    Panels<T>& matrix, int64_t channels) {
  constexpr int64_t block = 128;
  const int64_t width = matrix.width, rows = images * g.rows(), registers = width / LANES<T>;
  const int64_t tiles = (depth + TALL - 1) / TALL, grain = WORTH_A_THREAD / (rows * TALL * width + 1) + 1;
  at::parallel_for(0, g.entries() * tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> xs(block), ys(block);
    for (int64_t first = 0; first < rows; first += block) {
      const int64_t image = first / g.rows(), last = std::min(first + block, rows);
      for (int64_t e = begin / tiles; e * tiles < end; ++e) {
        int64_t count = 0, row = first % g.rows(), away = 0;
        for (int64_t i = 0; i < last - first; ++i) {
          const int64_t place = g.from[row * g.entries() + e];
          xs[count] = away + place;
          ys[count] = i * width;
          count += place >= 0;
          if (++row == g.rows()) row = 0, away += size_x;
        }
        const int64_t from = std::max<int64_t>(0, begin - e * tiles), to = std::min(tiles, end - e * tiles);
        for (int64_t n = 0; n < registers; n += DEEP)
          for (int64_t j = from * TALL; j < std::min(to * TALL, depth); j += TALL)
            with_constant<TALL>(std::min<int64_t>(TALL, depth - j), [&](auto J) {
              with_constant<DEEP>(std::min<int64_t>(DEEP, registers - n), [&](auto N) {
                const int64_t channel = n * LANES<T>;
                outer_tile<J.value, N.value, T>(count, xs.data(), x + image * size_x + j, ys.data(), y + first * width + channel,
                                                matrix.at(g.taps[e] * depth + j, channel));
              });
            });
      }
    }
  });
}

}  // namespace imaml
