// Batch normalisation with the statistics of the batch, y = gamma z + beta, z = (x - mean(x)) r, r = 1 / sqrt(var(x) + eps), of
// rows x [T, R, C], and an activation f(y) of it; m() below is the mean over rows. Memory is what it costs: every derivative reads
// its rows twice, and the activation rides along.

#pragma once

#include <ATen/Dispatch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "activation.h"
#include "registers.h"
#include "tensors.h"

namespace imaml {

struct Rows {
  int64_t tasks, rows, channels;
};

// f(piece, first row, last) for pieces of the rows, which threads that have nothing else to do share.
constexpr int64_t PIECE = 1024;
inline int64_t pieces(const Rows& s) { return (s.rows + PIECE - 1) / PIECE; }
template <typename F>
void over_pieces(const Rows& s, const F& f) {
  at::parallel_for(0, pieces(s), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) f(p, p * PIECE, std::min((p + 1) * PIECE, s.rows));
  });
}

// K sums over rows for every channel, of a block in the precision of the data, of the blocks of a piece in double, and then of the
// pieces: in one order, whoever does it. `begin(zero, channel)` gives what adds a row to the K parts.
template <int64_t K, typename T, int many, typename F>
std::array<std::vector<double>, K> sums(const Rows& s, const F& begin) {
  std::vector<std::array<std::vector<double>, K>> sum(std::max<int64_t>(1, pieces(s)));
  for (auto& piece : sum)
    for (auto& one : piece) one.resize(s.channels);
  over_pieces(s, [&](int64_t p, int64_t first, int64_t last) {
    over_blocks<T, many>(first, last, s.channels, [&](auto zero, int64_t first, int64_t last, int64_t channel) {
      using V = decltype(zero);
      constexpr int64_t W = sizeof(V) / sizeof(T);
      const auto add = begin(zero, channel);
      V part[K] = {};
      for (int64_t i = first; i < last; ++i) add(i * s.channels + channel, part);
      T values[K][W];
      std::memcpy(values, part, sizeof(part));
      for (int64_t k = 0; k < K; ++k)
        for (int64_t j = 0; j < W; ++j) sum[p][k][channel + j] += values[k][j];
    });
  });
  for (int64_t p = 1; p < pieces(s); ++p)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < s.channels; ++j) sum[0][k][j] += sum[p][k][j];
  return sum[0];
}

// `begin(zero, channel)` gives what is done to every row.
template <typename T, int many, typename F>
void over_rows(const Rows& s, const F& begin) {
  over_pieces(s, [&](int64_t, int64_t first, int64_t last) {
    over_blocks<T, many>(first, last, s.channels, [&](auto zero, int64_t first, int64_t last, int64_t channel) {
      const auto work = begin(zero, channel);
      for (int64_t i = first; i < last; ++i) work(i * s.channels + channel);
    });
  });
}

template <typename F>
void over_tasks(const Rows& s, const F& f) {
  over_tasks(s.tasks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

// Task t of [T, ...], whose tasks are contiguous but may lie apart.
template <typename T>
const T* of_task(const Tensor& x, int64_t t) {
  return x.const_data_ptr<T>() + t * x.stride(0);
}
template <typename T>
T* of_task(Tensor& x, int64_t t) {
  return x.data_ptr<T>() + t * x.stride(0);
}

// mean and r, each [T, C].
inline std::tuple<Tensor, Tensor> statistics(const Rows& s, const Tensor& x, double eps) {
  Tensor mean = at::empty({s.tasks, s.channels}, x.options()), r = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "statistics", [&] {
    over_tasks(s, [&](int64_t t) {
      const scalar_t* in = of_task<scalar_t>(x, t);
      scalar_t *means = of_task<scalar_t>(mean, t), *rs = of_task<scalar_t>(r, t);
      // Distances from a value near the mean keep the digits that a mean of squares would lose.
      std::vector<scalar_t> near(s.channels);
      const int64_t some = std::min<int64_t>(s.rows, 32);
      for (int64_t i = 0; i < some; ++i)
        for (int64_t j = 0; j < s.channels; ++j) near[j] += in[i * s.channels + j] / some;
      const auto sum = sums<2, scalar_t, 4>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [in, from = load<V>(&near[channel])](int64_t i, V* part) {
          const V d = load<V>(in + i) - from;
          part[0] += d;
          part[1] += d * d;
        };
      });
      for (int64_t j = 0; j < s.channels; ++j) {
        const double away = sum[0][j] / s.rows, variance = sum[1][j] / s.rows - away * away;
        means[j] = near[j] + away;
        rs[j] = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
      }
    });
  });
  return {mean, r};
}

// gamma, beta, mean and r, [T, C] each.
struct Affine {
  Tensor gamma, beta, mean, r;
};

// The same of one task and some channels, by which rows are normalised: y = x slope + start.
template <typename V, typename T>
struct Line {
  V mean, slope, start;
  Line(const Affine& affine, int64_t t, int64_t channel) {
    mean = load<V>(of_task<T>(affine.mean, t) + channel);
    slope = load<V>(of_task<T>(affine.gamma, t) + channel) * load<V>(of_task<T>(affine.r, t) + channel);
    start = load<V>(of_task<T>(affine.beta, t) + channel) - mean * slope;
  }
  V at(V x) const { return x * slope + start; }
};

// Registers worked on at once: a smooth activation fills them by itself.
template <typename A>
constexpr int at_once = A::smooth ? 1 : 4;

template <typename A>
Tensor normalised(const Rows& s, const A& act, const Tensor& x, const Affine& affine, Tensor y) {
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "normalised", [&] {
    over_tasks(s, [&](int64_t t) {
      const scalar_t* in = of_task<scalar_t>(x, t);
      scalar_t* out = of_task<scalar_t>(y, t);
      over_rows<scalar_t, at_once<A>>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [act, in, out, line = Line<V, scalar_t>(affine, t, channel)](int64_t i) {
          store(out + i, V(act.value(line.at(load<V>(in + i)))));
        };
      });
    });
  });
  return y;
}

// With g the gradient at y, f' times that at f(y): (gamma r (g - m(g) - z m(g z)), sum(g z), sum(g)).
template <typename A>
std::tuple<Tensor, Tensor, Tensor> derivative(const Rows& s, const A& act, const Tensor& g, const Tensor& x, const Affine& affine) {
  Tensor dx = at::empty_like(x), dgamma = at::empty_like(affine.mean), dbeta = at::empty_like(affine.mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "derivative", [&] {
    over_tasks(s, [&](int64_t t) {
      const scalar_t *gs = of_task<scalar_t>(g, t), *in = of_task<scalar_t>(x, t);
      const auto sum = sums<2, scalar_t, at_once<A>>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [act, gs, in, line = Line<V, scalar_t>(affine, t, channel)](int64_t i, V* part) {
          const V xi = load<V>(in + i), gi = V(act.back(load<V>(gs + i), line.at(xi)));
          part[0] += gi;
          part[1] += gi * (xi - line.mean);
        };
      });
      std::vector<scalar_t> of_d(s.channels), of_1(s.channels);  // dx = slope g + of_d (x - mean) + of_1
      for (int64_t j = 0; j < s.channels; ++j) {
        const double r = of_task<scalar_t>(affine.r, t)[j], slope = of_task<scalar_t>(affine.gamma, t)[j] * r;
        of_task<scalar_t>(dgamma, t)[j] = sum[1][j] * r;
        of_task<scalar_t>(dbeta, t)[j] = sum[0][j];
        of_d[j] = -slope * r * r * sum[1][j] / s.rows;
        of_1[j] = -slope * sum[0][j] / s.rows;
      }
      scalar_t* out = of_task<scalar_t>(dx, t);
      over_rows<scalar_t, at_once<A>>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [act, gs, in, out, line = Line<V, scalar_t>(affine, t, channel), b = load<V>(&of_d[channel]),
                c = load<V>(&of_1[channel])](int64_t i) {
          const V xi = load<V>(in + i), gi = V(act.back(load<V>(gs + i), line.at(xi)));
          store(out + i, V(line.slope * gi + b * (xi - line.mean) + c));
        };
      });
    });
  });
  return {dx, dgamma, dbeta};
}

// With cotangents (u, a, b) of the three results above: the derivatives of sum(u dx) + a dgamma + b dbeta with respect to
// (g, x, gamma, beta), g being the gradient at f(y) now and h = f'(y) g that at y. With respect to h they are those of a batch
// normalisation without activation,
//   h:      v = gamma r (u - m(u) - z q) + a z + b,                     k = m(h z), q = m(u z)
//   x:      r (w - m(w) - z m(w z)) - gamma r^2 e z,                    w = a h - gamma r (q h + k u)
//   gamma:  r R e,                                                      e = m(u h) - m(u) m(h) - q k
// Of g there remains f'(y) v, and where f is curved p = f''(y) g v reaches y as a gradient does: it adds
//   x:      gamma r (p - m(p) - z m(p z)),         gamma:  sum(p z),         beta:  sum(p)
// for which the first pass sums what v is made of, weighted by f''(y) g.
template <typename A>
std::tuple<Tensor, Tensor, Tensor, Tensor> second_derivative(const Rows& s, const A& act, const Tensor& u, const Tensor& a,
                                                             const Tensor& b, const Tensor& g, const Tensor& x,
                                                             const Affine& affine) {
  Tensor dg = at::empty_like(x), dx = at::empty_like(x), dgamma = at::empty_like(affine.mean), dbeta;
  if constexpr (A::smooth) dbeta = at::empty_like(affine.mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "second_derivative", [&] {
    over_tasks(s, [&](int64_t t) {
      const scalar_t *us = of_task<scalar_t>(u, t), *gs = of_task<scalar_t>(g, t), *in = of_task<scalar_t>(x, t);
      const auto sum = sums<A::smooth ? 10 : 5, scalar_t, at_once<A>>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [act, us, gs, in, line = Line<V, scalar_t>(affine, t, channel)](int64_t i, V* part) {
          const V xi = load<V>(in + i), ui = load<V>(us + i), d = xi - line.mean;
          V hi = load<V>(gs + i);
          if constexpr (A::smooth) {
            const auto slopes = act.slopes(line.at(xi));
            const V ci = hi * slopes.second;
            part[5] += ci;
            part[6] += ci * ui;
            part[7] += ci * d;
            part[8] += ci * ui * d;
            part[9] += ci * d * d;
            hi = hi * slopes.first;
          } else {
            hi = act.back(hi, line.at(xi));
          }
          part[0] += hi;
          part[1] += ui;
          part[2] += hi * ui;
          part[3] += hi * d;
          part[4] += ui * d;
        };
      });
      // v = slope u + vd (x - mean) + v1, dx = xh h + xu u + xd (x - mean) + x1 + slope p
      std::vector<scalar_t> vd(s.channels), v1(s.channels), xh(s.channels), xu(s.channels), xd(s.channels), x1(s.channels);
      for (int64_t j = 0; j < s.channels; ++j) {
        const double r = of_task<scalar_t>(affine.r, t)[j], slope = of_task<scalar_t>(affine.gamma, t)[j] * r,
                     n = s.rows, mh = sum[0][j] / n, mu = sum[1][j] / n, k = sum[3][j] * r / n, q = sum[4][j] * r / n,
                     e = sum[2][j] / n - mh * mu - q * k;
        const double wh = of_task<scalar_t>(a, t)[j] - slope * q, wu = -slope * k;  // w = wh h + wu u
        of_task<scalar_t>(dgamma, t)[j] = r * n * e;
        vd[j] = wh * r;
        v1[j] = of_task<scalar_t>(b, t)[j] - slope * mu;
        xh[j] = r * wh;
        xu[j] = r * wu;
        xd[j] = -r * r * (wh * k + wu * q + slope * e);
        x1[j] = -r * (wh * mh + wu * mu);
        if constexpr (A::smooth) {
          const double p = slope * sum[6][j] + vd[j] * sum[7][j] + v1[j] * sum[5][j],  // sums over rows, of p and of p (x - mean)
              pd = slope * sum[8][j] + vd[j] * sum[9][j] + v1[j] * sum[7][j];
          of_task<scalar_t>(dgamma, t)[j] += r * pd;
          of_task<scalar_t>(dbeta, t)[j] = p;
          xd[j] -= slope * r * r * pd / n;
          x1[j] -= slope * p / n;
        }
      }
      scalar_t *out_g = of_task<scalar_t>(dg, t), *out_x = of_task<scalar_t>(dx, t);
      over_rows<scalar_t, at_once<A>>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [act, us, gs, in, out_g, out_x, line = Line<V, scalar_t>(affine, t, channel), vvd = load<V>(&vd[channel]),
                vv1 = load<V>(&v1[channel]), vxh = load<V>(&xh[channel]), vxu = load<V>(&xu[channel]),
                vxd = load<V>(&xd[channel]), vx1 = load<V>(&x1[channel])](int64_t i) {
          const V xi = load<V>(in + i), y = line.at(xi), gi = load<V>(gs + i), ui = load<V>(us + i), d = xi - line.mean;
          const V v = line.slope * ui + vvd * d + vv1;
          if constexpr (A::smooth) {
            const auto slopes = act.slopes(y);
            store(out_g + i, V(slopes.first * v));
            store(out_x + i, V(vxh * (slopes.first * gi) + vxu * ui + vxd * d + vx1 + line.slope * (slopes.second * gi * v)));
          } else {
            store(out_g + i, V(act.back(v, y)));
            store(out_x + i, V(vxh * act.back(gi, y) + vxu * ui + vxd * d + vx1));
          }
        };
      });
    });
  });
  return {dg, dx, dgamma, dbeta};
}

}  // namespace imaml
