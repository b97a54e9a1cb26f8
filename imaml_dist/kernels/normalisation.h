// Batch normalisation with the statistics of the batch, y = gamma z + beta, z = (x - mean(x)) r, r = 1 / sqrt(var(x) + eps), of
// rows x [T, R, C], and max(y, 0) of it; m() below is the mean over rows. Memory is what it costs: every derivative reads its
// rows twice, and the rectifier rides along.

#pragma once

#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "registers.h"
#include "tensors.h"

namespace imaml {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::tensor_list;

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
template <int64_t K, typename T, typename F>
std::array<std::vector<double>, K> sums(const Rows& s, const F& begin) {
  std::vector<std::array<std::vector<double>, K>> sum(std::max<int64_t>(1, pieces(s)));
  for (auto& piece : sum)
    for (auto& one : piece) one.resize(s.channels);
  over_pieces(s, [&](int64_t p, int64_t first, int64_t last) {
    over_blocks<T, 4>(first, last, s.channels, [&](auto zero, int64_t first, int64_t last, int64_t channel) {
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
template <typename T, typename F>
void over_rows(const Rows& s, const F& begin) {
  over_pieces(s, [&](int64_t, int64_t first, int64_t last) {
    over_blocks<T, 4>(first, last, s.channels, [&](auto zero, int64_t first, int64_t last, int64_t channel) {
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

// Task t of [T, ...].
template <typename T>
const T* of_task(const Tensor& x, int64_t t) {
  return x.const_data_ptr<T>() + t * (x.numel() / x.size(0));
}
template <typename T>
T* of_task(Tensor& x, int64_t t) {
  return x.data_ptr<T>() + t * (x.numel() / x.size(0));
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
      const auto sum = sums<2, scalar_t>(s, [&](auto zero, int64_t channel) {
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

// What of g passes a rectifier of y; nan is let through, as torch does.
template <bool relu, typename V>
V passed(V g, V y) {
  if constexpr (relu)
    return where_positive(g, y);
  else
    return g;
}

template <bool relu>
Tensor normalised(const Rows& s, const Tensor& x, const Affine& affine, Tensor y) {
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "normalised", [&] {
    over_tasks(s, [&](int64_t t) {
      const scalar_t* in = of_task<scalar_t>(x, t);
      scalar_t* out = of_task<scalar_t>(y, t);
      over_rows<scalar_t>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [in, out, line = Line<V, scalar_t>(affine, t, channel)](int64_t i) {
          const V value = line.at(load<V>(in + i));
          store(out + i, passed<relu, V>(value, value));
        };
      });
    });
  });
  return y;
}

// With g the gradient at y, zero where the rectifier is: (gamma r (g - m(g) - z m(g z)), sum(g z), sum(g)).
template <bool relu>
std::tuple<Tensor, Tensor, Tensor> derivative(const Rows& s, const Tensor& g, const Tensor& x, const Affine& affine) {
  Tensor dx = at::empty_like(x), dgamma = at::empty_like(affine.mean), dbeta = at::empty_like(affine.mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "derivative", [&] {
    over_tasks(s, [&](int64_t t) {
      const scalar_t *gs = of_task<scalar_t>(g, t), *in = of_task<scalar_t>(x, t);
      const auto sum = sums<2, scalar_t>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [gs, in, line = Line<V, scalar_t>(affine, t, channel)](int64_t i, V* part) {
          const V xi = load<V>(in + i), gi = passed<relu, V>(load<V>(gs + i), line.at(xi));
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
      over_rows<scalar_t>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [gs, in, out, line = Line<V, scalar_t>(affine, t, channel), b = load<V>(&of_d[channel]),
                c = load<V>(&of_1[channel])](int64_t i) {
          const V xi = load<V>(in + i), gi = passed<relu, V>(load<V>(gs + i), line.at(xi));
          store(out + i, V(line.slope * gi + b * (xi - line.mean) + c));
        };
      });
    });
  });
  return {dx, dgamma, dbeta};
}

// With cotangents (u, a, b) of the three results above: the derivatives of sum(u dx) + a dgamma + b dbeta with respect to
// (g, x, gamma),
//   g:      gamma r (u - m(u) - z q) + a z + b,                         k = m(g z), q = m(u z)
//   x:      r (w - m(w) - z m(w z)) - gamma r^2 e z,                    w = a g - gamma r (q g + k u)
//   gamma:  r R e,                                                      e = m(u g) - m(u) m(g) - q k
template <bool relu>
std::tuple<Tensor, Tensor, Tensor> second_derivative(const Rows& s, const Tensor& u, const Tensor& a, const Tensor& b,
                                                     const Tensor& g, const Tensor& x, const Affine& affine) {
  Tensor dg = at::empty_like(x), dx = at::empty_like(x), dgamma = at::empty_like(affine.mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "second_derivative", [&] {
    over_tasks(s, [&](int64_t t) {
      const scalar_t *us = of_task<scalar_t>(u, t), *gs = of_task<scalar_t>(g, t), *in = of_task<scalar_t>(x, t);
      const auto sum = sums<5, scalar_t>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [us, gs, in, line = Line<V, scalar_t>(affine, t, channel)](int64_t i, V* part) {
          const V xi = load<V>(in + i), gi = passed<relu, V>(load<V>(gs + i), line.at(xi)), ui = load<V>(us + i),
                  d = xi - line.mean;
          part[0] += gi;
          part[1] += ui;
          part[2] += gi * ui;
          part[3] += gi * d;
          part[4] += ui * d;
        };
      });
      // dg = slope u + gd (x - mean) + g1, dx = gd g + xu u + xd (x - mean) + x1
      std::vector<scalar_t> gd(s.channels), g1(s.channels), xu(s.channels), xd(s.channels), x1(s.channels);
      for (int64_t j = 0; j < s.channels; ++j) {
        const double r = of_task<scalar_t>(affine.r, t)[j], slope = of_task<scalar_t>(affine.gamma, t)[j] * r,
                     n = s.rows, mg = sum[0][j] / n, mu = sum[1][j] / n, k = sum[3][j] * r / n, q = sum[4][j] * r / n,
                     e = sum[2][j] / n - mg * mu - q * k;
        const double wg = of_task<scalar_t>(a, t)[j] - slope * q, wu = -slope * k;  // w = wg g + wu u
        of_task<scalar_t>(dgamma, t)[j] = r * n * e;
        gd[j] = wg * r;
        g1[j] = of_task<scalar_t>(b, t)[j] - slope * mu;
        xu[j] = r * wu;
        xd[j] = -r * r * (wg * k + wu * q + slope * e);
        x1[j] = -r * (wg * mg + wu * mu);
      }
      scalar_t *out_g = of_task<scalar_t>(dg, t), *out_x = of_task<scalar_t>(dx, t);
      over_rows<scalar_t>(s, [&](auto zero, int64_t channel) {
        using V = decltype(zero);
        return [us, gs, in, out_g, out_x, line = Line<V, scalar_t>(affine, t, channel), vgd = load<V>(&gd[channel]),
                vg1 = load<V>(&g1[channel]), vxu = load<V>(&xu[channel]), vxd = load<V>(&xd[channel]),
                vx1 = load<V>(&x1[channel])](int64_t i) {
          const V xi = load<V>(in + i), y = line.at(xi), gi = passed<relu, V>(load<V>(gs + i), y), ui = load<V>(us + i),
                  d = xi - line.mean;
          store(out_g + i, passed<relu, V>(line.slope * ui + vgd * d + vg1, y));
          store(out_x + i, V(vgd * gi + vxu * ui + vxd * d + vx1));
        };
      });
    });
  });
  return {dg, dx, dgamma};
}

inline Tensor rows_of(const Tensor& x) { return channels_last(x).flatten(1, 3); }
inline Rows shape_of_rows(const Tensor& rows) { return {rows.size(0), rows.size(1), rows.size(2)}; }

// Rows [T, R, C] as images like `like`.
inline Tensor images_of(const Tensor& rows, const Tensor& like) {
  return rows.reshape({like.size(0), like.size(1), like.size(3), like.size(4), like.size(2)}).permute({0, 1, 4, 2, 3});
}

template <bool relu>
struct NormBackward : Function<NormBackward<relu>> {
  static tensor_list forward(AutogradContext* ctx, const Tensor& g, const Tensor& x, const Tensor& gamma,
                             const Tensor& beta, const Tensor& mean, const Tensor& r) {
    ctx->save_for_backward({g, x, gamma, beta, mean, r});
    const Tensor rows = rows_of(x);
    const Affine affine{gamma.contiguous(), beta.contiguous(), mean, r};
    auto [dx, dgamma, dbeta] = derivative<relu>(shape_of_rows(rows), rows_of(g), rows, affine);
    return {images_of(dx, x), dgamma, dbeta};
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),  // create_graph=True: the result would be taken for a constant
                "this batch normalisation has no third derivative; use execution vmap or loop");
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &x = saved[1], rows = rows_of(x);
    const Affine affine{saved[2].contiguous(), saved[3].contiguous(), saved[4], saved[5]};
    auto [dg, dx, dgamma] = second_derivative<relu>(shape_of_rows(rows), rows_of(grads[0]), grads[1].contiguous(),
                                                    grads[2].contiguous(), rows_of(g), rows, affine);
    return {images_of(dg, x), images_of(dx, x), dgamma, Tensor(), Tensor(), Tensor()};
  }
};

template <bool relu>
struct Norm : Function<Norm<relu>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps) {
    const Tensor rows = rows_of(x);
    const Rows s = shape_of_rows(rows);
    const auto [mean, r] = statistics(s, rows, eps);
    ctx->save_for_backward({x, gamma, beta, mean, r});
    const Tensor y = empty_images(x.size(0), x.size(1), x.size(2), x.size(3), x.size(4), x);
    return normalised<relu>(s, rows, {gamma.contiguous(), beta.contiguous(), mean, r}, y);
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto found = NormBackward<relu>::apply(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4]);
    return {found[0], found[1], found[2], Tensor()};
  }
};

inline Tensor batch_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, bool relu) {
  if (x.dim() == 4)
    return batch_norm(x.unsqueeze(0), gamma.unsqueeze(0), beta.unsqueeze(0), eps, relu).squeeze(0);
  const std::vector<int64_t> channels{x.size(0), x.size(2)};
  TORCH_CHECK(x.dim() == 5 && gamma.sizes().vec() == channels && beta.sizes().vec() == channels,
              "batch_norm takes [T, n, c, h, w] and [T, c], got ", x.sizes(), ", ", gamma.sizes(), ", ", beta.sizes());
  return relu ? Norm<true>::apply(x, gamma, beta, eps) : Norm<false>::apply(x, gamma, beta, eps);
}

}  // namespace imaml
